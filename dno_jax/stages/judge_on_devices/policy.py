"""The policy as its own judge (Self-Rewarding, arXiv 2401.10020): readings of every response, their points averaged.

A stage on the devices (shards.py), as the judge needs the sampler. A reading is a function of the weights and of
(seed, iteration, rollout, reading).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from etils import epath

from dno_jax.addresses import Purpose, name_bits
from dno_jax.annotation.judges.forms import POINTWISE, load_rubric
from dno_jax.annotation.judges.rubric import Rubric
from dno_jax.annotation.pool import Pool
from dno_jax.annotation.question import Reply, Unparsable
from dno_jax.config import RunConfig
from dno_jax.console import Meter, say
from dno_jax.data.pools import Pools, PoolShard
from dno_jax.errors import DnoError
from dno_jax.parallel.cluster import is_primary
from dno_jax.parallel.sharding import DECODE
from dno_jax.reasoning import split_thought
from dno_jax.records import Judgement, Message
from dno_jax.runtime.exhausted import explained, sampling_settings
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.slots import Wanted, plan
from dno_jax.sampling.engine import generate
from dno_jax.sampling.requests import Finished, Request, Response, SamplingParams
from dno_jax.sampling.state import CompiledPrograms, EngineShape
from dno_jax.sampling.transforms import Truncation
from dno_jax.stage_dir import Manifest
from dno_jax.stages.judge_on_devices.shards import CloseShard, DeviceJudge, judge_on_devices


def check(runtime: Runtime[RunConfig]) -> None:
    """Raise now what no reading could fix later: the rubric, its length, the model's context, the chat template.

    Says so where the longest prompts and responses would leave their pools without a verdict.

    Raises:
        DnoError: naming what does not fit.
    """
    config, judge = runtime.config, _Judge.start(runtime)
    longest, limit = judge.num_fixed + config.max_length, config.annotation.self_judge.max_prompt_length
    if longest > limit and is_primary():
        say(
            f"judge prompts may take about {longest} tokens (the rubric alone {judge.num_fixed}); pools with one above "
            f"annotation.self_judge.max_prompt_length={limit} get no verdict"
        )


def run(runtime: Runtime[RunConfig], iteration: int) -> Manifest:
    """Have policy t judge iteration t's rollouts; closed shards are not judged again.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict; or as `check`.
    """
    policy = runtime.run_dir.policy(iteration)
    judge = _Judge.start(runtime)
    inputs = runtime.policy_inputs(policy)
    identity = judge.identity(policy=inputs[f"policies/{policy.name}"])
    own = DeviceJudge(
        identity=identity,
        inputs=inputs | {f"rubric {judge.rubric.name}": judge.rubric.digest},
        judge_shards=partial(_judge_shards, judge, policy, identity=identity),
        counts=_reading_states,
        figures=lambda states: {"readings": dict(states)},
        who="the policy",
        remedy="would read the same: teach the policy to judge first (dno sft on examples of the rubric), start a run "
        "with another annotation.self_judge",
    )
    return judge_on_devices(runtime, iteration, own)


@dataclass(frozen=True)
class _Reading:
    text: str
    score: int | None  # None where the text is no answer
    why: str = ""


@dataclass(frozen=True)
class _Judge:
    """The rubric, and what the model's sampler needs to read it out."""

    runtime: Runtime[RunConfig]
    rubric: Rubric
    num_fixed: int  # tokens of a judge prompt besides what is judged
    control: Counter[int]  # ids that begin or end a text, as often as every judge prompt has them

    @classmethod
    def start(cls, runtime: Runtime[RunConfig]) -> _Judge:
        """Read the rubric and lay it beside the model.

        Raises:
            DnoError: an unknown or unusable rubric, a template that refuses it, or lengths that cannot be met.
        """
        section = runtime.config.annotation.self_judge
        rubric = load_rubric(POINTWISE, section.rubric, place="annotation.self_judge.rubric")
        context = runtime.model_config.context
        if section.max_prompt_length + section.max_new_tokens > context:
            raise DnoError(
                f"annotation.self_judge.max_prompt_length {section.max_prompt_length} and max_new_tokens "
                f"{section.max_new_tokens} exceed the model's context of {context} (max_position_embeddings of "
                f"{runtime.config.model.path}); lower one of them"
            )
        judge = cls(runtime, rubric, num_fixed=0, control=Counter())
        shortest = judge._ids((Message(role="user", content="q"),), "a")
        if len(shortest) >= section.max_prompt_length:
            raise DnoError(
                f"annotation.self_judge.rubric {section.rubric!r} alone takes {len(shortest)} tokens, and "
                f"annotation.self_judge.max_prompt_length is {section.max_prompt_length}: raise it, or give a shorter "
                "rubric"
            )
        return replace(judge, num_fixed=len(shortest), control=judge._control(shortest))

    def identity(self, *, policy: str) -> str:
        """Everything that changes a verdict."""
        section = self.runtime.config.annotation.self_judge
        return (
            f"self rubric={self.rubric.identity} readings={section.num_judgements} temperature={section.temperature} "
            f"top_p={section.top_p} max_new_tokens={section.max_new_tokens} seed={self.runtime.config.seed} "
            f"policy={policy[:12]}"
        )

    def request(self, conversation: Sequence[Message], text: str) -> tuple[int, ...] | str:
        """Return the ids of a judge prompt, or why there are none."""
        ids = self._ids(conversation, text)
        limit = self.runtime.config.annotation.self_judge.max_prompt_length
        if len(ids) > limit:
            return f"a judge prompt has {len(ids)} tokens, annotation.self_judge.max_prompt_length is {limit}"
        if spelt := self._control(ids) - self.control:
            # The tokenizer made an id of it, which would close the judge's turn whatever fence it stands in.
            return f"the text to judge spells the control token {self.runtime.tokenizer.strip(sorted(spelt))[0]!r}"
        return ids

    def shape(self, *, num_requests: int) -> EngineShape:
        """Say how many readings decode together; before weights are loaded."""
        wanted = Wanted.readings(self.runtime.config, num_responses=num_requests)
        return plan(self.runtime, wanted).programs.shape

    def generate(
        self, params: Any, requests: Iterable[_Request], *, shape: EngineShape, iteration: int
    ) -> Generator[Finished, None, None]:
        """Read requests out on this process's submesh."""
        config, mesh = self.runtime.config, self.runtime.submesh.mesh
        section = config.annotation.self_judge
        sampling_params = SamplingParams(
            num_samples=section.num_judgements,
            max_new_tokens=section.max_new_tokens,
            end_ids=self.runtime.end_ids,
            num_ids=self.runtime.tokenizer.vocab_size,
            truncation=Truncation(temperature=section.temperature, top_p=section.top_p),
            seed=config.seed,
            purpose=Purpose.READING,
        )
        yield from generate(
            params,
            (Request(request.token_ids, name_bits(request.candidate_id)) for request in requests),
            CompiledPrograms(self.runtime.programs.model(DECODE, mesh=mesh), sampling_params, shape, mesh),
            iteration=iteration,
        )

    def read(self, response: Response) -> _Reading:
        """Parse one reading."""
        return self._parse(self.runtime.tokenizer.decode(response.token_ids), whole=response.finish == "stop")

    def _parse(self, text: str, *, whole: bool) -> _Reading:
        found = split_thought(text, self._opens_thought)
        if not whole:
            limit = self.runtime.config.annotation.self_judge.max_new_tokens
            return _Reading(text, None, f"the reading was cut at annotation.self_judge.max_new_tokens={limit}")
        try:
            return _Reading(text, int(self.rubric.read(Reply(text=found.answer), ())[0]))
        except Unparsable as error:
            return _Reading(text, None, str(error))

    @cached_property
    def _opens_thought(self) -> bool:
        """Whether the policy's template has its readings begin inside a thought."""
        return self.runtime.tokenizer.opens_thought(self._ids((Message(role="user", content="q"),), "a"))

    def _ids(self, conversation: Sequence[Message], text: str) -> tuple[int, ...]:
        messages = self.rubric.messages(conversation, (text,))
        return self.runtime.tokenizer.prompt_ids([Message.model_validate(message) for message in messages])

    def _control(self, ids: Sequence[int]) -> Counter[int]:
        control = self.runtime.tokenizer.control_ids
        return Counter(token for token in ids if token in control)


