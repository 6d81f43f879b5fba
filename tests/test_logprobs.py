import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dno_jax.logprobs import head_token_logprobs, sequence_logprobs, token_logprobs

B, T, D, V = 3, 13, 8, 50


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    token = rng.integers(0, V, size=(B, T)).astype(np.int32)
    return hidden, head, token


def reference(hidden, head, token):
    """log softmax in float64, one token at a time."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    logsum = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
    return np.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - logsum


@pytest.mark.parametrize(
    ("chunk", "columns"), [(1, None), (7, None), (9, 50), (9, 49), (9, 25), (39, 7), (64, 1), (64, 1000)]
)
def test_values_and_gradients_depend_neither_on_the_chunk_nor_on_the_columns(arrays, chunk, columns):
    hidden, head, token = arrays
    weight = np.linspace(0.1, 1.0, B * T).reshape(B, T).astype(np.float32)

    def chunked(h, w):
        return jnp.sum(weight * head_token_logprobs(h, w, token, chunk=chunk, columns=columns))

    def whole(h, w):
        return jnp.sum(weight * token_logprobs(jnp.einsum("btd,dv->btv", h, w), token))

    np.testing.assert_allclose(
        head_token_logprobs(hidden, head, token, chunk=chunk), reference(hidden, head, token), rtol=1e-5, atol=2e-6
    )
    for found, expected in zip(
        jax.grad(chunked, (0, 1))(hidden, head), jax.grad(whole, (0, 1))(hidden, head), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-6)


def test_no_array_of_the_whole_vocabulary_times_the_whole_batch(arrays):
    hidden, head, token = (
        np.repeat(arrays[0], 32, axis=1),
        np.tile(arrays[1], (1, 64)),
        np.repeat(arrays[2], 32, axis=1),
    )

    def loss(chunk):
        def total(h, w):
            return head_token_logprobs(h, w, token, chunk=chunk).sum()

        return jax.jit(jax.grad(total, (0, 1))).lower(hidden, head).compile().memory_analysis().temp_size_in_bytes

    whole, chunked = loss(hidden.shape[0] * hidden.shape[1]), loss(96)
    assert whole > B * T * 32 * V * 64 * 4
    assert chunked < whole / 4


def test_bfloat16_inputs_are_accumulated_in_float32(arrays):
    hidden, head, token = arrays
    low = jnp.asarray(hidden, jnp.bfloat16)
    found = head_token_logprobs(low, jnp.asarray(head), token, chunk=16)
    assert found.dtype == jnp.float32
    rounded_head = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    # Same rounded inputs in float64: what is left is float32 accumulation, not bfloat16's 8 bits.
    np.testing.assert_allclose(found, reference(np.asarray(low, np.float32), rounded_head, token), atol=2e-5)


def test_a_sum_of_many_bfloat16_logprobs_keeps_float32_precision():
    values = jnp.full((1, 2048), -1.0078125, jnp.bfloat16)
    total = sequence_logprobs(values, jnp.ones((1, 2048), bool))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, [-1.0078125 * 2048], rtol=1e-6)


def test_an_empty_row_is_zero_with_zero_gradient(arrays):
    hidden, head, token = arrays
    mask = np.ones((B, T), bool)
    mask[1] = False

    def total(h):
        return sequence_logprobs(head_token_logprobs(h, head, token, chunk=8), mask).sum()

    value = sequence_logprobs(head_token_logprobs(hidden, head, token, chunk=8), mask)
    slope = np.asarray(jax.grad(total)(hidden))
    assert float(value[1]) == 0.0
    assert np.all(slope[1] == 0.0)
    assert np.all(np.any(slope[0] != 0.0, axis=-1))


def test_masked_vocabulary_entries_may_be_minus_infinity():
    logits = jnp.asarray([[1.0, -jnp.inf, 2.0]])
    np.testing.assert_allclose(token_logprobs(logits, jnp.asarray([2])), [-np.log1p(np.exp(-1.0))], rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_works_on_a_vocabulary_split_over_devices(arrays, kind):
    hidden, head, token = arrays
    head = np.concatenate([head, head[:, :6]], axis=1)  # 56 columns, 8 devices
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(kind,))
    logits = jnp.einsum("btd,dv->btv", hidden, head)
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, None, "tensor")))
        found = jax.jit(token_logprobs)(placed, jax.device_put(token, NamedSharding(mesh, PartitionSpec())))
    np.testing.assert_allclose(found, reference(hidden, head, token), rtol=1e-5, atol=2e-6)


def test_refuses_a_chunk_of_nothing(arrays):
    with pytest.raises(ValueError, match="chunk is 0"):
        head_token_logprobs(*arrays, chunk=0)


def test_refuses_no_columns_of_the_head(arrays):
    with pytest.raises(ValueError, match="columns is 0; expected at least 1 column"):
        head_token_logprobs(*arrays, chunk=8, columns=0)
