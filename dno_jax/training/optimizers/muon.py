"""Muon: every layer matrix's momentum, orthogonalised; AdamW for embeddings, heads, kernels and vectors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dno_jax.config import OptimizerSection
from dno_jax.training.optimizers.adamw import adamw
from dno_jax.training.optimizers.matrices import Axes, per_matrix

# Sides of what is no map of one space into another: rows of a table, each looked up or scored by itself, and a
# convolution's kernels, each of one channel.
_APART = {"vocab", "labels", "routes", "taps"}
_RMS = 0.2  # of an update's numbers, about AdamW's: learning rates mean the same for both (arXiv 2502.16982)


def muon(section: OptimizerSection, axes: tuple[Axes, ...] | None) -> optax.GradientTransformation:
    """Return optax's Muon for the matrices of layers, and AdamW for what is none."""
    dtype = jnp.dtype(section.moment_dtype)
    other = adamw(section, None)
    whole = optax.contrib.muon(1.0, beta=section.momentum, weight_decay=section.weight_decay, consistent_rms=_RMS)

    def init(params: Any) -> Any:
        def held(leaf: Any) -> Any:
            return leaf.astype(dtype) if leaf.shape == params.shape else leaf

        return jax.tree.map(held, whole.init(params))

    matrix = optax.GradientTransformation(init, whole.update)

    def of(names: Axes, sides: int) -> optax.GradientTransformation:
        return matrix if sides == 2 and not _APART.intersection(names) else other

    return per_matrix(of, axes, name=section.name)