@dataclass(frozen=True)
class _Request:
    """What is asked of one candidate."""

    candidate_id: str
    token_ids: tuple[int, ...]


@dataclass
class _Sheet:
    """One shard under judgement."""

    name: str
    shard: PoolShard
    requests: dict[str, _Request] = field(default_factory=dict)
    unasked: dict[str, str] = field(default_factory=dict)  # prompt id -> why its pool cannot be asked about
    readings: dict[str, list[_Reading]] = field(default_factory=dict)

    @classmethod
    def lay_out(cls, judge: _Judge, name: str, shard: PoolShard) -> _Sheet:
        sheet = cls(name, shard)
        for pool in shard.pools:
            asked = {item.candidate_id: judge.request(pool.prompt.messages, item.text) for item in pool.candidates}
            problems = [found for found in asked.values() if isinstance(found, str)]
            if problems:
                sheet.unasked[pool.prompt.prompt_id] = problems[0]
            sheet.requests |= {
                name: _Request(name, found)
                for name, found in asked.items()
                if not problems and not isinstance(found, str)
            }
        return sheet

    @property
    def is_read(self) -> bool:
        return len(self.readings) == len(self.requests)

    def judgements(self, *, identity: str) -> list[Judgement]:
        return [self._judgement(pool, identity=identity) for pool in self.shard.pools]

    def _judgement(self, pool: Pool, *, identity: str) -> Judgement:
        fields = {"prompt_id": pool.prompt.prompt_id, "candidate_ids": pool.candidate_ids, "judge": identity}
        if why := self.unasked.get(pool.prompt.prompt_id):
            return Judgement(**fields, state="failed", detail=why)
        readings = {name: self.readings[name] for name in pool.candidate_ids}
        kept = {name: [{"score": one.score, "text": one.text} for one in own] for name, own in readings.items()}
        raw = json.dumps(kept, ensure_ascii=False)
        points = [[one.score for one in own if one.score is not None] for own in readings.values()]
        unread = [own[0].why for own, known in zip(readings.values(), points, strict=True) if not known]
        if unread:
            detail = f"{len(unread)} of {len(points)} candidates without a readable reading ({unread[0]})"
            return Judgement(**fields, state="unparsable", raw=raw, detail=detail)
        return Judgement(**fields, state="ok", raw=raw, scores=tuple(sum(known) / len(known) for known in points))


