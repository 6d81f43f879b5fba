"""The loop: T iterations from a checkpoint to a better checkpoint; as it stands, Algorithm 2 (DNO-Prct).

Every stage reads files and leaves files; this module only says in which order, what overlaps, and on which process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from dno_jax.annotation.transport.routes import Unreachable
from dno_jax.config import RunConfig
from dno_jax.console import Reminder, say
from dno_jax.parallel.mesh import barrier, is_primary, wait_until
from dno_jax.report.page import write_report
from dno_jax.run_dir import Manifest, RunDir, is_lookahead
from dno_jax.runtime.scheme import updates
from dno_jax.stages import annotate, checkpoints, evaluate, pair, preflight, sample, score, teach, template, train
from dno_jax.stages.judge_on_devices import policy as self_judge
from dno_jax.stages.judge_on_devices import reward_model

_OUTAGE_SECONDS = 60.0  # between calls of a judge that does not answer, while there is sampling to be done


@dataclass(frozen=True)
class RunResult:
    best: int  # index of the best policy on held-out prompts
    export: str  # its Hugging Face checkpoint


def run(config: RunConfig) -> RunResult:
    """Run, or go on with, everything the configuration asks for; return the best policy's checkpoint (line 9)."""
    with prepared(config):
        for iteration in range(config.iterations):
            run_iteration(config, iteration)
        run_dir = RunDir(config.run_dir)
        best = int(run_dir.stage("evaluate", config.iterations - 1).require().details["best"])
        if not run_dir.export_path.exists():
            checkpoints.export(config, policy=best, path=str(run_dir.export_path))
        if config.outer.scheme == "average" and not (run_dir.export_average_path / "mixture.json").exists():
            checkpoints.export_pool(config, path=str(run_dir.export_average_path))
        return RunResult(best=best, export=str(run_dir.export_path))


@contextmanager
def prepared(config: RunConfig) -> Iterator[None]:
    """Check everything that can be checked before work is paid for; hold and open the run directory, import policy 0.

    Process 0 holds it for all, until the work inside is done.
    """
    runtime = preflight.check(config)
    run_dir = RunDir(config.run_dir)
    with run_dir.held() if is_primary() else nullcontext():
        if is_primary():
            run_dir.open(config)
        barrier("config")
        if is_primary():
            template.save_template(runtime)
        checkpoints.import_initial(config)
        yield


def prepare(config: RunConfig) -> None:
    """Do what comes before any work, and let go of the run directory."""
    with prepared(config):
        pass


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
    if is_primary():
        write_report(RunDir(config.run_dir), config)


def sample_and_annotate(config: RunConfig, iteration: int) -> None:
    """Sample on every device while process 0 annotates the shards that are closed already."""
    if config.annotation.on_devices:  # when the sampler has let go of them
        sample.run(config, iteration)
        judge = self_judge if config.annotation.kind == "self" else reward_model
        judge.run(config, iteration)
        return
    if not is_primary() or config.annotation.apart:
        sample.run(config, iteration)
        wait_for_annotation(config, iteration)
        return
    annotate.probe(config, iteration)
    sampled, stopped = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def annotate_beside() -> None:
        while True:
            try:
                annotate.run(config, iteration, abandoned=stopped.is_set)
            except BaseException as error:
                if isinstance(error, Unreachable) and not sampled.is_set() and not stopped.is_set():
                    say(f"{error}; sampling goes on, and the judge is asked again in {_OUTAGE_SECONDS:g} s")
                    sampled.wait(_OUTAGE_SECONDS)
                    continue
                errors.append(error)  # handed to the main thread, which raises it
                if not sampled.is_set() and not stopped.is_set():
                    say(f"annotation has failed, and sampling stops when it has closed a shard: {error}")
            return

    def stop_with_annotation() -> None:
        if errors:
            raise errors[0]

    thread = threading.Thread(target=annotate_beside, name="annotate", daemon=True)
    thread.start()
    try:
        sample.run(config, iteration, after_shard=stop_with_annotation)
        sampled.set()
        thread.join()
    except BaseException:
        stopped.set()
        sampled.set()
        if thread.is_alive():
            say("stopping when the verdicts in flight are there and stored; interrupt again to give them up")
        thread.join()
        raise
    stop_with_annotation()


def wait_for_annotation(config: RunConfig, iteration: int) -> None:
    """Poll for the verdicts of another process, or machine, and say now and then what is waited for.

    Raises:
        DnoError: they are another configuration's, or of other samples.
    """
    run_dir = RunDir(config.run_dir)
    stage, shards = run_dir.stage("annotate", iteration), len(run_dir.stage("sample", iteration).require().outputs)
    remind = Reminder()

    def is_finished() -> bool:
        if stage.manifest_path.exists():
            return annotate.finished(config, iteration) is not None
        if is_primary():
            remind(
                f"annotate  {iteration}: {len(stage.shard_names())} of {shards} shards are judged; waiting for "
                f"{stage.manifest_path}, which `dno annotate CONFIG --iteration {iteration}` writes, on any machine "
                "(start it again where it has stopped)"
            )
        return False

    wait_until(is_finished)


def host_stage(stage: Callable[[RunConfig, int], Manifest], name: str, config: RunConfig, iteration: int) -> None:
    """Run a stage that needs no device on process 0, while the others poll for its manifest."""
    if is_primary():
        stage(config, iteration)
    wait_until(RunDir(config.run_dir).stage(name, iteration).manifest_path.exists)
