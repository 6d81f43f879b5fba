"""Adafactor: second moments by row and column of each matrix, no first moment (arXiv 1804.04235)."""

from __future__ import annotations

import optax

from dno_jax.config import OptimizerSection
from dno_jax.training.optimizers.matrices import Axes, per_matrix


def adafactor(section: OptimizerSection, axes: tuple[Axes, ...] | None) -> optax.GradientTransformation:
    """Return optax's Adafactor, which factors, clips and scales every matrix of every layer by itself."""
    inner = optax.adafactor(
        learning_rate=1.0,
        min_dim_size_to_factor=section.min_factored,
        decay_rate=section.decay_rate,
        multiply_by_parameter_scale=section.relative_rate,
        clipping_threshold=section.max_update_rms,
        weight_decay_rate=section.weight_decay or None,
    )
    return per_matrix(inner, axes, name=section.name)
