"""Mixture of experts: which experts a token goes to, what they make of it, and how even the load is.

Exact: every token gets all the experts that its router chose, however uneven that is; there is no capacity and nothing
is dropped, so a log-probability does not depend on the other tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dno_jax.logprobs import einsum_float32
from dno_jax.model.layers import AnyArray, precision_for


@flax.struct.dataclass
class Routing:
    """Where each token goes. Padding goes nowhere: its experts are E, one past the last, and its probabilities 0."""

    weight: Any  # [B, T, k] float32, what each chosen expert's answer is multiplied by
    expert: Any  # [B, T, k] int32, likeliest first
    probability: Any  # [B, T, E] float32, the router's softmax


@flax.struct.dataclass
class ExpertLoad:
    """Sums over the tokens of a batch, padding left out; loads of parts of a batch add up to the load of the whole."""

    assigned: Any  # [..., E] float32, tokens sent to each expert
    probability: Any  # [..., E] float32, sum of the router's probabilities
    num_tokens: Any  # [...] float32


@runtime_checkable
class Experts(Protocol):
    """Runs every token through its experts and adds up what they answer."""

    def __call__(
        self,
        x_BTD: Any,
        weight_BTk: Any,
        expert_BTk: Any,
        *,
        gate_EDF: Any,
        up_EDF: Any,
        down_EFD: Any,
        activation: Callable[[Any], Any],
    ) -> Any:
        """Return sum over k of weight * down(activation(gate(x)) * up(x)), [B, T, D] in the dtype of x.

        Args:
            x_BTD: tokens.
            weight_BTk: float32.
            expert_BTk: int32; an id outside 0 .. E - 1 is an expert that is not here and adds nothing.
            gate_EDF, up_EDF, down_EFD: the experts' matrices in the dtype of x.
        """
        ...


def route(
    x_BTD: Float[Array, "B T D"],
    router_DE: Float[AnyArray, "D E"],
    position_BT: Int[Array, "B T"],
    *,
    num_experts_per_tok: int,
    norm: bool,
) -> Routing:
    """Choose the k likeliest experts of each token by a softmax over all of them.

    Logits are multiplied in the dtype of x and stay float32 from there on: rounded to bfloat16 they would tie, and a
    tie decides between experts.

    Args:
        position_BT: int32; -1 is padding.
        norm: the k weights of a token are divided by their sum.
    """
    logits = einsum_float32("btd,de->bte", x_BTD, jnp.asarray(router_DE).astype(x_BTD.dtype))
    probability = jax.nn.softmax(logits, axis=-1)
    weight, expert = jax.lax.top_k(probability, num_experts_per_tok)
    if norm:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    real = position_BT[..., None] >= 0
    return Routing(
        weight=weight,
        expert=jnp.where(real, expert, router_DE.shape[1]),
        probability=jnp.where(real, probability, 0.0),
    )


def dense_experts(
    x_BTD: Float[Array, "B T D"],
    weight_BTk: Float[Array, "B T k"],
    expert_BTk: Int[Array, "B T k"],
    *,
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    activation: Callable[[Any], Any],
) -> Float[Array, "B T D"]:
    """The `Experts` that runs everywhere: one expert after the other sees every token, and most answers weigh 0.

    E / k times the work that is needed. The backward pass computes each expert again, so that one expert's activations
    are all that is ever held.
    """
    dtype, E = x_BTD.dtype, gate_EDF.shape[0]
    chosen = expert_BTk[..., None] == jnp.arange(E, dtype=expert_BTk.dtype)[None, None, None]
    weight_EBT = jnp.moveaxis(jnp.sum(jnp.where(chosen, weight_BTk[..., None], 0.0), axis=2), -1, 0)

    @jax.checkpoint
    def add(total: Any, expert: Any) -> tuple[Any, None]:
        gate, up, down, weight = expert
        hidden = activation(_matmul(x_BTD, gate)) * _matmul(x_BTD, up)
        return total + weight[..., None] * einsum_float32("btf,fd->btd", hidden, down), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x_BTD, jnp.float32), (gate_EDF, up_EDF, down_EFD, weight_EBT))
    return total.astype(dtype)


def _matmul(x: Any, kernel: Any) -> Any:
    return jnp.einsum("btd,df->btf", x, kernel, precision=precision_for(x.dtype))


def ragged_experts(
    x_BTD: Float[Array, "B T D"],
    weight_BTk: Float[Array, "B T k"],
    expert_BTk: Int[Array, "B T k"],
    *,
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    activation: Callable[[Any], Any],
) -> Float[Array, "B T D"]:
    """The `Experts` of platforms whose `jax.lax.ragged_dot` skips what is not there: tokens sorted by expert.

    Tokens of experts that are not here stand behind all others, where no group reaches; ragged_dot may leave anything
    there, so those rows are set to 0 going in and coming out, which does the same to their gradients.
    """
    B, T, D = x_BTD.shape
    E, k = gate_EDF.shape[0], expert_BTk.shape[-1]
    expert = expert_BTk.reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < E), expert, E)
    order = jnp.argsort(expert)
    group_sizes = jnp.bincount(expert, length=E + 1)[:E].astype(jnp.int32)
    here = (jnp.arange(expert.size) < jnp.sum(group_sizes))[:, None]

    def dot(x: Any, kernel: Any, dtype: Any) -> Any:
        return jax.lax.ragged_dot(
            x, kernel, group_sizes, precision=precision_for(x.dtype), preferred_element_type=dtype
        )

    x = jnp.where(here, x_BTD.reshape(-1, D)[order // k], 0)
    hidden = activation(dot(x, gate_EDF, x.dtype)) * dot(x, up_EDF, x.dtype)
    y = jnp.where(here, dot(hidden, down_EFD, jnp.float32), 0.0)
    # Back by a gather of the inverse permutation: a sum in the order of k, the same on every run.
    y = y[jnp.argsort(order)].reshape(B, T, k, D)
    return jnp.sum(weight_BTk[..., None] * y, axis=2).astype(x_BTD.dtype)


def expert_load(routing: Routing, position_BT: Int[Array, "B T"]) -> ExpertLoad:
    """Count what a routing sends where."""
    E = routing.probability.shape[-1]
    chosen = routing.expert[..., None] == jnp.arange(E, dtype=routing.expert.dtype)[None, None, None]
    return ExpertLoad(
        assigned=jnp.sum(chosen.astype(jnp.float32), axis=(0, 1, 2)),
        probability=jnp.sum(routing.probability, axis=(0, 1)),
        num_tokens=jnp.sum((position_BT >= 0).astype(jnp.float32)),
    )


def load_balance_loss(load: ExpertLoad) -> Float[Array, ""]:
    """Return E * sum over experts of (share of tokens sent there) * (mean probability): k when even, E at worst.

    Switch Transformer (arXiv 2101.03961), equations 4 to 6, in the form of transformers' load_balancing_loss_func: the
    tokens of all layers are one batch, and the shares of a token's k experts add up to k.

    Args:
        load: of all layers, leading axis L.
    """
    tokens = jnp.maximum(jnp.sum(load.num_tokens), 1.0)
    share = jnp.sum(load.assigned, axis=0) / tokens
    return load.assigned.shape[-1] * jnp.sum(share * jnp.sum(load.probability, axis=0) / tokens)


def busiest_share(load: ExpertLoad) -> Float[Array, ""]:
    """Return the share of a layer's tokens that the busiest expert of all layers gets: k / E when even, 1 at worst."""
    return jnp.max(load.assigned / jnp.maximum(load.num_tokens, 1.0)[..., None])