def _judge_shards(
    judge: _Judge, policy: epath.Path, pools: Pools, shards: Sequence[str], *, close: CloseShard, identity: str
) -> None:
    """Judge and close shards; each submesh takes every n-th and runs by itself."""
    submesh, iteration = judge.runtime.submesh, pools.sampled.iteration
    own = shards[submesh.index :: submesh.count]
    # At most so many readings are asked for, of all shards, whoever judges them: processes that share a model must
    # decode as many rows.
    shape = judge.shape(num_requests=pools.sampled.require().rows)
    with explained(f"annotate of iteration {iteration}", sampling_settings(judge.runtime.programs, shape.slots)):
        params = judge.runtime.load_for_decoding(policy)
    asked: dict[int, tuple[_Sheet, _Request]] = {}  # by the number of the request

    def coming() -> Iterator[_Request]:
        """Lay shards out one after the other, as the sampler takes requests."""
        numbers = itertools.count()
        for name in own:
            sheet = _Sheet.lay_out(judge, name, pools.read(name))
            if sheet.is_read:
                finish(sheet)
            # Prompts of like length side by side pad little.
            for request in sorted(sheet.requests.values(), key=lambda request: len(request.token_ids)):
                asked[next(numbers)] = sheet, request
                yield request

    def finish(sheet: _Sheet) -> None:
        nonlocal judged
        close(sheet.name, sheet.shard, sheet.judgements(identity=identity))
        judged += len(sheet.shard.pools)
        meter.advance(len(sheet.shard.pools))

    judged = 0
    at_most = min(len(pools.prompts), len(own) * judge.runtime.config.sampling.shard_prompts)
    stream = judge.generate(params, coming(), shape=shape, iteration=iteration)
    with (
        explained(f"annotate of iteration {iteration}", sampling_settings(judge.runtime.programs, shape.slots)),
        contextlib.closing(stream),
        Meter(f"judge     {iteration}", total=at_most, unit="pools", enabled=is_primary()) as meter,
    ):
        for finished in stream:
            sheet, request = asked.pop(finished.index)
            sheet.readings[request.candidate_id] = [judge.read(response) for response in finished.responses]
            if sheet.is_read:
                finish(sheet)
        meter.expect(judged)


def _reading_states(judgements: Iterable[Judgement]) -> Counter[str]:
    """How many readings were answers, over all pools that were asked about."""
    states = Counter({"ok": 0, "unparsable": 0})
    for judgement in judgements:
        pool = json.loads(judgement.raw) if judgement.raw else {}
        states.update("unparsable" if one["score"] is None else "ok" for own in pool.values() for one in own)
    return states
