"""Looks before the run leaps: does everything fit together?"""

from __future__ import annotations

import asyncio
import os
import tempfile

from dno_jax.annotation.build import build_annotator
from dno_jax.annotation.quality.calibration import read_calibration
from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.data.prompts import split_prompts, tokenize_prompts
from dno_jax.errors import DnoError
from dno_jax.parallel.mesh import is_primary
from dno_jax.parallel.sharding import DECODE, TRAIN
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.slots import plan, wanted_by_stage
from dno_jax.stages.judge_on_devices import policy as self_judge
from dno_jax.stages.judge_on_devices import reward_model
from dno_jax.stages.template import refuse_template


def check(config: RunConfig) -> Runtime[RunConfig]:
    """Raise now what would otherwise be raised after hours: model, mesh, prompts, slots, template, judge.

    Raises:
        DnoError: naming what does not fit.
    """
    runtime = Runtime.start(config)
    runtime.param_shardings(TRAIN)
    runtime.param_shardings(DECODE)
    split = split_prompts(config)
    refuse_template(runtime)
    for part in {*split.training, split.held_out}:
        kept, dropped = tokenize_prompts(part, tokenizer=runtime.tokenizer, config=config)
        reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
        if part and not kept:
            raise DnoError(f"{config.prompts.path}: all {len(part)} prompts of a part are dropped: {reasons}")
        if reasons and is_primary():
            say(f"of {len(part)} prompts some are dropped: {reasons}")
    sampled = wanted_by_stage(config, num_prompts=max(map(len, split.training)), num_held_out=len(split.held_out))
    for wanted in sampled.values():
        plan(runtime, wanted)
    if config.annotation.kind == "self":
        self_judge.check(config)
    if config.annotation.kind == "reward_model":
        reward_model.check(config)
    if is_primary():
        with tempfile.TemporaryDirectory() as folder:  # the run's own store is opened with the run directory
            store = os.path.join(folder, "annotations.sqlite")
            for section in (config.annotation, config.evaluation_judge):
                if section.judges and section.quality.calibration:
                    read_calibration(section.quality.calibration, limit=1, seed=0)
                if not section.on_devices:
                    asyncio.run(build_annotator(section, store_path=store, seed=config.seed).close())
    return runtime
