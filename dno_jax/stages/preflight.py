"""Checks before a run starts that everything fits together."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from dno_jax.annotation.build import build_annotator
from dno_jax.annotation.quality.calibration import read_calibration
from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.data.sources import named
from dno_jax.errors import DnoError
from dno_jax.parallel.cluster import barrier, described, is_primary
from dno_jax.parallel.sharding import DECODE, TRAIN
from dno_jax.runtime.capacity import known_capacity
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.slots import plan, wanted_by_stage
from dno_jax.runtime.training_memory import refuse_training
from dno_jax.stages import checkpoints, disk, redo, template
from dno_jax.stages.judge_on_devices import policy as policy_judge
from dno_jax.stages.judge_on_devices import reward_model


@contextmanager
def prepared(
    runtime: Runtime[RunConfig], *, only: tuple[str, int] | None = None, redo_from: str | None = None
) -> Iterator[None]:
    """Check everything that can be checked before work is paid for; hold and open the run directory, import policy 0.

    Process 0 holds it for all, until the work inside is done.

    Args:
        only: the one stage and iteration that will be run, which are all that is then looked at; None is the whole
            run.
        redo_from: "STAGE" or "STAGE:ITERATION", from which work is redone, with earlier results set aside.
    """
    config, run_dir = runtime.config, runtime.run_dir
    place = None if redo_from is None else redo.parse_place(redo_from, config)
    if is_primary():
        say(described(runtime.mesh))
    check(runtime, only=only)
    with run_dir.held() if is_primary() else nullcontext():
        if is_primary():
            if place is not None:
                redo.set_aside(run_dir, *place)
            redo.check(config, run_dir)
            run_dir.create(config)
        barrier("config")
        disk.refuse_apart(run_dir)
        if is_primary() and only is None:
            template.save_template(runtime)
        checkpoints.import_initial(runtime)
        yield


def check(runtime: Runtime[RunConfig], *, only: tuple[str, int] | None = None) -> None:
    """Raise now what would otherwise be raised after hours: model, mesh, prompts, slots, template, judge.

    Raises:
        DnoError: naming what does not fit.
    """
    config, stage = runtime.config, None if only is None else only[0]
    runtime.programs.param_shardings(TRAIN)
    if stage in (None, "train"):
        refuse_training(runtime.programs, known_capacity(runtime.mesh.local_devices))
    if stage in (None, "sample", "evaluate"):
        runtime.programs.param_shardings(DECODE)
        template.refuse_template(runtime)
        _check_prompts(runtime, only=only)
    if stage in (None, "annotate"):
        if config.annotation.kind == "self":
            policy_judge.check(runtime)
        if config.annotation.kind == "reward_model":
            reward_model.check(runtime)
    if is_primary() and stage is None:
        disk.check(runtime)
    if is_primary() and stage in (None, "evaluate"):
        _check_judges(config)


def _check_prompts(runtime: Runtime[RunConfig], *, only: tuple[str, int] | None) -> None:
    """Read and tokenise the prompts, say what is dropped, and see that as many rows as are wanted fit."""
    config, prompts = runtime.config, runtime.prompts
    split = prompts.split
    for line in split.lines if is_primary() else ():
        say(line)
    parts = [*split.training, split.held_out]
    if only is not None:
        parts = [split.training[only[1]] if only[0] == "sample" else split.held_out]
    for part in {id(part): part for part in parts}.values():  # iterations may share theirs
        found = prompts.tokenized(part)
        reasons = ", ".join(f"{count} x {reason}" for reason, count in found.dropped.most_common())
        if part and not found.kept:
            raise DnoError(f"{named(config.prompts.path)}: all {len(part)} prompts of a part are dropped: {reasons}")
        if reasons and is_primary():
            say(f"of {len(part)} prompts some are dropped: {reasons}")
    largest, held_out = max(map(len, split.training)), len(split.held_out)
    for stage, wanted in wanted_by_stage(config, num_prompts=largest, num_held_out=held_out).items():
        if only is None or only[0] == stage:
            plan(runtime, wanted)


def _check_judges(config: RunConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:  # the run's own store is opened with the run directory
        store = os.path.join(folder, "annotations.sqlite")
        for section in (config.annotation, config.evaluation_judge):
            if section.quality.calibration:
                read_calibration(section.quality.calibration, limit=1, seed=0)
            if not section.on_devices:
                asyncio.run(build_annotator(section, store_path=store, seed=config.seed).close())
