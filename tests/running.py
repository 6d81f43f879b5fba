"""Single stages of a run, as the command line runs them: each call makes a runtime of its own."""

from __future__ import annotations

from typing import Any

from dno_jax import iteration
from dno_jax.config import RunConfig
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stage_dir import Manifest
from dno_jax.stages import annotate, checkpoints, overlap, pair, preflight, teach

_HOST = (annotate, pair, teach)


def prepare(config: RunConfig) -> None:
    """Do what comes before any work, and let go of the run directory."""
    with preflight.prepared(Runtime.start(config)):
        pass


def run_stage(stage: Any, config: RunConfig, t: int, **options: Any) -> Manifest:
    if stage in _HOST:
        return stage.run(config, RunDir(config.run_dir), t, **options)
    return stage.run(Runtime.start(config), t, **options)


def run_iteration(config: RunConfig, t: int) -> None:
    iteration.run_iteration(Runtime.start(config), t)


def sample_and_annotate(config: RunConfig, t: int) -> None:
    overlap.sample_and_annotate(Runtime.start(config), t)


def export(config: RunConfig, **options: Any) -> None:
    checkpoints.export(Runtime.start(config), **options)
