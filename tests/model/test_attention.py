"""Attention and its back-ends. The kernels run here as plain XLA operations; they are compared with `xla_attention`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.model.attention import CudnnAttention, SplashAttention, attend, xla_attention
from dno_jax.model.places import NO_WINDOW, Places, visible


def qkv(B=2, T=5, S=7, N=6, K=2, H=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k = jax.random.normal(keys[1], (B, S, K, H))
    v = jax.random.normal(keys[2], (B, S, K, H))
    return q, k, v


def test_attention_equals_jax():
    """jax.nn.dot_product_attention is an independent implementation of grouped attention.

    1e-6: outputs are means of values of order one, summed over 7 keys in another order.
    """
    q, k, v = qkv()
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, 5, 7)).at[:, :, 0].set(True)
    ours = attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1), mask, scale=q.shape[-1] ** -0.5)
    theirs = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def _step(columns, *, rows=3, key_heads=2, group=2, head_dim=8, dtype=jnp.float32):
    """One query a row over a cache of so many columns, of which each row sees some."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(rows, 1, key_heads * group, head_dim)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, rows, key_heads, head_dim, columns)), dtype)
    length = jnp.asarray(rng.integers(1, min(columns, 60), size=(rows, 1)))
    return q, k, v, length


def _by_columns(q, k, v, length, columns):
    mask = visible(Places(length), Places(jnp.arange(columns)[None]))
    return attend(q, k[..., :columns], v[..., :columns], mask, scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_query_a_row_equals_jax(columns, dtype):
    """Of an unquantised cache, also one that is narrower than the model: nothing is rounded that was not stored so."""
    q, k, v, length = _step(max(columns, 2), dtype=dtype)
    k, v = (array[..., :columns] for array in (k, v))
    mask = visible(Places(length), Places(jnp.arange(columns)[None]))
    wide = [array.transpose(0, 3, 1, 2).astype(jnp.float32) for array in (k, v)]
    expected = jax.nn.dot_product_attention(q, *wide, mask=mask[:, None])
    np.testing.assert_allclose(_by_columns(q, k, v, length, columns), expected, atol=2e-6)


def test_how_far_attention_reads_changes_rounding_at_most():
    """A row's own columns count, whatever those of longer rows hold; other widths may be rounded otherwise."""
    step = _step(512)
    read = [jax.jit(_by_columns, static_argnums=4)(*step, columns) for columns in (64, 128, 200, 256, 512)]
    for other in read[1:]:
        np.testing.assert_allclose(read[0], other, atol=5e-7)


def test_one_query_a_row_reads_the_cache_where_it_lies():
    """The part that is read is not copied; scores are smaller than it by the head's size."""
    q, k, v, length = _step(1024, rows=8, key_heads=4, head_dim=64)
    compiled = jax.jit(_by_columns, static_argnums=4).lower(q, k, v, length, 512).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < k[..., :512].nbytes / 4


@pytest.mark.parametrize("length", [*(pytest.param(one, marks=pytest.mark.soak) for one in (64, 65, 700)), 200])
def test_blocks_of_queries_change_nothing(length):
    """Whole sequences are cut into blocks that skip keys after them; rows are padded left, right and in the middle.

    1e-6 as above; gradients of early keys are sums over all later queries, so they are compared relative to their size.
    """
    q, k, v = qkv(B=4, T=length, S=length)
    kept = np.ones((4, length), bool)
    kept[1, : length // 3] = kept[2, length // 2 :] = kept[3, 10:20] = False
    position = jnp.asarray(np.where(kept, np.cumsum(kept, axis=1) - 1, -1), jnp.int32)
    mask = visible(Places(position), Places(position))
    weight = jnp.asarray(kept, jnp.float32)[:, :, None, None]

    def ours(q, k, v):
        return attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1), mask, scale=q.shape[-1] ** -0.5) * weight

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]) * weight

    np.testing.assert_allclose(ours(q, k, v), theirs(q, k, v), atol=1e-6)
    for a, b in zip(
        jax.grad(lambda *x: jnp.sum(jnp.sin(ours(*x))), (0, 1, 2))(q, k, v),
        jax.grad(lambda *x: jnp.sum(jnp.sin(theirs(*x))), (0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=3e-6)


def test_a_query_that_sees_nothing_is_finite_also_in_the_gradient():
    q, k, v = qkv()
    mask = jnp.zeros((2, 5, 7), bool).at[0].set(True)

    def total(q, k, v):
        out = attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1), mask, scale=q.shape[-1] ** -0.5)
        return jnp.sum(out[0])  # the blind row is masked away by the caller

    out = attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1), mask, scale=q.shape[-1] ** -0.5)
    assert np.isfinite(out).all()
    for gradient in jax.grad(total, argnums=(0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient[1]) == 0).all()


def test_visibility_is_decided_by_positions_alone():
    query = jnp.array([[-1, 0, 2]])
    key = jnp.array([[2, -1, 0, 1, 3]])
    expected = [[[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 1, 1, 0]]]
    np.testing.assert_array_equal(visible(Places(query), Places(key)), np.array(expected, bool))


