"""Single stages of a run, as the command line runs them: each call makes a runtime of its own."""

from __future__ import annotations

from typing import Any

from dno_jax import iteration
from dno_jax.config import RunConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.parallel.mesh import abstract_mesh
from dno_jax.report.kept import Kept
from dno_jax.run_dir import RunDir
from dno_jax.runtime.programs import Programs
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
    iteration.run_iteration(Runtime.start(config), t, Kept())


def sample_and_annotate(config: RunConfig, t: int) -> None:
    overlap.sample_and_annotate(Runtime.start(config), t)


def idle_runtime(config: RunConfig) -> Runtime[RunConfig]:
    """A runtime without checkpoint or devices, for work that asks for neither."""
    shape = ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    programs = Programs(config, shape, abstract_mesh(config.mesh, 1))
    return Runtime(programs, RunDir(config.run_dir), ChatTokenizer.__new__(ChatTokenizer))


def export(config: RunConfig, **options: Any) -> None:
    checkpoints.export(Runtime.start(config), **options)
