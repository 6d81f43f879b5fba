"""The training step for a model of one's own: log-probabilities go in, and nothing of ours is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dno_jax.training.accumulation import accumulated
from dno_jax.training.rounding import widened

# (parameters, batch) -> log pi(y|x) of every text [P, C], nats
ApplyLogprobs = Callable[[Any, Any], Float[Array, "P C"]]
# (log-probabilities [P, C], batch) -> the loss of every pair [P], and figures of every pair by name
PairLoss = Callable[[Float[Array, "P C"], Any], tuple[Float[Array, " P"], dict[str, Float[Array, " P"]]]]
Step = Callable[[Any, Any, Any], tuple[Any, Any, dict[str, Float[Array, ""]]]]


def make_train_step(
    apply_logprobs: ApplyLogprobs,
    tx: optax.GradientTransformation,
    loss: PairLoss,
    mesh: Mesh | None = None,
    *,
    rows: tuple[str, ...] | None = None,
    parts: int = 1,
) -> Step:
    """Return step(params, opt_state, batch) -> (params, opt_state, figures), compiled at its first call.

    What is minimised is the mean of `loss` over the batch's pairs; where the batch has a "weight" [P], the mean by it.
    Figures are such means of what `loss` returns besides, with `loss` and `grad_norm`. Parameters and the optimiser's
    state are donated; they lie where they lay. Reference log-probabilities are numbers of the batch.

    Args:
        apply_logprobs: differentiable in its first argument.
        tx: with its own learning rate.
        loss: one of `dno_jax.losses`, with the batch's columns put in.
        mesh: of Auto axes, over which pairs are split; None leaves the batch where it lies.
        rows: axes of the mesh that pairs are split over; None is its first.
        parts: micro-batches; they divide P. Each takes pairs from every device.

    Raises:
        ValueError: from the step, if `parts` does not divide the batch's pairs.
    """
    split = None if mesh is None else (mesh.axis_names[:1] if rows is None else rows)

    def placed(leaf: Array) -> Array:
        if mesh is None:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(None, split)))

    def parted(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if leaf.shape[0] % parts:
            raise ValueError(f"{parts} micro-batches do not divide {leaf.shape[0]} pairs; choose a divisor")
        return placed(jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0))

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, dict[str, Float[Array, ""]]]:
        weights = batch.get("weight") if isinstance(batch, dict) else getattr(batch, "weight", None)
        count = jax.tree.leaves(batch)[0].shape[0]
        total = jnp.float32(count) if weights is None else jnp.maximum(jnp.sum(jnp.asarray(weights)), 1e-9)

        def weighted(params: Any, part: tuple[Any, Array]) -> tuple[Array, dict[str, Array]]:
            own, weight = part
            value, figures = loss(apply_logprobs(params, own), own)
            summed = {name: jnp.sum(weight * one) / total for name, one in {"loss": value, **figures}.items()}
            return summed["loss"], jax.lax.stop_gradient(summed)

        weight = jnp.ones(count, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
        gradient = jax.grad(weighted, has_aux=True)
        micro = jax.tree.map(parted, (batch, weight))
        grads, figures = accumulated(lambda part: widened(gradient(params, part)), micro)
        figures = jax.tree.map(lambda values: jnp.sum(values, axis=0), figures)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, figures | {"grad_norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=(0, 1))
