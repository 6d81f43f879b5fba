from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.model.attention import NO_WINDOW
from dno_jax.model.cache import as_stored, cache_axes, init_cache
from dno_jax.model.decoder import Decoder, head_logprobs, logits
from dno_jax.model.params import abstract_params, init_params, param_axes, unstack_layers
from dno_jax.model.parts import Unconstrained
from tests.model.conftest import grow, random_params, run


def text(config, *, rows=3, length=24, seed=0):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(rows, length))


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), tree)


def test_structure_is_never_a_flag(config):
    token = jnp.zeros((1, 2), jnp.int32)
    expected = shapes(abstract_params(config))
    for remat in ("none", "full", "dots"):
        for dtype in (jnp.float32, jnp.bfloat16):
            model = Decoder(config, dtype=dtype, remat=remat)
            boxed = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), token, token))
            import flax.linen as nn

            assert shapes(nn.unbox(boxed)["params"]) == expected


def test_axes_name_every_dimension(config):
    axes, abstract = param_axes(config), abstract_params(config)
    jax.tree.map(lambda leaf, names: len(leaf.shape) == len(names) or pytest.fail(f"{names} {leaf}"), abstract, axes)
    assert axes["layers"]["q"] == ("layers", "embed", "heads", "head_dim")
    assert axes["layers"]["o"] == ("layers", "heads", "head_dim", "embed")
    assert axes["layers"]["k_bias"] == ("layers", "kv_heads", "head_dim")
    assert axes["layers"]["mlp_norm"] == ("layers", "norm")
    assert axes["embed"] == ("vocab", "embed")
    assert axes["head"] == ("embed", "vocab")
    tied = dataclasses.replace(
        config, tie_word_embeddings=True, attention_bias=False, output_bias=False, mlp_bias=False
    )
    assert "head" not in param_axes(tied)
    assert not [name for name in param_axes(tied)["layers"] if "bias" in name]


def test_init_under_a_mesh_does_not_take_axis_names_for_mesh_axes(config):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    expected = init_params(config, jax.random.key(3))
    with jax.set_mesh(mesh):
        found = init_params(config, jax.random.key(3))
        jitted = jax.jit(lambda key: init_params(config, key))(jax.random.key(3))
        assert shapes(abstract_params(config)) == shapes(expected)
        assert param_axes(config)["embed"] == ("vocab", "embed")
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    jax.tree.map(np.testing.assert_array_equal, expected, jitted)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_number(config, params, remat):
    token = jnp.asarray(text(config, rows=2, length=9), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))

    def gradient(kind):
        def loss(p):
            hidden, _ = Decoder(config, remat=kind).apply({"params": p}, token, position)
            return jnp.sum(jnp.sin(logits(config, p, hidden)))

        return jax.jit(jax.grad(loss))(params)

    # 1e-5 of each gradient's own scale: the recomputed forward pass may be fused, hence rounded, differently.
    for a, b in zip(jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient(remat)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()))


def test_causality(config, params):
    token = text(config, rows=1)
    changed = token.copy()
    changed[0, 10] = (changed[0, 10] + 1) % config.vocab_size
    before, after = run(config, params, token), run(config, params, changed)
    np.testing.assert_array_equal(before[0, :10], after[0, :10])
    assert np.abs(before[0, 10:] - after[0, 10:]).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize(("left", "right"), [(0, 5), (1, 0), (7, 3)])
def test_padding_and_neighbours_change_nothing(config, params, left, right):
    token = text(config, rows=2, length=20)
    alone = run(config, params, token[:1])
    padded = np.full((3, left + 20 + right), 7)
    position = np.full_like(padded, -1)
    padded[0, left : left + 20], position[0, left : left + 20] = token[0], np.arange(20)
    padded[1, :13], position[1, :13] = token[1, :13], np.arange(13)  # the third row is nothing but padding
    together = run(config, params, padded, position)
    assert np.isfinite(together).all()
    # 2e-5: logits reach 20 here, and other shapes are summed in another order.
    np.testing.assert_allclose(together[0, left : left + 20], alone[0], atol=2e-5)


