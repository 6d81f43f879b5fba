"""Routing and load balance by themselves; whole models against transformers are in test_moe_models.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from dno_jax.model.moe import busiest_share, expert_load, load_balance_loss, ragged_experts, route

B, T, D, E, K, L = 3, 8, 16, 6, 2, 3


def tokens(seed=0):
    rng = np.random.default_rng(seed)
    x, router = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, E)).astype(np.float32) / 4
    position = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    position[1, 5:] = position[2, :] = -1
    return jnp.asarray(x), jnp.asarray(router), jnp.asarray(position)


@pytest.mark.parametrize("norm", [True, False])
def test_routing_equals_transformers(norm):
    x, router, position = tokens()
    found = route(x, router, position, num_experts_per_tok=K, norm=norm)
    config = qwen3_moe.Qwen3MoeConfig(
        hidden_size=D, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm, moe_intermediate_size=8
    )
    theirs = qwen3_moe.Qwen3MoeTopKRouter(config)
    theirs.weight.data = torch.tensor(np.asarray(router).T)
    with torch.no_grad():
        _, weight, expert = theirs(torch.tensor(np.asarray(x)))
    real = np.asarray(position).reshape(-1) >= 0
    # Logits of up to 4, summed in another order, differ by a rounding or two of 2^-22.
    np.testing.assert_allclose(found.weight.reshape(-1, K), weight.numpy(), atol=5e-7)
    np.testing.assert_array_equal(np.asarray(found.expert).reshape(-1, K)[real], expert.numpy()[real])
    assert (np.asarray(found.expert).reshape(-1, K)[~real] == E).all()
    assert not np.asarray(found.probability).reshape(-1, E)[~real].any()
    np.testing.assert_allclose(jnp.sum(found.probability, -1), np.asarray(position) >= 0, atol=1e-6)


def test_router_logits_are_not_rounded_to_bfloat16():
    """Two experts whose logits differ by less than a rounding: the likelier one is chosen still."""
    x = jnp.ones((1, 1, 2), jnp.bfloat16)
    router = jnp.asarray([[8.0, 8.0], [0.0, 2.0**-8]])  # 8 + 2^-8 is 8 in bfloat16
    found = route(x, router, jnp.zeros((1, 1), jnp.int32), num_experts_per_tok=1, norm=False)
    assert found.expert.tolist() == [[[1]]]
    assert found.weight.dtype == jnp.float32


def test_load_balance_equals_transformers():
    x, _, position = tokens()
    routers = [tokens(seed)[1] for seed in range(L)]
    loads = [expert_load(route(x, r, position, num_experts_per_tok=K, norm=True), position) for r in routers]
    load = jax.tree.map(lambda *parts: jnp.stack(parts), *loads)
    logits = tuple(torch.tensor(np.asarray(x @ r)).reshape(-1, E) for r in routers)
    mask = torch.tensor(np.asarray(position) >= 0).long()
    theirs = mixtral.load_balancing_loss_func(logits, E, K, mask)
    assert float(load_balance_loss(load)) == pytest.approx(float(theirs), abs=1e-6)
    # The mask matters: with padding counted it is another number.
    unmasked = mixtral.load_balancing_loss_func(logits, E, K, None)
    assert abs(float(unmasked) - float(theirs)) > 1e-2
    counts = np.asarray(load.assigned) / (np.asarray(position) >= 0).sum()
    assert float(busiest_share(load)) == pytest.approx(counts.max())


def test_loads_of_parts_add_up():
    x, router, position = tokens()

    def load(rows):
        return expert_load(route(x[rows], router, position[rows], num_experts_per_tok=K, norm=True), position[rows])

    whole, parts = load(slice(None)), jax.tree.map(jnp.add, load(slice(0, 1)), load(slice(1, None)))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_extremes_of_the_load():
    """Even over all experts: k and k / E. All on the same k: E and 1. No token at all: 0, not NaN."""
    position = jnp.zeros((1, E), jnp.int32)

    def measure(logits, position=position):
        found = route(logits[None], jnp.eye(E), position, num_experts_per_tok=1, norm=False)
        load = jax.tree.map(lambda leaf: leaf[None], expert_load(found, position))
        return float(load_balance_loss(load)), float(busiest_share(load))

    assert measure(60 * jnp.eye(E)) == pytest.approx((1.0, 1 / E))
    assert measure(60 * jnp.eye(E)[jnp.zeros(E, int)]) == pytest.approx((E, 1.0))
    assert measure(jnp.eye(E), position - 1) == (0.0, 0.0)


def test_ragged_products_become_the_instruction_of_a_tpu():
    """Forward and backward: three products and six of their gradients, none of them over all experts."""
    x, _, position = tokens()
    routing = route(x, tokens()[1], position, num_experts_per_tok=K, norm=True)
    kernels = {"gate_EDF": jnp.ones((E, D, 8)), "up_EDF": jnp.ones((E, D, 8)), "down_EFD": jnp.ones((E, 8, D))}

    def total(x, kernels):
        return jnp.sum(ragged_experts(x, routing.weight, routing.expert, activation=jax.nn.silu, **kernels))

    traced = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).trace(x, kernels)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count('"chlo.ragged_dot"') == 9
    assert "dot_general" not in text
    assert "dot_general" in traced.lower(lowering_platforms=("cpu",)).as_text()  # the search finds what it looks for