def padded_rows(length):
    """Positions of four rows: full, padded left, padded right, padded on both sides."""
    slot = np.arange(length)
    start = np.array([0, length // 3, 0, 7])[:, None]
    end = np.array([length, length, length // 2, length - 11])[:, None]
    return jnp.asarray(np.where((slot >= start) & (slot < end), slot - start, -1), jnp.int32)


SPLASH = SplashAttention((32, 96, NO_WINDOW), interpret=True)
CUDNN = CudnnAttention((32, 96, NO_WINDOW), implementation="xla")


@pytest.mark.parametrize(
    ("attention", "length", "softcap"),
    [
        pytest.param(SPLASH, 256, None, id="splash", marks=pytest.mark.soak),
        pytest.param(SPLASH, 256, 2.0, id="splash-softcap", marks=pytest.mark.soak),
        pytest.param(SPLASH, 100, 2.0, id="splash-length-padded"),
        pytest.param(CUDNN, 256, None, id="cudnn", marks=pytest.mark.soak),
        pytest.param(CUDNN, 101, None, id="cudnn-odd-length"),
    ],
)
def test_kernels_equal_xla(attention, length, softcap):
    """Values and gradients on tokens, with grouped heads; padding is finite, and nothing of it reaches the gradients.

    3e-6: float32, sums of up to 256 terms of order one in another order; entries of a gradient are sums in which larger
    terms cancel, so the error is held to its largest entry. The window is traced, as in the scan over layers.
    """
    operands = qkv(B=4, T=length, S=length, N=4, K=2, H=64)
    position = padded_rows(length)
    real = (position >= 0)[:, :, None, None]

    def total(attend_with, window, *operands):
        out = attend_with(*operands, places=Places(position), window=window, scale=0.2, softcap=softcap)
        masked = jnp.where(real, out, 0.0)
        return jnp.sum(jnp.sin(masked)), (masked, out)

    @jax.jit
    def run(window):
        return [
            jax.grad(lambda *x, f=f: total(f, window, *x), (0, 1, 2), has_aux=True)(*operands)
            for f in (attention, xla_attention)
        ]

    results = []
    for window in attention.windows:
        (gradients, (found, everything)), (wanted_gradients, (wanted, _)) = run(jnp.int32(window))
        assert np.isfinite(everything).all()
        np.testing.assert_allclose(found, wanted, atol=3e-6)
        for gradient, expected in zip(gradients, wanted_gradients, strict=True):
            np.testing.assert_allclose(gradient, expected, atol=3e-6 * np.abs(expected).max())
            assert not np.asarray(gradient)[np.broadcast_to(~real, gradient.shape)].any()
        results.append(np.asarray(found))
    assert not np.allclose(results[0], results[1])
    assert not np.allclose(results[1], results[2])


@pytest.mark.parametrize("attention", [SPLASH, CUDNN], ids=["splash", "cudnn"])
def test_kernels_keep_bfloat16_near_float32(attention):
    """2 ** -7: half a unit in the last of 8 bits for the result, the weights and the scaled queries each, doubled."""
    q, k, v = (array.astype(jnp.bfloat16) for array in qkv(B=1, T=128, S=128, N=2, K=1, H=128))
    settings = {"places": Places(jnp.arange(128)[None]), "window": NO_WINDOW, "scale": 128**-0.5, "softcap": None}
    found = attention(q, k, v, **settings)
    wanted = xla_attention(*(array.astype(jnp.float32) for array in (q, k, v)), **settings)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=2**-7, atol=2**-7)


def test_cudnn_refuses_a_soft_cap():
    q, k, v = qkv(T=8, S=8)
    with pytest.raises(ValueError, match="softcap"):
        CUDNN(q, k, v, places=Places(jnp.zeros((2, 8), jnp.int32)), window=NO_WINDOW, scale=1.0, softcap=30.0)


@pytest.mark.parametrize("attention", [SPLASH, CUDNN], ids=["splash", "cudnn"])
def test_windows_wider_than_the_text_make_no_branches(attention):
    def program(length):
        q, k, v = qkv(T=length, S=length, N=2, K=2, H=64)
        position = jnp.zeros((2, length), jnp.int32)

        def run(window):
            return attention(q, k, v, places=Places(position), window=window, scale=1.0, softcap=None)

        return str(jax.make_jaxpr(run)(jnp.int32(96)))

    assert "searchsorted" in program(128)
    assert "searchsorted" not in program(32)


def test_cudnn_becomes_cudnns_kernel(monkeypatch):
    """Lowered for CUDA, forward and backward are calls of the library, one a window, with the settings we mean."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)  # it asks the library, which is not here
    attention = CudnnAttention((32, NO_WINDOW))

    def total(q, k, v, position, window):
        out = attention(q, k, v, places=Places(position), window=window, scale=0.125, softcap=None)
        return jnp.sum(out.astype(jnp.float32))

    def lowered(dtype):
        q = jax.ShapeDtypeStruct((2, 128, 4, 64), dtype)
        k = jax.ShapeDtypeStruct((2, 128, 2, 64), dtype)
        position, window = jax.ShapeDtypeStruct((2, 128), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, k, position, window)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    text = lowered(jnp.bfloat16).replace("\\22", '"')
    assert sorted(re.findall(r"@__cudnn\$(\w+)", text)) == ["fmhaSoftmax"] * 2 + ["fmhaSoftmaxBackward"] * 2
    assert sorted(re.findall(r'"sliding_window_length": (\d+)', text)) == ["0", "0", "32", "32"]
    assert set(re.findall(r'"mask_type": "(\w+)"', text)) == {"CAUSAL"}
    assert set(re.findall(r'"fmha_scale": ([\d.]+)', text)) == {"0.125"}
    with pytest.raises(NotImplementedError, match="bf16"):
        lowered(jnp.float32)