@pytest.mark.parametrize("windows", [None, (5, 5, 5), (5, NO_WINDOW, 9)])
def test_cached_decoding_equals_the_full_forward_pass(config, params, windows):
    """Rows of different lengths, so that a window is a matter of positions, not of slots."""
    config = dataclasses.replace(config, windows=windows)
    token, lengths, prefill = text(config, rows=4, length=26), np.array([3, 11, 8, 0]), 11
    full = run(config, params, token)
    model = Decoder(config)
    step = jax.jit(lambda t, p, c: model.apply({"params": params}, t, p, c))
    position = np.where(np.arange(prefill) < lengths[:, None], np.arange(prefill), -1)
    cache = init_cache(config, batch_size=4, num_slots=prefill)
    hidden, cache = step(jnp.asarray(token[:, :prefill], jnp.int32), jnp.asarray(position, jnp.int32), cache)
    found = {(row, t): hidden[row, t] for row in range(4) for t in range(lengths[row])}
    cache = grow(cache, prefill + 16)
    for index in range(15):
        # Row 1 finishes early and goes on as padding; what it writes must not be seen.
        at = lengths + index
        alive = np.array([True, index < 6, True, True])
        now = np.where(alive, token[np.arange(4), np.minimum(at, 25)], 0)
        hidden, cache = step(
            jnp.asarray(now[:, None], jnp.int32), jnp.asarray(np.where(alive, at, -1)[:, None], jnp.int32), cache
        )
        found |= {(row, int(at[row])): hidden[row, 0] for row in range(4) if alive[row]}
    assert len(found) == 3 + 11 + 8 + 15 + 6 + 15 + 15
    for (row, t), h in found.items():
        # 2e-5: logits reach 20 here, and single tokens are multiplied in another order than whole texts.
        np.testing.assert_allclose(logits(config, params, h), full[row, t], atol=2e-5)


def test_layers_taken_apart_compute_the_same(config, params):
    token = jnp.asarray(text(config, rows=2, length=9), jnp.int32)
    position, model = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9)), Decoder(config)
    apart = unstack_layers(params)
    assert len(apart["layers"]) == config.num_hidden_layers
    assert unstack_layers(apart) == apart
    step = jax.jit(lambda p, t, i, c: model.apply({"params": p}, t, i, c))
    found = [step(p, token, position, init_cache(config, batch_size=2, num_slots=12)) for p in (params, apart)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    given = jax.tree.map(jnp.array, params)
    again = unstack_layers(given, donate=True)
    jax.tree.map(np.testing.assert_array_equal, again, apart)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given["layers"]))
    assert not given["embed"].is_deleted()


