"""The loop: T iterations from a checkpoint to a better checkpoint; as it stands, Algorithm 2 (DNO-Prct).

Every stage reads files and leaves files; this module only says in which order, and on which process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.parallel.cluster import is_primary, wait_until
from dno_jax.report.kept import Kept
from dno_jax.report.page import refresh
from dno_jax.report.status import standing
from dno_jax.report.training import note_shares
from dno_jax.runtime.runtime import Runtime
from dno_jax.stage_dir import Manifest, is_lookahead
from dno_jax.stages import checkpoints, evaluate, pair, pruning, score, teach, train
from dno_jax.stages.overlap import sample_and_annotate
from dno_jax.stages.preflight import prepared


@dataclass(frozen=True)
class RunResult:
    best: int  # index of the best policy on held-out prompts
    export: str  # its Hugging Face checkpoint


def run(config: RunConfig, *, redo_from: str | None = None) -> RunResult:
    """Run, or resume, everything the configuration asks for; return the best policy's checkpoint (line 9).

    Args:
        redo_from: "STAGE" or "STAGE:ITERATION", from which work is redone, with earlier results set aside.
    """
    runtime = Runtime.start(config)
    run_dir, kept = runtime.run_dir, Kept()
    with prepared(runtime, redo_from=redo_from):
        for iteration in range(config.iterations):
            run_iteration(runtime, iteration, kept)
        best = pruning.best_kept(run_dir, config.iterations - 1)
        checkpoints.export_best(runtime, policy=best)
        if config.outer.scheme == "average":
            checkpoints.export_pool(runtime, path=os.fspath(run_dir.export_average_path))
        _report(runtime, kept, pictures=True)
        return RunResult(best=best, export=os.fspath(run_dir.export_path))


def run_iteration(runtime: Runtime[RunConfig], iteration: int, kept: Kept) -> None:
    """Take policy t to policy t+1, and say how good it is.

    Args:
        kept: what the run's reports are made of.
    """
    config, run_dir = runtime.config, runtime.run_dir
    if not is_lookahead(config, iteration):
        if config.annotation.teacher is not None:
            split = runtime.prompts.split
            _on_primary(runtime, "teach", iteration, lambda: teach.run(config, run_dir, iteration, split=split))
        sample_and_annotate(runtime, iteration)
        _report(runtime, kept)
    _on_primary(runtime, "pair", iteration, lambda: pair.run(config, run_dir, iteration))
    score.run(runtime, iteration)
    train.run(runtime, iteration)
    _report(runtime, kept)
    evaluate.run(runtime, iteration)
    if is_primary():
        note_shares(run_dir, config, iteration)
        pruning.prune(config, run_dir, iteration)
        if reached := standing(run_dir, iteration):
            say(reached)
    _report(runtime, kept)


def _report(runtime: Runtime[RunConfig], kept: Kept, *, pictures: bool = False) -> None:
    if is_primary():
        held_out = runtime.prompts.split.held_out
        refresh(runtime.run_dir, runtime.config, pictures=pictures, held_out=held_out, kept=kept)


def _on_primary(runtime: Runtime[RunConfig], name: str, iteration: int, stage: Callable[[], Manifest]) -> None:
    """Run a stage that needs no device on process 0, while the others poll for its manifest."""
    if is_primary():
        stage()
    wait_until(runtime.run_dir.stage(name, iteration).manifest_path.exists)
