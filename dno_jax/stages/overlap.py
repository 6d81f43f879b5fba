"""Sampling on every device while process 0 annotates the shards that are closed already."""

from __future__ import annotations

import threading

from dno_jax.annotation.transport.routes import Unreachable
from dno_jax.config import RunConfig
from dno_jax.console import Reminder, say
from dno_jax.parallel.cluster import is_primary, wait_until
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import annotate, sample
from dno_jax.stages.judge_on_devices import policy as policy_judge
from dno_jax.stages.judge_on_devices import reward_model

_OUTAGE_SECONDS = 60.0  # between calls of a judge that does not answer, while there is sampling to be done


def sample_and_annotate(runtime: Runtime[RunConfig], iteration: int) -> None:
    """Draw and judge iteration t's candidates; side by side where the judge needs no device."""
    config, run_dir = runtime.config, runtime.run_dir
    if config.annotation.on_devices:  # when the sampler has let go of them
        sample.run(runtime, iteration)
        judge = policy_judge if config.annotation.kind == "self" else reward_model
        judge.run(runtime, iteration)
        return
    if not is_primary() or config.annotation.apart:
        sample.run(runtime, iteration)
        wait_for_annotation(runtime, iteration)
        return
    annotate.probe(config, run_dir, iteration)
    # Not by Thread.join, which takes a thread for ended when it is interrupted itself (before Python 3.13).
    sampled, stopped, ended = threading.Event(), threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def annotate_beside() -> None:
        while True:
            try:
                annotate.run(config, run_dir, iteration, abandoned=stopped.is_set)
            except BaseException as error:
                if isinstance(error, Unreachable) and not sampled.is_set() and not stopped.is_set():
                    say(f"{error}; sampling continues, and the judge is asked again in {_OUTAGE_SECONDS:g} s")
                    sampled.wait(_OUTAGE_SECONDS)
                    continue
                errors.append(error)  # handed to the main thread, which raises it
                if not sampled.is_set() and not stopped.is_set():
                    say(f"annotation has failed, and sampling stops when it has closed a shard: {error}")
            ended.set()
            return

    def stop_with_annotation() -> None:
        if errors:
            raise errors[0]

    threading.Thread(target=annotate_beside, name="annotate", daemon=True).start()
    try:
        sample.run(runtime, iteration, after_shard=stop_with_annotation)
        sampled.set()
        ended.wait()
    except BaseException:
        stopped.set()
        sampled.set()
        if not ended.is_set():
            say("stopping when the verdicts in flight are there and stored; interrupt again to give them up")
        ended.wait()
        raise
    stop_with_annotation()


def wait_for_annotation(runtime: Runtime[RunConfig], iteration: int) -> None:
    """Poll for the verdicts of another process, or machine, and say now and then what is waited for.

    Raises:
        DnoError: they are another configuration's, or of other samples.
    """
    config, run_dir = runtime.config, runtime.run_dir
    stage, shards = run_dir.stage("annotate", iteration), len(run_dir.stage("sample", iteration).require().outputs)
    remind = Reminder()

    def is_finished() -> bool:
        if stage.manifest_path.exists():
            return annotate.finished(config, run_dir, iteration) is not None
        if is_primary():
            remind(
                f"annotate  {iteration}: {len(stage.shard_names())} of {shards} shards are judged; waiting for "
                f"{stage.manifest_path}, which `dno annotate CONFIG --iteration {iteration}` writes, on any machine "
                "(start it again where it has stopped)"
            )
        return False

    wait_until(is_finished)
