"""Judge every pool of candidates: a host-side stage that follows sampling shard by shard and never touches a device.

It may run beside sampling in the same program, after it, or on any machine with the same run directory. Of candidates
and prompts it holds only those in work.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

from dno_jax.addresses import Purpose, uniform
from dno_jax.annotation import late
from dno_jax.annotation.build import build_annotator
from dno_jax.annotation.judges.schedules import num_questions
from dno_jax.annotation.pool import Annotator, Pool
from dno_jax.annotation.quality.calibration import read_calibration
from dno_jax.annotation.quality.figures import Quality
from dno_jax.annotation.quality.warnings import warnings
from dno_jax.annotation.receipts import closing, dollars
from dno_jax.annotation.shortfall import refuse_shortfall
from dno_jax.annotation.transport.routes import Unreachable
from dno_jax.config import RunConfig
from dno_jax.console import Meter, Reminder, say
from dno_jax.data.pools import Pools, PoolShard, Survey
from dno_jax.errors import DnoError
from dno_jax.records import Judgement
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import Manifest, StageDir
from dno_jax.stages.quality import tell_quality

T = TypeVar("T")

_POLL_SECONDS = 0.2
# Pools in work per request that may be in flight: enough to keep the judge busy over the slow end of a shard.
_POOLS_A_REQUEST = 2
_BATCH_QUESTIONS = 16_384  # of the shards that are asked about together by batch, about: what is held in memory
_BATCHES_AT_ONCE = 2


def run(config: RunConfig, run_dir: RunDir, iteration: int, *, abandoned: Callable[[], bool] | None = None) -> Manifest:
    """Judge iteration t's rollouts as their shards close, until sampling is finished and every pool has its verdict.

    Args:
        abandoned: given beside sampling, and asked now and then: true means that sampling has failed or was
            interrupted. Nothing more is asked then; what is in flight arrives and is kept.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict (run again: only those are asked anew),
            the money is spent, the judge cannot be reached, or the key is missing.
    """
    start = time.perf_counter()
    stage, sampled = run_dir.stage("annotate", iteration), run_dir.stage("sample", iteration)
    if manifest := finished(config, run_dir, iteration):
        return manifest
    stage.start(config)
    annotator = build_annotator(config.annotation, store_path=str(run_dir.annotations_path), seed=config.seed)
    work = _Work(config, stage, sampled, annotator, run_dir)
    found = asyncio.run(work.run(abandoned=abandoned))
    return stage.finish(
        config,
        inputs=stage.input_digest(sampled.manifest_path),
        rows=sum(found.states.values()),
        dropped=found.dropped,
        seconds=time.perf_counter() - start,
        details={
            "judge": annotator.identity,
            "states": dict(found.states),
            **tell_quality(run_dir, found.quality, config.annotation, iteration=iteration),
        },
    )


def _tell_another_judge(run_dir: RunDir, iteration: int, *, identity: str) -> None:
    """Warn where a file that the configuration only names, such as a rubric, has changed since the last iteration."""
    before = run_dir.stage("annotate", iteration - 1).manifest() if iteration else None
    if before and (judge := before.details.get("judge")) not in (None, identity):
        say(
            f"warning: iteration {iteration} has another judge than the one before it: {identity}, not {judge}. "
            "Restore the file that has changed, or mind that the iterations' preferences are not one judge's"
        )


def finished(config: RunConfig, run_dir: RunDir, iteration: int) -> Manifest | None:
    """The manifest of an earlier call, which may have been another machine's; None while there is none.

    Raises:
        DnoError: it was made by another configuration, or of other samples than those now there.
    """
    stage, sampled = run_dir.stage("annotate", iteration), run_dir.stage("sample", iteration)
    if sampled.manifest() is None:
        return None
    return stage.finished(config, stage.input_digest(sampled.manifest_path))


def probe(config: RunConfig, run_dir: RunDir, iteration: int) -> None:
    """Ask the judge for a sign of life, before anything is sampled for it.

    Where no endpoint answers, that is said: it may be back when there is something to judge.

    Raises:
        DnoError: what no waiting fixes: a refused key, an unknown model, an endpoint without what is needed.
    """
    if run_dir.stage("sample", iteration).manifest() is not None:
        return
    annotator = build_annotator(config.annotation, store_path=str(run_dir.annotations_path), seed=config.seed)

    async def ask() -> None:
        async with closing(annotator, run_dir):
            try:
                await annotator.probe(patient=False)
            except Unreachable as error:
                say(f"{error}; sampling begins all the same, and the judge is asked again")

    asyncio.run(ask())


def shards_a_group(config: RunConfig, iteration: int) -> int:
    """How many shards are judged together: one, or by batch as many as have about `_BATCH_QUESTIONS`."""
    count = config.num_candidates(iteration) + 1  # and the teacher's
    asked = sum(num_questions(judge, num_candidates=count) for judge in config.annotation.judges if judge.batch)
    return max(1, _BATCH_QUESTIONS // (asked * config.sampling.shard_prompts)) if asked else 1


class _Work:
    """One iteration's pools on their way to judgements."""

    def __init__(self, config: RunConfig, stage: StageDir, sampled: StageDir, annotator: Annotator, run_dir: RunDir):
        self._config = config
        self._stage = stage
        self._sampled = sampled
        self._annotator = annotator
        self._by_batch = any(judge.batch for judge in config.annotation.judges)
        self._labels: list[tuple[Judgement, float]] = []
        self._run_dir = run_dir
        self._pools = Pools(sampled, run_dir.prompts_path(stage.iteration), reasoning=config.annotation.shows_reasoning)
        self._found = Survey()
        self._missing: dict[str, dict[str, Judgement]] = {}  # shard -> prompt id -> why there is no verdict
        self._late: dict[str, dict[str, Judgement]] = {}  # shards to judge once more, with what no other try would mend
        self._states: Counter[str] = Counter()  # of pools without a verdict
        self._reasons: Counter[str] = Counter()
        self._judged = self._num_late = 0
        self._probing = asyncio.Lock()
        self._probed = False

    async def run(self, *, abandoned: Callable[[], bool] | None) -> Survey:
        async with closing(self._annotator, self._run_dir):
            _tell_another_judge(self._run_dir, self._stage.iteration, identity=self._annotator.identity)
            closed = self._closed()
            label, paid = f"annotate  {self._stage.iteration}", lambda: dollars(self._annotator.receipt())
            with Meter(label, total=0, unit="pools", done=self._judged, aside=paid) as meter:
                if abandoned is None and self._sampled.manifest() is None:
                    await self._annotator.probe()  # told now, not when the first shard has been waited for
                await _unless(abandoned, self._judge_labels())
                await self._follow(meter, seen=closed, abandoned=abandoned)
                await _unless(abandoned, self._judge_late(meter))
                meter.expect(self._judged)
            if self._sampled.manifest() is None or (abandoned and abandoned()):
                raise DnoError(f"{self._sampled.path}: sampling stopped before it was finished; run again to resume")
            self._settle()
            self._add_labels(self._found.quality)
            return self._found

    async def _judge_labels(self) -> None:
        """Ask about pairs that people have judged, before anything else is paid for, and say what they warn of."""
        section = self._config.annotation.quality
        if section.calibration is None:
            return
        labelled = read_calibration(section.calibration, limit=section.calibration_pairs, seed=self._config.seed)
        judged = await judge_pools(self._annotator, [pool for pool, _ in labelled], meter=None)
        self._labels = [(judgement, label) for judgement, (_, label) in zip(judged, labelled, strict=True)]
        for sentence in warnings(self._add_labels(Quality()).figures(), section):
            say(f"warning: {sentence}")

    def _add_labels(self, quality: Quality) -> Quality:
        for judgement, label in self._labels:
            quality.add_label(judgement, label)
        return quality

    async def _follow(self, meter: Meter, *, seen: set[str], abandoned: Callable[[], bool] | None) -> None:
        """Judge shards as they close, a few at once; after an error those in work are finished: they are paid for."""
        at_once = max(2, -(-self._annotator.width * _POOLS_A_REQUEST // self._config.sampling.shard_prompts))
        if self._by_batch:
            at_once = _BATCHES_AT_ONCE
        waiting: deque[str] = deque()
        running: set[asyncio.Task[None]] = set()
        failure: BaseException | None = None
        remind = Reminder()
        try:
            while not (abandoned and abandoned()):
                # Asked before the shards are listed: what closes in between is seen in the next round.
                last_round = self._sampled.manifest() is not None
                new = [shard for shard in self._sampled.shard_names() if shard not in seen]
                seen.update(new)
                waiting.extend(new)
                while len(running) < at_once and failure is None and (group := self._group(waiting, last_round)):
                    running.add(asyncio.create_task(self._judge_group(group, meter)))
                if running:
                    done, running = await asyncio.wait(
                        running, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                    errors = [error for task in done if (error := task.exception())]  # all seen: nobody else does
                    failure = failure or next(iter(errors), None)
                elif failure:
                    raise failure
                elif last_round:
                    return
                else:
                    if abandoned is None:
                        remind(f"annotate  {self._stage.iteration}: {len(seen)} shards are judged; waiting for more, "
                               f"or the end of sampling, in {self._sampled.path}")  # fmt: skip
                    await asyncio.sleep(_POLL_SECONDS)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _group(self, waiting: deque[str], last_round: bool) -> list[str]:
        """Take the shards that are judged next: one, or as many as make a batch; none while a batch is to grow."""
        size = shards_a_group(self._config, self._stage.iteration)
        if len(waiting) < size and not last_round:
            return []
        return [waiting.popleft() for _ in range(min(size, len(waiting)))]

    async def _judge_group(self, shards: Sequence[str], meter: Meter) -> None:
        read = {name: self._pools.read(name) for name in shards}
        if self._annotator.asks_by_batch:
            pools = [pool for shard in read.values() for pool in shard.pools]
            again = [pool for pool in pools if self._is_repeated(pool)]
            await all_of(self._annotator.ask_ahead(pools), self._annotator.ask_ahead(again, repeat=1))
        for name, shard in read.items():
            await self._judge_shard(name, shard, meter)

    def _closed(self) -> set[str]:
        """Shards that need no judge. One that another judge closed (an edited rubric) is judged anew."""
        closed: set[str] = set()
        for shard in self._stage.shard_names():
            rows = self._stage.read_shard(Judgement, shard)
            if all(row.judge == self._annotator.identity for row in rows):
                closed.add(shard)
                self._judged += len(rows)
                self._add(shard, self._pools.read(shard), rows)
        return closed

    def _add(self, name: str, shard: PoolShard, judgements: Sequence[Judgement]) -> None:
        """Count what a closed shard says of the judge; repeated pools by both judgements."""
        self._found.add(name, shard, judgements)
        own = {judgement.prompt_id: judgement for judgement in judgements}
        for pool in shard.pools:
            first = own.get(pool.prompt.prompt_id)
            if first and self._is_repeated(pool) and (again := self._annotator.recall(pool, repeat=1)):
                self._found.quality.add_repeat(first, again)

    async def _judge_late(self, meter: Meter) -> None:
        """Judge once more what the judge's server failed with."""
        if self._late:
            await late.pause(self._num_late, what="pools")
        for name, lost in self._late.items():
            await self._judge_shard(name, self._pools.read(name), meter, lost=lost)

    async def _judge_shard(
        self, name: str, shard: PoolShard, meter: Meter, *, lost: dict[str, Judgement] | None = None
    ) -> None:
        """Judge a shard; at the second time without what was lost at the first."""
        pools = [pool for pool in shard.pools if pool.prompt.prompt_id not in (lost or {})]
        meter.expect(len(self._pools.prompts))
        await self._probe_once(pools)
        again = [pool for pool in pools if self._is_repeated(pool)]
        judgements, _ = await all_of(
            judge_pools(self._annotator, pools, meter=meter if lost is None else None),
            judge_pools(self._annotator, again, meter=None, repeat=1),
        )
        missing = {row.prompt_id: row for row in judgements if row.state != "ok"}
        failed = [row.prompt_id for row in missing.values() if late.failed_by_server(row.state, row.detail)]
        if failed and lost is None:
            self._num_late += len(failed)
            self._late[name] = {prompt_id: row for prompt_id, row in missing.items() if prompt_id not in failed}
            return
        missing |= lost or {}
        self._judged += len(judgements) + len(lost or ())
        if not missing:
            self._stage.write_shard(name, judgements)
            self._add(name, shard, judgements)
            return
        self._reasons.update(f"{row.state}: {row.detail}" for row in missing.values())
        self._states.update(row.state for row in missing.values())
        if self._states.total() <= self._config.annotation.max_failed * len(self._pools.prompts):
            self._missing[name] = missing  # else this call cannot settle, and what fails is not held

    def _is_repeated(self, pool: Pool) -> bool:
        """Whether a pool is asked about a second time: by its prompt's id, the same after a restart."""
        share, seed = self._config.annotation.quality.repeat, self._config.seed
        return self._annotator.may_repeat and uniform(Purpose.REPEATED, seed, pool.prompt.prompt_id) < share

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
        self._annotator.refuse_over_budget(self._states.total() if self._states["over budget"] else 0)
        refuse_shortfall(
            str(self._stage.path),
            self._reasons,
            total=self._judged,
            missing="pools have no verdict",
            remedy="Nothing paid for is lost: run again and only these are asked anew, or raise annotation.max_failed "
            "to continue without them",
            max_failed=self._config.annotation.max_failed,
        )
        for name, rows in self._missing.items():
            shard = self._pools.read(name)
            found = [rows.get(pool.prompt.prompt_id) or self._annotator.recall(pool) for pool in shard.pools]
            judgements = [row for row in found if row is not None]
            self._stage.write_shard(name, judgements)
            self._add(name, shard, judgements)


async def _unless(abandoned: Callable[[], bool] | None, work: Coroutine[Any, Any, None]) -> None:
    """Do some work to its end, or give it up when asked to; what is in flight is the client's."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done() and not (abandoned and abandoned()):
            await asyncio.wait([task], timeout=_POLL_SECONDS)
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def judge_pools(
    annotator: Annotator, pools: Sequence[Pool], *, meter: Meter | None, repeat: int = 0
) -> list[Judgement]:
    """Judge pools side by side. After an error the others still finish: they are paid for, and the store keeps them."""

    async def one(pool: Pool) -> Judgement:
        judgement = await annotator.judge(pool, repeat=repeat)
        if meter is not None and judgement.state == "ok":
            meter.advance(1)
        return judgement

    return await all_of(*map(one, pools))


async def judge_late(annotator: Annotator, pools: Sequence[Pool], judgements: Sequence[Judgement]) -> list[Judgement]:
    """Judge once more, after a pause, the pools that the judge's server failed with; return all judgements."""
    failed = [index for index, row in enumerate(judgements) if late.failed_by_server(row.state, row.detail)]
    if not failed:
        return list(judgements)
    await late.pause(len(failed), what="pools")
    again = await judge_pools(annotator, [pools[index] for index in failed], meter=None)
    mended = dict(zip(failed, again, strict=True))
    return [mended.get(index, row) for index, row in enumerate(judgements)]


async def all_of(*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """Run them side by side to their ends, and only then raise what the first of them raised."""
    outcomes = await asyncio.gather(*coroutines, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast("list[T]", outcomes)
