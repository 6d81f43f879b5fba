"""The learning rate of every step: warm-up and a schedule, optax's."""

from __future__ import annotations

import optax

from dno_jax.config import OptimizerSection


def learning_rate_schedule(section: OptimizerSection, *, num_steps: int, iteration: int = 0) -> optax.Schedule:
    """Return step -> learning rate: linear warm-up over warmup_ratio of the steps, then the schedule.

    That is constant, or linear or cosine to 0.

    Args:
        num_steps: optimiser steps of this iteration.
        iteration: the peak is learning_rate * learning_rate_decay^iteration.
    """
    peak = section.learning_rate * section.learning_rate_decay**iteration
    warmup = round(section.warmup_ratio * num_steps)
    rest = max(num_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[section.schedule]
    if not warmup:
        return after
    # The first step already moves: step i of the warm-up has (i + 1) / warmup of the peak.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), after], [warmup])
