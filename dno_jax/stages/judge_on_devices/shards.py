"""What judges that need the devices share: a stage after sampling, in which each process judges shards of its own.

What such a judge says is a function of its weights and of the pool, so that asking again would give the same answer.
Hence every shard is closed, also one whose pools are left without a verdict.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dno_jax.annotation.shortfall import refuse_shortfall
from dno_jax.config import RunConfig
from dno_jax.data.pools import Pools, PoolShard, Survey
from dno_jax.parallel.cluster import barrier, broadcast_from_primary, is_primary, wait_until
from dno_jax.records import Judgement
from dno_jax.runtime.runtime import Runtime
from dno_jax.stage_dir import Manifest, StageDir
from dno_jax.stages.quality import tell_quality


@runtime_checkable
class CloseShard(Protocol):
    """Takes a judged shard: its name, what it was read as, and its judgements."""

    def __call__(self, name: str, shard: PoolShard, judgements: Sequence[Judgement], /) -> None: ...


@runtime_checkable
class JudgeShards(Protocol):
    """Judges shards and hands each to `close`, this process those of its submesh."""

    def __call__(self, pools: Pools, shards: Sequence[str], *, close: CloseShard) -> None: ...


@dataclass(frozen=True)
class DeviceJudge:
    """One judge of this kind.

    Attributes:
        identity: everything that changes a verdict; what another judge closed is judged anew.
        inputs: what the manifest names beside the samples.
        counts: what to add up of a shard's judgements.
        figures: the manifest's details beside the states, of the sums of `counts`.
        who, remedy: complete "pools have no verdict of ..." and "Another call ...", which is said of too many failures.
    """

    identity: str
    inputs: Mapping[str, str]
    judge_shards: JudgeShards
    counts: Callable[[Iterable[Judgement]], Counter[str]]
    figures: Callable[[Counter[str]], Mapping[str, Any]]
    who: str
    remedy: str


def judge_on_devices(runtime: Runtime[RunConfig], iteration: int, judge: DeviceJudge) -> Manifest:
    """Judge iteration t's rollouts; closed shards are not judged again.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict.
    """
    start = time.perf_counter()
    run_dir = runtime.run_dir
    stage, sampled = run_dir.stage("annotate", iteration), run_dir.stage("sample", iteration)
    # The manifest's: every process must see the same ones.
    shards = sorted(sampled.require().outputs)
    inputs = {**stage.input_digest(sampled.manifest_path), **judge.inputs}
    if manifest := stage.finished(runtime.config, inputs):
        return manifest
    if is_primary():
        stage.start(runtime.config)
    reasoning = runtime.config.annotation.shows_reasoning
    pools = Pools(sampled, run_dir.prompts_path(iteration), reasoning=reasoning)
    found = Survey()
    sums: dict[str, Counter[str]] = {}

    def add(name: str, shard: PoolShard, judgements: Sequence[Judgement]) -> None:
        found.add(name, shard, judgements)
        sums[name] = judge.counts(judgements)

    def close(name: str, shard: PoolShard, judgements: Sequence[Judgement]) -> None:
        if runtime.submesh.leads:  # all processes of a submesh have the same judgements
            stage.write_shard(name, judgements)
        add(name, shard, judgements)

    if pending := _unfinished(stage, shards, identity=judge.identity, pools=pools, add=add):
        judge.judge_shards(pools, pending, close=close)
        barrier(f"judged {stage.path}")
    for name in shards:
        if name not in found.shards:  # another process judged it, or found it closed
            judgements = stage.read_shard(Judgement, name)
            if is_primary():
                add(name, pools.read(name), judgements)
            else:
                found.count(name, judgements)
    states = found.states
    # Every process has counted all judgements, so that all of them stop here, or none.
    refuse_shortfall(
        str(stage.path),
        found.reasons,
        total=states.total(),
        missing=f"pools have no verdict of {judge.who}",
        remedy=f"Another call {judge.remedy}, or raise annotation.max_failed to continue without these pools",
        max_failed=runtime.config.annotation.max_failed,
    )
    if is_primary():
        total: Counter[str] = Counter()
        for name in shards:  # in one order, whichever call closed them
            total.update(sums[name])
        stage.finish(
            runtime.config,
            inputs=inputs,
            rows=states.total(),
            dropped=found.dropped,
            seconds=time.perf_counter() - start,
            details={
                "judge": judge.identity,
                "states": dict(states),
                **tell_quality(run_dir, found.quality, runtime.config.annotation, iteration=iteration),
                **judge.figures(total),
            },
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


def _unfinished(stage: StageDir, shards: Sequence[str], *, identity: str, pools: Pools, add: CloseShard) -> list[str]:
    """Shards that are not closed, or were judged by another judge; process 0 says which, for all, and adds the rest."""
    missing = np.ones(len(shards), bool)
    closed = set(stage.shard_names()) if is_primary() else set()
    for index, name in enumerate(shards):
        if name in closed:
            judgements = stage.read_shard(Judgement, name)
            missing[index] = any(row.judge != identity for row in judgements)
            if not missing[index]:
                add(name, pools.read(name), judgements)
    return [shards[index] for index in np.flatnonzero(broadcast_from_primary(missing)).tolist()]
