"""The loop: T iterations from a checkpoint to a better checkpoint; as it stands, Algorithm 2 (DNO-Prct).

Every stage reads files and leaves files; this module only says in which order, what overlaps, and on which process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from dno_jax.config import RunConfig
from dno_jax.parallel.mesh import barrier, is_primary, wait_until
from dno_jax.run_dir import Manifest, RunDir, is_lookahead
from dno_jax.stages import (
    annotate,
    evaluate,
    inspect,
    pair,
    policies,
    reward_model,
    sample,
    score,
    self_judge,
    teach,
    template,
    train,
)
from dno_jax.stages.scheme import updates


@dataclass(frozen=True)
class RunResult:
    best: int  # index of the best policy on held-out prompts
    export: str  # its Hugging Face checkpoint


def run(config: RunConfig) -> RunResult:
    """Run, or go on with, everything the configuration asks for; return the best policy's checkpoint (line 9)."""
    prepare(config)
    for iteration in range(config.iterations):
        run_iteration(config, iteration)
    run_dir = RunDir(config.run_dir)
    best = int(run_dir.stage("evaluate", config.iterations - 1).require().details["best"])
    if not run_dir.export_path.exists():
        policies.export(config, policy=best, path=str(run_dir.export_path))
    if config.outer.scheme == "average" and not (run_dir.export_average_path / "mixture.json").exists():
        policies.export_pool(config, path=str(run_dir.export_average_path))
    return RunResult(best=best, export=str(run_dir.export_path))


def prepare(config: RunConfig) -> None:
    """Check everything that can be checked before work is paid for, open the run directory, import policy 0."""
    runtime = inspect.check(config)
    if is_primary():
        RunDir(config.run_dir).open(config)
    barrier("config")
    if is_primary():
        template.save_template(runtime)
    policies.import_initial(config)


def run_iteration(config: RunConfig, iteration: int) -> None:
    """Take policy t to policy t+1, and say how good it is."""
    if not is_lookahead(config, iteration):
        if config.annotation.teacher is not None:
            host_stage(teach.run, "teach", config, iteration)
        sample_and_annotate(config, iteration)
    host_stage(pair.run, "pair", config, iteration)
    for update in updates(config, iteration):
        score.run(config, iteration, stage_name=update.score)
        train.run(config, iteration, stage_name=update.train)
    evaluate.run(config, iteration)


def sample_and_annotate(config: RunConfig, iteration: int) -> None:
    """Sample on every device while process 0 annotates the shards that are closed already."""
    if config.annotation.on_devices:  # when the sampler has let go of them
        sample.run(config, iteration)
        judge = self_judge if config.annotation.kind == "self" else reward_model
        judge.run(config, iteration)
        return
    if not is_primary() or config.annotation.apart:
        sample.run(config, iteration)
        wait_until(RunDir(config.run_dir).stage("annotate", iteration).manifest_path.exists)
        return
    failed = threading.Event()
    errors: list[BaseException] = []

    def annotate_beside() -> None:
        try:
            annotate.run(config, iteration, abandoned=failed.is_set)
        except BaseException as error:  # handed to the main thread, which raises it
            errors.append(error)

    thread = threading.Thread(target=annotate_beside, name="annotate", daemon=True)
    thread.start()
    try:
        sample.run(config, iteration)
    except BaseException:
        failed.set()
        thread.join()
        raise
    thread.join()
    if errors:
        raise errors[0]


def host_stage(stage: Callable[[RunConfig, int], Manifest], name: str, config: RunConfig, iteration: int) -> None:
    """Run a stage that needs no device on process 0, while the others poll for its manifest."""
    if is_primary():
        stage(config, iteration)
    wait_until(RunDir(config.run_dir).stage(name, iteration).manifest_path.exists)