@pytest.mark.parametrize("length", [40, 70, 140, 500])
def test_reading_a_part_of_the_cache_changes_nothing(config, params, length):
    """Columns that no row has reached may be left out, whichever part that leaves."""
    token = text(config, rows=1, length=1)
    model = Decoder(config)
    rng = np.random.default_rng(length)
    cache = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        init_cache(config, batch_size=1, num_slots=512),
    )
    short = jax.tree.map(lambda leaf: leaf[..., :length], cache)
    position = jnp.full((1, 1), length - 1, jnp.int32)
    found, expected = (
        model.apply({"params": params}, jnp.asarray(token, jnp.int32), position, own)[0] for own in (cache, short)
    )
    # The same numbers in another order of sums.
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_former_text_left_is_not_seen(config, params):
    """A row is given another, shorter text: its columns are overwritten one by one, and nothing is cleared."""
    token = text(config, rows=2, length=12)
    model = Decoder(config)
    step = jax.jit(lambda t, p, c: model.apply({"params": params}, t, p, c))
    position = jnp.arange(12, dtype=jnp.int32)[None]
    _, cache = step(jnp.asarray(token[:1], jnp.int32), position, init_cache(config, batch_size=1, num_slots=16))
    fresh = init_cache(config, batch_size=1, num_slots=16)
    for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
        piece = jnp.asarray(token[1:, part], jnp.int32)
        used, cache = step(piece, position[:, part], cache)
        new, fresh = step(piece, position[:, part], fresh)
        np.testing.assert_array_equal(used, new)


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.05), ("float8_e4m3fn", 0.3), ("bfloat16", 0.05)])
def test_smaller_caches_keep_their_precision(config, params, dtype, bound):
    """Of the logits' spread: int8 has 127 steps to the largest number of a column, float8 and bfloat16 4 and 8 bits."""
    token = text(config, rows=2, length=20)
    exact = run(config, params, token)
    model, position = Decoder(config), jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32), (2, 20))
    cache = init_cache(config, batch_size=2, num_slots=24, dtype=jnp.dtype(dtype))
    assert (cache[0].key_scale is None) == (dtype == "bfloat16")
    hidden, _ = model.apply({"params": params}, jnp.asarray(token, jnp.int32), position, cache)
    error = np.abs(np.asarray(logits(config, params, hidden)) - exact).mean() / exact.std()
    assert 1e-4 < error < bound


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-30])
def test_a_vector_of_nothing_is_stored_as_nothing(dtype, largest):
    found = np.asarray(as_stored(jnp.full((1, 2, 1, 4), largest), jnp.dtype(dtype)))
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found, largest, atol=1e-37)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_what_is_stored_is_near_what_was_given(dtype):
    """int8 errs by half a step of its column's largest number over 127; float8 keeps four bits, half a unit of them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 16)) * 10.0 ** rng.integers(-3, 3, size=(2, 5, 3, 1))
    found = np.asarray(as_stored(jnp.asarray(x, jnp.float32), jnp.dtype(dtype)))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    allowed = largest / 254 if dtype == "int8" else np.maximum(np.abs(x) / 16, largest / 448 * 2.0**-10)
    assert np.all(np.abs(found - x) <= allowed * (1 + 1e-5))


def test_cache_axes_have_the_cache_structure(config):
    for dtype in (jnp.bfloat16, jnp.int8):
        whole = init_cache(config, batch_size=2, num_slots=4, dtype=dtype)
        assert len(whole) == config.num_hidden_layers
        cache = whole[0]
        axes = jax.tree.leaves(cache_axes(cache), is_leaf=lambda leaf: isinstance(leaf, tuple))
        assert [leaf.ndim for leaf in jax.tree.leaves(cache)] == [len(names) for names in axes]
        assert cache.key.dtype == cache.value.dtype == dtype


def test_bfloat16_stays_within_its_precision(config, params):
    """Bound: 8 bits of mantissa, half a unit a rounding (2**-9), some 8 roundings on the way through each of 3 layers
    adding like a random walk, so about 2**-9 * sqrt(24) = 1 % of the logits' scale; the worst of 7,000 may be five
    times that."""
    token = text(config)
    exact = run(config, params, token)
    rough = run(config, params, token, dtype=jnp.bfloat16)
    assert rough.dtype == np.float32
    scale = np.sqrt((exact**2).mean())
    assert np.sqrt(((rough - exact) ** 2).mean()) < 0.01 * scale
    assert np.abs(rough - exact).max() < 0.05 * scale


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tied", [False, True])
def test_head_logprobs_are_those_of_logits(config, params, tied, softcap):
    config = dataclasses.replace(config, tie_word_embeddings=tied, logit_softcap=softcap)
    hidden = jax.random.normal(jax.random.key(0), (2, 5, config.hidden_size))
    token = jnp.asarray(text(config, rows=2, length=5), jnp.int32)
    found = logits(config, params, hidden)
    head = params["embed"].T if tied else params["head"]
    plain = np.asarray(hidden @ jnp.asarray(head))
    # 1e-5: forty products of order one.
    np.testing.assert_allclose(found, softcap * np.tanh(plain / softcap) if softcap else plain, atol=1e-5)
    expected = jnp.take_along_axis(jax.nn.log_softmax(found), token[..., None], axis=-1)[..., 0]
    logprob = head_logprobs(config, params, hidden, token, chunk=3)
    np.testing.assert_allclose(logprob, expected, atol=1e-5)
    assert logits(config, params, hidden.astype(jnp.bfloat16)).dtype == jnp.float32


@dataclasses.dataclass(frozen=True)
class Recorder(Unconstrained):
    """Compares equal by value, like the Constrain of parallel.sharding; writes down what it was called with."""

    log: tuple = ()

    def __call__(self, array, axes):
        SEEN.add((axes, array.ndim))
        return array


SEEN: set = set()


def test_constrain_is_called_with_known_names(config, params):
    SEEN.clear()
    token = jnp.asarray(text(config, rows=2, length=4), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2, 4))
    model = Decoder(config, constrain=Recorder())
    assert hash(model) == hash(Decoder(config, constrain=Recorder()))
    model.apply({"params": params}, token, position)
    assert {axes for axes, _ in SEEN} == {
        ("batch", "length", "embed"),
        ("batch", "length", "heads", "head_dim"),
        ("batch", "length", "kv_heads", "head_dim"),
        ("batch", "length", "mlp"),
    }
    assert all(len(axes) == ndim for axes, ndim in SEEN)


def test_misuse_is_refused(config, params):
    token = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises((ValueError, TypeError), match=r"position|places"):  # jaxtyping sees it first where it is on
        Decoder(config).apply({"params": params}, token, token[:, :3])
    with pytest.raises(ValueError, match="slots"):
        Decoder(config).apply({"params": params}, token, token, init_cache(config, batch_size=1, num_slots=3))


def test_a_sharded_forward_pass_equals_the_plain_one():
    """On 2 x 2 x 2 devices, with the layouts of the parallel package where it is installed."""
    sharding = pytest.importorskip("dno_jax.parallel.sharding")
    from dno_jax.model.config import ModelConfig

    config = ModelConfig(96, 32, 48, 2, 4, 2, 8)
    params = random_params(config)
    token = text(config, rows=4, length=12)
    mesh = jax.make_mesh(
        (2, 2, 1, 2), ("data", "fsdp", "expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 4
    )
    axes, abstract = param_axes(config), abstract_params(config)
    placed = jax.device_put(params, sharding.weight_shardings(mesh, sharding.TRAIN, axes=axes, shapes=abstract))
    model = Decoder(config, remat="full", constrain=sharding.Constrain(mesh, sharding.TRAIN))

    @jax.jit
    def forward(p, t, position):
        return logits(config, p, model.apply({"params": p}, t, position)[0])

    with jax.set_mesh(mesh):
        position = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (4, 12))
        found = forward(placed, jnp.asarray(token, jnp.int32), position)
    # 2e-5: logits reach 10, and the partial sums of eight devices are added in another order.
    np.testing.assert_allclose(found, run(config, params, token), atol=2e-5)
