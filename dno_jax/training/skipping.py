"""A step whose loss or gradient is no number: left out, inside of the compiled step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dno_jax.training.state import TrainState


def keep_if_finite(
    before: TrainState, stepped: TrainState, metrics: dict[str, Float[Array, ""]]
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Return the stepped state, or the one before where the step has no finite loss and gradient; it is counted on.

    `skipped` among the metrics is 1 where that is so.
    """
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, before)
    return kept.replace(step=stepped.step), metrics | {"skipped": 1.0 - finite.astype(jnp.float32)}
