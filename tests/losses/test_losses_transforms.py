"""From hidden states to the loss, values and gradients are the same under every transformation and every mesh."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dno_jax.logprobs import head_token_logprobs, sequence_logprobs
from dno_jax.losses import dno_loss, self_play_win_rates
from tests.losses.test_losses import CASES, float32, random_arrays

P, T, D, V = 16, 13, 8, 48
SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
ALL, CHUNK = P * 2 * T, 8  # tokens a slice of the head: one slice, or several on each device as well


def mean_loss(weights, pairs, *, chunk):
    """Of a model whose hidden states are a table's rows; float32 or bfloat16 as the table is."""
    token = pairs["token"].reshape(-1, T)
    hidden = jnp.einsum("btv,vd->btd", jax.nn.one_hot(token, V, dtype=weights["table"].dtype), weights["table"])
    logprob = head_token_logprobs(hidden, weights["head"], token, chunk=chunk).reshape(-1, 2, T)
    logprob = sequence_logprobs(logprob, pairs["mask"])
    return dno_loss(
        chosen_logprob=logprob[:, 0],
        rejected_logprob=logprob[:, 1],
        reference_chosen_logprob=pairs["reference"][:, 0],
        reference_rejected_logprob=pairs["reference"][:, 1],
        target=pairs["target"],
        beta=0.5,
    ).mean()


def material(dtype=np.float32):
    rng = np.random.default_rng(0)
    weights = {
        "table": jnp.asarray(rng.normal(size=(V, D)), dtype),
        "head": jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
    }
    pairs = {
        "token": rng.integers(V, size=(P, 2, T)).astype(np.int32),
        "mask": rng.random((P, 2, T)) < 0.7,
        "reference": rng.normal(-20, 3, size=(P, 2)).astype(np.float32),
        "target": rng.random(P).astype(np.float32),
    }
    return weights, jax.tree.map(jnp.asarray, pairs)


@cache
def plain(dtype):
    """Return the loss and its gradients, of all pairs in one slice on one device."""
    return jax.jit(jax.value_and_grad(partial(mean_loss, chunk=ALL)))(*material(dtype))


def assert_same(found, dtype):
    # Sums are taken in another order; bfloat16 gradients of the table are rounded to 8 bits of each partial sum.
    near = {"rtol": 2e-5, "atol": 2e-6} if dtype == np.float32 else {"rtol": 2e-2, "atol": 2e-3}
    (loss, gradient), (expected, slopes) = found, plain(dtype)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, value in slopes.items():
        assert np.abs(value).max() > 0.01, name  # there is something to compare
        np.testing.assert_allclose(
            np.asarray(gradient[name], np.float32), np.asarray(value, np.float32), **near, err_msg=name
        )


@DTYPES
def test_one_pair_at_a_time(dtype):
    weights, pairs = material(dtype)

    def mapped(weights, pairs):
        one = jax.tree.map(lambda value: value[:, None], pairs)  # P batches of one pair
        return jax.vmap(partial(mean_loss, chunk=CHUNK), in_axes=(None, 0))(weights, one).mean()

    assert_same(jax.jit(jax.value_and_grad(mapped))(weights, pairs), dtype)


@KINDS
@DTYPES
def test_pairs_split_over_devices(kind, dtype):
    weights, pairs = material(dtype)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, NamedSharding(mesh, WHOLE)), jax.device_put(pairs, NamedSharding(mesh, SPLIT))
        found = jax.jit(jax.value_and_grad(partial(mean_loss, chunk=CHUNK)))(*placed)
    assert_same(found, dtype)


@KINDS
@pytest.mark.parametrize("layout", [WHOLE, SPLIT], ids=["replicated", "fsdp"])
@DTYPES
def test_inside_shard_map(kind, layout, dtype):
    weights, pairs = material(dtype)

    def local(weights, pairs):
        if layout == SPLIT:
            weights = jax.tree.map(partial(jax.lax.all_gather, axis_name="data", tiled=True), weights)
        return jax.lax.pmean(mean_loss(weights, pairs, chunk=CHUNK), "data")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    mapped = jax.shard_map(jax.value_and_grad(local), mesh=mesh, in_specs=(layout, SPLIT), out_specs=(WHOLE, layout))
    placed = jax.device_put(weights, NamedSharding(mesh, layout)), jax.device_put(pairs, NamedSharding(mesh, SPLIT))
    assert_same(jax.jit(mapped)(*placed), dtype)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_gradients_of_every_loss_under_vmap_inside_shard_map(case):
    arrays = float32(random_arrays(case.names, count=16, seed=2))

    def total(a):
        return case.found(a, **case.options).sum()

    expected = jax.grad(total)(arrays)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(jax.vmap(jax.grad(total)), mesh=mesh, in_specs=SPLIT, out_specs=SPLIT)
    found = jax.jit(mapped)(arrays)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_win_rates_of_each_prompt_alone():
    preference = jnp.asarray(np.random.default_rng(0).random((5, 4, 4)), jnp.float32)
    together = self_play_win_rates(preference=preference)
    alone = jax.vmap(lambda matrix: self_play_win_rates(preference=matrix))(preference)
    np.testing.assert_allclose(alone, together, rtol=1e-6)
