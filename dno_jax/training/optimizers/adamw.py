"""AdamW: two moments a parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dno_jax.config import OptimizerSection
from dno_jax.training.optimizers.matrices import Axes


def adamw(section: OptimizerSection, axes: tuple[Axes, ...] | None) -> optax.GradientTransformation:
    """Return optax's AdamW with moments that are held in `moment_dtype`; it looks at numbers alone."""
    del axes
    inner = optax.adamw(1.0, b1=section.b1, b2=section.b2, eps=section.eps, weight_decay=section.weight_decay)
    dtype = jnp.dtype(section.moment_dtype)

    def init(params: Any) -> Any:
        state = inner.init(params)
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, state)

    return optax.GradientTransformation(init, inner.update)
