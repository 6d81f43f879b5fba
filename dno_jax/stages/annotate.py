"""Judge every pool of candidates: a host-side stage that follows sampling shard by shard and never touches a device.

It may run beside sampling in the same program, after it, or on any machine with the same run directory. Of candidates
and prompts it holds those in work alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from dno_jax.annotation.annotator import Annotator, Pool, build_annotator
from dno_jax.annotation.desk import Desk, EndpointAnnotator
from dno_jax.annotation.quality.calibration import read_calibration
from dno_jax.annotation.quality.figures import Quality, scalars
from dno_jax.config import RunConfig, config_digest
from dno_jax.errors import DnoError
from dno_jax.records import Judgement
from dno_jax.report.annotation import quality_table
from dno_jax.report.console import Meter, console
from dno_jax.run_dir import Manifest, RunDir, StageDir
from dno_jax.stages.pools import Pools, Survey, survey
from dno_jax.stages.prompts import name_bits
from dno_jax.stages.receipts import closing

_POLL_SECONDS = 0.2
# Pools in work for each request that may be in flight: enough to keep the judge busy over the slow end of a shard.
_POOLS_A_REQUEST = 2
_BATCH_POOLS = 4096  # that one batch asks about: few batches, whose questions still fit into memory


def run(config: RunConfig, iteration: int, *, abandoned: Callable[[], bool] = lambda: False) -> Manifest:
    """Judge iteration t's rollouts as their shards close, until sampling is finished and every pool has its verdict.

    Args:
        abandoned: asked between shards; true means that sampling has failed and no more shards will come.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict (run again: only those are asked anew),
            the money is spent, the judge cannot be reached, or the key is missing.
    """
    start = time.perf_counter()
    run_dir = RunDir(config.run_dir)
    stage, sampled = run_dir.stage("annotate", iteration), run_dir.stage("sample", iteration)
    run_dir.path.mkdir(parents=True, exist_ok=True)  # on a machine of its own it may be there before sampling
    digest = config_digest(config)
    if sampled.manifest() is not None:
        inputs = stage.reference_of(sampled.manifest_path)
        if manifest := stage.finished(inputs, config_digest=digest):
            return manifest
    annotator = build_annotator(config.annotation, store_path=str(run_dir.annotations_path), seed=config.seed)
    work = _Work(config, stage, sampled, annotator, run_dir)
    found = asyncio.run(work.run(abandoned=abandoned))
    figures = found.quality.figures()
    if config.annotation.judges:
        console.print(quality_table(figures, config.annotation.quality, iteration=iteration))
        run_dir.forget_metrics(iteration=iteration, stage="annotate", from_step=0)
        run_dir.append_metrics({"iteration": iteration, "stage": "annotate", "step": 0, **scalars(figures)})
    return stage.finish(
        config_digest=digest,
        inputs=stage.reference_of(sampled.manifest_path),
        rows=sum(found.states.values()),
        dropped=found.dropped,
        seconds=time.perf_counter() - start,
        details={"judge": annotator.identity, "states": dict(found.states), "quality": figures},
    )


class _Work:
    """One iteration's pools on their way to judgements."""

    def __init__(self, config: RunConfig, stage: StageDir, sampled: StageDir, annotator: Annotator, run_dir: RunDir):
        self._config = config
        self._stage = stage
        self._sampled = sampled
        self._annotator = annotator
        self._desk: Desk | None = annotator.desk if isinstance(annotator, EndpointAnnotator) else None
        self._by_batch = any(judge.batch for judge in config.annotation.judges)
        self._labelled = self._read_labels()
        self._run_dir = run_dir
        self._pools = Pools(sampled, run_dir.prompts_path(stage.iteration))
        self._missing: dict[str, dict[str, Judgement]] = {}  # shard -> prompt id -> why there is no verdict
        self._states: Counter[str] = Counter()  # of pools without a verdict
        self._reasons: Counter[str] = Counter()
        self._judged = 0
        self._probing = asyncio.Lock()
        self._probed = False

    async def run(self, *, abandoned: Callable[[], bool]) -> Survey:
        async with closing(self._annotator, self._run_dir):
            with Meter(f"annotate  {self._stage.iteration}", total=0, unit="pools") as meter:
                await self._follow(meter, abandoned=abandoned)
                await judge_pools(self._annotator, [pool for pool, _ in self._labelled], meter=None)
            if self._sampled.manifest() is None:
                raise DnoError(f"{self._sampled.path}: sampling stopped before it was finished; run again to go on")
            self._settle()
            return self._survey()

    def _read_labels(self) -> list[tuple[Pool, float]]:
        """Pairs that people have judged; only a judge that is asked is asked about them."""
        section = self._config.annotation.quality
        if self._desk is None or section.calibration is None:
            return []
        return read_calibration(section.calibration, limit=section.calibration_pairs, seed=self._config.seed)

    async def _follow(self, meter: Meter, *, abandoned: Callable[[], bool]) -> None:
        """Judge shards as they close, a few at once; after an error those in work go on: they are paid for."""
        at_once = max(2, -(-self._annotator.width * _POOLS_A_REQUEST // self._config.sampling.shard_prompts))
        seen = self._closed()
        waiting: deque[str] = deque()
        running: set[asyncio.Task[None]] = set()
        failure: BaseException | None = None
        while True:
            # Asked before the shards are listed: what closes in between is seen in the next round.
            last_round = self._sampled.manifest() is not None or abandoned()
            new = [shard for shard in self._sampled.shard_names() if shard not in seen]
            seen.update(new)
            waiting.extend(new)
            while waiting or running:
                while len(running) < at_once and failure is None and (group := self._group(waiting, last_round)):
                    running.add(asyncio.create_task(self._judge_group(group, meter)))
                if not running:
                    break  # a batch is still to grow
                done, running = await asyncio.wait(
                    running, timeout=None if last_round else _POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                errors = [error for task in done if (error := task.exception())]  # all seen: no one else tells of them
                failure = failure or next(iter(errors), None)
                if not done or (failure and not running):
                    break  # look for new shards
            if failure and not running:
                raise failure
            if last_round and not waiting and not running:
                return
            if not running:
                await asyncio.sleep(_POLL_SECONDS)

    def _group(self, waiting: deque[str], last_round: bool) -> list[str]:
        """Take the shards that are judged next: one, or as many as make a batch; none while a batch is to grow."""
        size = max(1, _BATCH_POOLS // self._config.sampling.shard_prompts) if self._by_batch else 1
        if len(waiting) < size and not last_round:
            return []
        return [waiting.popleft() for _ in range(min(size, len(waiting)))]

    async def _judge_group(self, shards: Sequence[str], meter: Meter) -> None:
        if self._by_batch and isinstance(self._annotator, EndpointAnnotator):
            pools = [pool for shard in shards for pool in self._pools.read(shard, dropped=Counter())]
            await self._annotator.ask_by_batch(pools)
            await self._annotator.ask_by_batch([pool for pool in pools if self._is_repeated(pool)], repeat=1)
        for shard in shards:
            await self._judge_shard(shard, meter)

    def _closed(self) -> set[str]:
        """Shards that need no judge. One that another judge closed (an edited rubric) is judged anew."""
        closed: set[str] = set()
        for shard in self._stage.shard_names():
            rows = self._stage.read_shard(Judgement, shard)
            if all(row.judge == self._annotator.identity for row in rows):
                closed.add(shard)
                self._judged += len(rows)
        return closed

    async def _judge_shard(self, shard: str, meter: Meter) -> None:
        pools = self._pools.read(shard, dropped=Counter())
        meter.expect(len(self._pools.prompts))
        await self._probe_once(pools)
        again = [pool for pool in pools if self._is_repeated(pool)]
        judgements, _ = await asyncio.gather(
            judge_pools(self._annotator, pools, meter=meter),
            judge_pools(self._annotator, again, meter=None, repeat=1),
        )
        self._judged += len(judgements)
        missing = {row.prompt_id: row for row in judgements if row.state != "ok"}
        if not missing:
            self._stage.write_shard(shard, judgements)
            return
        self._reasons.update(f"{row.state}: {row.detail}" for row in missing.values())
        self._states.update(row.state for row in missing.values())
        if self._states.total() <= self._config.annotation.max_failed * len(self._pools.prompts):
            self._missing[shard] = missing  # else this call cannot settle, and what fails is not held

    def _is_repeated(self, pool: Pool) -> bool:
        """Whether a pool is asked about a second time: by its prompt's name, the same after a restart."""
        share = self._config.annotation.quality.repeat
        return self._desk is not None and name_bits(f"repeat {pool.prompt.prompt_id}") < share * 2**32

    async def _probe_once(self, pools: Sequence[Pool]) -> None:
        """Ask the endpoint for a sign of life before the first pool that has to be paid for."""
        async with self._probing:
            if not self._probed and any(self._annotator.recall(pool) is None for pool in pools):
                await self._annotator.probe()
                self._probed = True

    def _settle(self) -> None:
        """Close the shards that still miss verdicts if few enough do; else say what is missing and leave them open.

        Raises:
            DnoError: naming how many are missing, and why.
        """
        missing = self._states.total()
        if self._desk is not None and self._states["over budget"]:
            raise self._desk.budget.stop(missing=missing)
        if missing > self._config.annotation.max_failed * self._judged:
            shown = "; ".join(f"{count} x {reason}" for reason, count in self._reasons.most_common(3))
            raise DnoError(
                f"{self._stage.path}: {missing} of {self._judged} pools have no verdict ({shown}). Nothing paid for is "
                "lost: run again and only these are asked anew, or raise annotation.max_failed to go on without them"
            )
        for shard, rows in self._missing.items():
            judgements = [
                rows.get(pool.prompt.prompt_id) or self._annotator.recall(pool)
                for pool in self._pools.read(shard, dropped=Counter())
            ]
            self._stage.write_shard(shard, [row for row in judgements if row is not None])

    def _survey(self) -> Survey:
        found = survey(self._pools, self._stage, also=self._add_repeat)
        for pool, preference in self._labelled:
            if judgement := self._annotator.recall(pool):
                found.quality.add_label(judgement, preference)
        return found

    def _add_repeat(self, pool: Pool, judgement: Judgement, quality: Quality) -> None:
        if self._is_repeated(pool) and (again := self._annotator.recall(pool, repeat=1)):
            quality.add_repeat(judgement, again)


async def judge_pools(
    annotator: Annotator, pools: Sequence[Pool], *, meter: Meter | None, repeat: int = 0
) -> list[Judgement]:
    """Judge pools side by side. After an error the others still finish: they are paid for, and the store keeps them."""

    async def one(pool: Pool) -> Judgement:
        judgement = await annotator.judge(pool, repeat=repeat)
        if meter is not None and judgement.state == "ok":
            meter.advance(1)
        return judgement

    outcomes = await asyncio.gather(*(one(pool) for pool in pools), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Judgement)]
