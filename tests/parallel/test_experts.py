import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.config import MeshSection
from dno_jax.model.moe import dense_experts, ragged_experts
from dno_jax.parallel.experts import ShardedExperts, sharded_experts
from dno_jax.parallel.mesh import make_mesh

B, T, D, F, E, K = 8, 6, 16, 24, 4, 2
# data, fsdp, expert, tensor
MESHES = [(1, 1, 4, 1), (2, 1, 2, 2), (1, 2, 2, 2), (2, 2, 1, 2)]


def mesh_of(axes):
    data, fsdp, expert, tensor = axes
    section = MeshSection(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
    return make_mesh(section, jax.devices()[: math.prod(axes)])


def operands(seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.1, 1.0, (B, T, K)).astype(np.float32)
    # Uneven: the last expert gets nothing, and some ids name no expert (padding).
    expert = np.stack([rng.permutation(E - 1)[:K] for _ in range(B * T)]).reshape(B, T, K).astype(np.int32)
    expert[0, 4:] = E
    x, gate, up, down = (
        (rng.normal(size=shape) / math.sqrt(shape[-2])).astype(np.float32)
        for shape in [(B, T, D), (E, D, F), (E, D, F), (E, F, D)]
    )
    return jax.tree.map(jnp.asarray, (x, weight, expert, {"gate_EDF": gate, "up_EDF": up, "down_EFD": down}))


def by_hand(x, weight, expert, kernels):
    """Token by token, in float64."""
    x, weight, expert, kernels = jax.tree.map(np.asarray, (x, weight, expert, kernels))
    out = np.zeros((B, T, D))
    for b, t, k in np.ndindex(B, T, K):
        if (e := expert[b, t, k]) < E:
            gate, up, down = (np.asarray(kernels[name][e], np.float64) for name in ("gate_EDF", "up_EDF", "down_EFD"))
            g, u = x[b, t] @ gate, x[b, t] @ up
            out[b, t] += weight[b, t, k] * ((g / (1 + np.exp(-g)) * u) @ down)
    return out


def value_and_grads(experts, x, weight, expert, kernels):
    def loss(x, weight, kernels):
        y = experts(x, weight, expert, activation=jax.nn.silu, **kernels)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, weight, kernels)
    return y, grads


def assert_same(found, expected):
    """Equal up to float32 rounding of sums in another order: some ten roundings of the largest number of an array."""
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(b))), err_msg=str(path))


@pytest.mark.parametrize("experts", [dense_experts, ragged_experts])
def test_both_ways_equal_a_loop_over_tokens(experts):
    x, weight, expert, kernels = operands()
    y, grads = value_and_grads(experts, x, weight, expert, kernels)
    np.testing.assert_allclose(y, by_hand(x, weight, expert, kernels), atol=2e-5)
    assert not np.asarray(y)[0, 4:].any()  # nobody's tokens get nothing
    assert all(not np.asarray(leaf)[E - 1].any() for leaf in grads[2].values())  # the idle expert learns nothing
    assert_same((y, grads), value_and_grads(dense_experts, x, weight, expert, kernels))


@pytest.mark.parametrize("local", [dense_experts, ragged_experts])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_sharded_equals_unsharded(axes, local):
    given = operands()
    expected = value_and_grads(dense_experts, *given)
    assert_same(value_and_grads(ShardedExperts(mesh_of(axes), local), *given), expected)


@pytest.mark.parametrize("local", [dense_experts, ragged_experts])
def test_gradients_through_checkpoint_and_scan(local):
    x, weight, expert, kernels = operands()
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), kernels, operands(seed=1)[3])

    def layers(experts, wrap):
        def one(x, kernels):
            return x + experts(x, weight, expert, activation=jax.nn.silu, **kernels), None

        def loss(x, stacked):
            y, _ = jax.lax.scan(wrap(one), x, stacked)
            return jnp.sum(jnp.sin(y)), y

        (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, stacked)
        return y, grads

    expected = layers(dense_experts, lambda f: f)
    sharded = ShardedExperts(mesh_of((2, 1, 2, 2)), local)
    assert_same(layers(sharded, partial(jax.checkpoint, prevent_cse=False)), expected)


def test_bfloat16_sums_in_float32():
    x, weight, expert, kernels = operands()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, kernels))
    exact = by_hand(low[0].astype(jnp.float32), weight, expert, low[1])
    for experts in (dense_experts, ragged_experts, ShardedExperts(mesh_of((1, 1, 2, 2)), ragged_experts)):
        y = experts(low[0], weight, expert, activation=jax.nn.silu, **low[1])
        assert y.dtype == jnp.bfloat16
        # Rounded: gate, up, their product, the sum (once a tensor shard): 5 halves of 2^-8 of the largest answer.
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=5 * 2**-9 * np.abs(exact).max())


def test_experts_are_a_value():
    assert sharded_experts(mesh_of((2, 1, 2, 2))) == sharded_experts(mesh_of((2, 1, 2, 2)))
    assert hash(sharded_experts(mesh_of((2, 1, 2, 2)))) == hash(sharded_experts(mesh_of((2, 1, 2, 2))))
    assert sharded_experts(mesh_of((2, 1, 2, 2))) != sharded_experts(mesh_of((1, 2, 2, 2)))
    assert sharded_experts(mesh_of((1, 1, 2, 1))).local is dense_experts  # measured: see docs/benchmarks.md
