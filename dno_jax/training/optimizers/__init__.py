"""How gradients become updates: one file an optimiser, made of optax's pieces, and the learning rate's schedule."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import optax

from dno_jax.config import OptimizerSection
from dno_jax.training.optimizers.adafactor import adafactor
from dno_jax.training.optimizers.adamw import adamw
from dno_jax.training.optimizers.matrices import Axes
from dno_jax.training.optimizers.muon import muon
from dno_jax.training.optimizers.schedule import learning_rate_schedule
from dno_jax.training.rounding import widened

__all__ = ["learning_rate_schedule", "make_optimizer"]

_KINDS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}


def make_optimizer(section: OptimizerSection, axes: Any = None) -> optax.GradientTransformation:
    """Return the optimiser with a learning rate of 1: the step multiplies its updates by the schedule's value.

    So the compiled step is the same program for every iteration and every number of steps. The state starts anew in
    each iteration, because the objective does. It computes in float32 whatever its parameters and its state are held
    in, and returns float32; who takes a step rounds both as they are held (rounding.stored).

    Args:
        axes: the tree of the trained parameters as tuples of axis names (model.params.param_axes); needed by those
            optimisers that look at matrices.

    Raises:
        ValueError: an optimiser that looks at matrices is given no axes.
    """
    leaves = None if axes is None else tuple(jax.tree.leaves(axes, is_leaf=lambda names: isinstance(names, tuple)))
    return _made(section, leaves)


@lru_cache  # one value per configuration: it is part of the compiled step's identity
def _made(section: OptimizerSection, axes: tuple[Axes, ...] | None) -> optax.GradientTransformation:
    own = _KINDS[section.name](section, axes)
    inner = optax.chain(optax.clip_by_global_norm(section.max_grad_norm), own)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(widened(updates), widened(state), widened(params))

    return optax.GradientTransformation(lambda params: inner.init(widened(params)), update)
