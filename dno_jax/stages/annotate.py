"""Judge every pool of candidates: a host-side stage that follows sampling shard by shard and never touches a device.

It may run beside sampling in the same program, after it, or on any machine with the same run directory.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from etils import epath

from dno_jax.annotation.annotator import Annotator, Candidate, Pool, build_annotator
from dno_jax.config import RunConfig, config_digest
from dno_jax.errors import DnoError
from dno_jax.records import Judgement, Prompt, Rollout, parse_lines
from dno_jax.report.console import Meter
from dno_jax.run_dir import Manifest, RunDir, StageDir

_POLL_SECONDS = 0.2
# Shards in work at once: enough to keep the judge busy over the slow end of a shard,
# few enough to stay small in memory.
_SHARDS_AT_ONCE = 8


def run(config: RunConfig, iteration: int, *, abandoned: Callable[[], bool] = lambda: False) -> Manifest:
    """Judge iteration t's rollouts as their shards close, until sampling is finished and every pool has its verdict.

    Args:
        abandoned: asked between shards; true means that sampling has failed and no more shards will come.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict (run again: only those are asked anew),
            the judge cannot be reached, or the key is missing.
    """
    start = time.perf_counter()
    run_dir = RunDir(config.run_dir)
    stage, sampled = run_dir.stage("annotate", iteration), run_dir.stage("sample", iteration)
    digest = config_digest(config)
    if sampled.manifest() is not None:
        inputs = stage.reference_of(sampled.manifest_path)
        if manifest := stage.finished(inputs, config_digest=digest):
            return manifest
    work = _Work(stage=stage, sampled=sampled, prompts_path=run_dir.prompts_path(iteration))
    annotator = build_annotator(config.annotation, store_path=str(run_dir.annotations_path), seed=config.seed)
    asyncio.run(_judge_all(work, annotator, abandoned=abandoned, description=f"annotate  {iteration}"))
    _settle(work, max_failed=config.annotation.max_failed)
    judgements = list(stage.read(Judgement))
    states = Counter(judgement.state for judgement in judgements)
    dropped = Counter({f"verdict {state}": count for state, count in states.items() if state != "ok"})
    for shard in sampled.shard_names():  # over all of them: an earlier call may have closed some
        work.pools(shard, dropped=dropped)
    return stage.finish(
        config_digest=digest,
        inputs=stage.reference_of(sampled.manifest_path),
        rows=len(judgements),
        dropped=dropped,
        seconds=time.perf_counter() - start,
        details={"judge": annotator.identity, "states": dict(states)},
    )


@dataclass
class _Work:
    """Where the rollouts come from, where judgements go, and what could not be settled yet."""

    stage: StageDir
    sampled: StageDir
    prompts_path: epath.Path
    unsettled: dict[str, list[Judgement]] = field(default_factory=dict)
    prompts: dict[str, Prompt] = field(default_factory=dict)

    def pools(self, shard: str, *, dropped: Counter[str]) -> list[Pool]:
        """The pools of one shard of rollouts; what is in none of them is counted by reason."""
        if not self.prompts:
            lines = self.prompts_path.read_text().splitlines()
            rows = parse_lines(Prompt, lines, place=str(self.prompts_path))
            self.prompts = {prompt.prompt_id: prompt for prompt in rows}
        return pools_of(self.sampled.read_shard(Rollout, shard), self.prompts, dropped=dropped)


def pools_of(rollouts: Sequence[Rollout], prompts: Mapping[str, Prompt], *, dropped: Counter[str]) -> list[Pool]:
    """Return one pool a prompt, each candidate with the prefix it continues; what is in none is counted by reason."""
    by_prompt: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    pools = []
    for prompt_id, own in by_prompt.items():
        candidates = distinct_candidates(own, dropped=dropped)
        if len(candidates) >= 2:
            prefix = prompts[prompt_id].assistant_prefix
            shown = tuple(replace(candidate, text=prefix + candidate.text) for candidate in candidates)
            pools.append(Pool(prompt=prompts[prompt_id], candidates=shown))
        else:
            dropped["fewer than two distinct candidates"] += 1
    return pools


def distinct_candidates(rollouts: Sequence[Rollout], *, dropped: Counter[str]) -> tuple[Candidate, ...]:
    """Return the candidates a judge is shown: no empty text, none twice (the first stays, the teacher's before all)."""
    seen: set[str] = set()
    kept: list[Rollout] = []
    for rollout in sorted(rollouts, key=lambda row: row.sample):
        text = rollout.text.strip()
        if not text:
            dropped["empty response"] += 1
        elif text in seen:
            dropped["duplicate response"] += 1
        else:
            seen.add(text)
            kept.append(rollout)
    return tuple(Candidate(rollout.rollout_id, rollout.text) for rollout in kept)


async def _judge_all(work: _Work, annotator: Annotator, *, abandoned: Callable[[], bool], description: str) -> None:
    slots = asyncio.Semaphore(_SHARDS_AT_ONCE)
    tasks: dict[str, asyncio.Task[None]] = {}
    asked = asyncio.Lock()
    probed = False
    with Meter(description, total=0, unit="pools") as meter:

        async def probe_once(pools: Sequence[Pool]) -> None:
            """Ask the endpoint for a sign of life before the first pool that has to be paid for."""
            nonlocal probed
            async with asked:
                if not probed and any(annotator.recall(pool) is None for pool in pools):
                    await annotator.probe()
                    probed = True

        async def one_shard(shard: str) -> None:
            async with slots:
                pools = work.pools(shard, dropped=Counter())
                meter.expect(len(work.prompts))
                await probe_once(pools)
                judgements = await judge_pools(annotator, pools, meter=meter)
                if all(judgement.state == "ok" for judgement in judgements):
                    work.stage.write_shard(shard, judgements)
                else:
                    work.unsettled[shard] = judgements

        try:
            # A shard that another judge closed (its rubric was edited since) is judged anew: one iteration, one judge.
            closed = {
                name
                for name in work.stage.shard_names()
                if all(row.judge == annotator.identity for row in work.stage.read_shard(Judgement, name))
            }
            while True:
                # Asked before the shards are listed: what closes in between is seen in the next round.
                last_round = work.sampled.manifest() is not None or abandoned()
                for shard in work.sampled.shard_names():
                    if shard not in closed and shard not in tasks:
                        tasks[shard] = asyncio.create_task(one_shard(shard))
                failed = [task for task in tasks.values() if task.done() and task.exception() is not None]
                if failed or last_round:
                    break
                await asyncio.sleep(_POLL_SECONDS)
            # After an error the others finish what they have asked for: it is paid for, and the store keeps it.
            outcomes = await asyncio.gather(*tasks.values(), return_exceptions=True)
        finally:
            await annotator.close()
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    if work.sampled.manifest() is None:
        raise DnoError(f"{work.sampled.path}: sampling stopped before it was finished; run again to go on")


async def judge_pools(annotator: Annotator, pools: Sequence[Pool], *, meter: Meter) -> list[Judgement]:
    """Judge pools side by side. After an error the others still finish: they are paid for, and the store keeps them."""

    async def one(pool: Pool) -> Judgement:
        judgement = await annotator.judge(pool)
        meter.advance(1)
        return judgement

    outcomes = await asyncio.gather(*(one(pool) for pool in pools), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Judgement)]


def _settle(work: _Work, *, max_failed: float) -> None:
    """Close the shards that still miss verdicts if few enough do; else say what is missing and leave them open."""
    missing = [judgement for rows in work.unsettled.values() for judgement in rows if judgement.state != "ok"]
    if not missing:
        return
    total = sum(len(rows) for rows in work.unsettled.values())
    total += sum(len(work.stage.read_shard(Judgement, name)) for name in work.stage.shard_names())
    if len(missing) > max_failed * total:
        reasons = Counter(f"{judgement.state}: {judgement.detail}" for judgement in missing)
        shown = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise DnoError(
            f"{work.stage.path}: {len(missing)} of {total} pools have no verdict ({shown}). Nothing paid for is lost: "
            "run again and only these are asked anew, or raise annotation.max_failed to go on without them"
        )
    for shard, rows in work.unsettled.items():
        work.stage.write_shard(shard, rows)
