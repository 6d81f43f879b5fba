"""What judges that need the devices share: a stage after sampling, in which each process judges shards of its own.

What such a judge says is a function of its weights and of the pool, so that asking again would give the same answer.
Hence every shard is closed, also one whose pools are left without a verdict.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dno_jax.annotation.shortfall import refuse_shortfall
from dno_jax.config import RunConfig
from dno_jax.data.pools import Pools, survey, tell_quality
from dno_jax.parallel.mesh import barrier, broadcast_from_primary, is_primary, wait_until
from dno_jax.records import Judgement
from dno_jax.run_dir import Manifest, StageDir
from dno_jax.runtime.runtime import Runtime


@runtime_checkable
class JudgeShards(Protocol):
    """Judges and closes shards, this process those of its part of the mesh."""

    def __call__(self, pools: Pools, shards: Sequence[str], *, out: StageDir) -> None: ...


def judge_on_devices(
    runtime: Runtime[RunConfig],
    iteration: int,
    *,
    identity: str,
    inputs: Mapping[str, str],
    judge_shards: JudgeShards,
    figures: Callable[[Iterator[Judgement]], Mapping[str, Any]],
    who: str,
    remedy: str,
) -> Manifest:
    """Judge iteration t's rollouts; closed shards are not judged again.

    Args:
        identity: everything that changes a verdict; what another judge closed is judged anew.
        inputs: what the manifest names beside the samples.
        figures: the manifest's details beside the states, of all judgements.
        who, remedy: complete "pools have no verdict of ..." and "Another call ...", which is said of too many failures.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict.
    """
    start = time.perf_counter()
    run_dir = runtime.run_dir
    stage, sampled = run_dir.stage("annotate", iteration), run_dir.stage("sample", iteration)
    shards = sorted(sampled.require().outputs)  # the manifest's: every process must see the same ones
    inputs = {**stage.reference_of(sampled.manifest_path), **inputs}
    if manifest := stage.finished(inputs, config_digest=runtime.config_digest):
        return manifest
    pools = Pools(sampled, run_dir.prompts_path(iteration))
    if pending := _unfinished(stage, shards, identity=identity):
        judge_shards(pools, pending, out=stage)
        barrier(f"judged {stage.path}")

    def judgements() -> Iterator[Judgement]:
        for shard in shards:
            yield from stage.read_shard(Judgement, shard)

    states: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for row in judgements():
        states[row.state] += 1
        if row.state != "ok":
            reasons[f"{row.state}: {row.detail}"] += 1
    # Every process has counted all judgements, so that all of them stop here, or none.
    refuse_shortfall(
        str(stage.path),
        reasons,
        total=states.total(),
        missing=f"pools have no verdict of {who}",
        remedy=f"Another call {remedy}, or raise annotation.max_failed to go on without these pools",
        max_failed=runtime.config.annotation.max_failed,
    )
    if is_primary():
        found = survey(pools, stage)
        stage.finish(
            config_digest=runtime.config_digest,
            inputs=inputs,
            rows=states.total(),
            dropped=found.dropped,
            seconds=time.perf_counter() - start,
            details={
                "judge": identity,
                "states": dict(states),
                **tell_quality(run_dir, found.quality, runtime.config.annotation, iteration=iteration),
                **figures(judgements()),
            },
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


def _unfinished(stage: StageDir, shards: Sequence[str], *, identity: str) -> list[str]:
    """Shards that are not closed, or were judged by another judge; process 0 says which, for all."""
    closed = set(stage.shard_names()) if is_primary() else set()
    missing = [
        shard not in closed or any(row.judge != identity for row in stage.read_shard(Judgement, shard))
        for shard in shards
    ]
    return [shards[int(index)] for index in np.flatnonzero(broadcast_from_primary(np.asarray(missing, bool)))]
