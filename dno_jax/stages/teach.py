"""Gold responses that the data lacks: a teacher writes them, through the judges' client, store and budget.

A stage of the host's: it depends on the prompts alone, so it may run ahead of sampling, on any machine.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dno_jax.addresses import Purpose, integer
from dno_jax.annotation import late
from dno_jax.annotation.build import open_client
from dno_jax.annotation.client import JudgeClient
from dno_jax.annotation.question import Question, Reader, Reply, Unparsable
from dno_jax.annotation.receipts import closing
from dno_jax.annotation.refusals import is_refusal
from dno_jax.annotation.shortfall import refuse_shortfall
from dno_jax.config import RunConfig, TeacherSection
from dno_jax.console import Meter, say
from dno_jax.data.prompts import PromptSplit, split_prompts
from dno_jax.errors import DnoError
from dno_jax.reasoning import opens_thought, split_thought
from dno_jax.records import Prompt, TaughtResponse
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import Manifest, StageDir
from dno_jax.stages.cut import MUCH

_SHARD_PROMPTS = 256
_HELD_OUT = "held-out"
_CUT = "the response was cut at annotation.teacher.max_tokens"


def run(config: RunConfig, run_dir: RunDir, iteration: int, *, split: PromptSplit | None = None) -> Manifest:
    """Ask for a response to every prompt of iteration t that has none; in iteration 0 to the held-out prompts, too.

    A refused (by the endpoint or in words), empty or unfinished response is dropped and counted: its prompt stays
    without gold. A thought before it is taken off.

    Args:
        split: the run's prompts, where somebody has read them already.

    Raises:
        DnoError: more than `annotation.max_failed` of the requests failed, or the money is spent (run again: only those
            are asked anew); the endpoint cannot be reached; the key is missing.
    """
    start = time.perf_counter()
    section = config.annotation.teacher
    if section is None:
        raise DnoError("annotation.teacher is not set: there is nobody to ask for gold responses")
    stage = run_dir.stage("teach", iteration)
    split = split_prompts(config) if split is None else split
    parts = {stage: split.training[iteration]} | ({_held_out(run_dir): split.held_out} if iteration == 0 else {})
    wanted = {folder: [prompt for prompt in part if prompt.gold is None] for folder, part in parts.items()}
    asked = "".join(prompt.model_dump_json() for part in wanted.values() for prompt in part)
    inputs = {"prompts without gold": hashlib.sha256(asked.encode()).hexdigest()}
    if manifest := stage.finished(config, inputs):
        return manifest
    stage.start(config)
    client = open_client(config.annotation, store_path=str(run_dir.annotations_path))
    teacher = _Teacher(section, client, run_dir, seed=config.seed, max_failed=config.annotation.max_failed)
    asyncio.run(teacher.write_all(wanted, description=f"teach     {iteration}"))
    rows = [row for folder in wanted for row in folder.read(TaughtResponse)]
    states = Counter(row.state for row in rows)
    cut = sum(row.detail == _CUT for row in rows)
    if cut > MUCH * len(rows):
        say(
            f"warning: {cut} of {len(rows)} gold responses were cut at annotation.teacher.max_tokens="
            f"{section.max_tokens} and are dropped: raise it"
        )
    return stage.finish(
        config,
        inputs=inputs,
        rows=len(rows),
        dropped={f"gold response {state}": count for state, count in states.items() if state != "ok"},
        seconds=time.perf_counter() - start,
        details={"teacher": teacher.identity, "states": dict(states), "cut": cut},
    )


@dataclass(frozen=True)
class Taught:
    """What the teacher wrote: prompt id -> text."""

    texts: Mapping[str, str]

    def add(self, prompt: Prompt) -> Prompt:
        """Return a prompt with the teacher's response where it had no gold one."""
        if prompt.gold is not None or prompt.prompt_id not in self.texts:
            return prompt
        return prompt.model_copy(update={"gold": self.texts[prompt.prompt_id]})


def taught(config: RunConfig, run_dir: RunDir, *, iteration: int | None) -> Taught:
    """Read what the teacher wrote, where there is one.

    Args:
        iteration: whose prompts; None for the held-out ones.

    Raises:
        DnoError: the teacher has not been asked yet.
    """
    if config.annotation.teacher is None:
        return Taught({})
    run_dir.stage("teach", iteration or 0).require()
    folder = _held_out(run_dir) if iteration is None else run_dir.stage("teach", iteration)
    return Taught({row.prompt_id: row.text for row in folder.read(TaughtResponse) if row.state == "ok"})


def _held_out(run_dir: RunDir) -> StageDir:
    return run_dir.stage("teach", 0).sub(_HELD_OUT)


@dataclass(frozen=True)
class _Shard:
    """Prompts that are answered together."""

    folder: StageDir
    name: str
    prompts: Sequence[Prompt]

    def is_closed(self, meter: Meter) -> bool:
        """Whether an earlier call closed it with these prompts: others may have come, and moved all that follow."""
        if self.name not in self.folder.shard_names():
            return False
        rows = self.folder.read_shard(TaughtResponse, self.name)
        found = [row.prompt_id for row in rows] == [prompt.prompt_id for prompt in self.prompts]
        meter.advance(len(self.prompts) if found else 0)
        return found


class _Teacher:
    """Asks for responses, shard by shard of prompts."""

    def __init__(self, section: TeacherSection, client: JudgeClient, run_dir: RunDir, *, seed: int, max_failed: float):
        self._section = section
        self._client = client
        self._run_dir = run_dir
        self._seed = seed
        self._max_failed = max_failed
        self._lost: dict[str, TaughtResponse] = {}  # by prompt: what came of it in this call, and is no response

    @property
    def identity(self) -> str:
        section = self._section
        system = f" system=#{hashlib.sha256(section.system.encode()).hexdigest()[:12]}" if section.system else ""
        return (
            f"teacher {section.model} temperature={section.temperature} top_p={section.top_p} "
            f"max_tokens={section.max_tokens}{system} seed={self._seed}"
        )

    async def write_all(self, wanted: Mapping[StageDir, Sequence[Prompt]], *, description: str) -> None:
        """Close every shard; those with a failed request last, and only if few enough failed."""
        shards = [
            _Shard(folder, f"{first:07d}", prompts[first : first + _SHARD_PROMPTS])
            for folder, prompts in wanted.items()
            for first in range(0, len(prompts), _SHARD_PROMPTS)
        ]
        total = sum(map(len, wanted.values()))
        async with closing(self._client, self._run_dir):
            with Meter(description, total=total, unit="prompts") as meter:
                left = await self._close_all([shard for shard in shards if not shard.is_closed(meter)], meter)
                failed = [row for row in self._lost.values() if late.failed_by_server(row.state, row.detail)]
                if failed:
                    await late.pause(len(failed), what="gold responses")
                    for row in failed:
                        del self._lost[row.prompt_id]
                    left = await self._close_all(left, meter)
            self._refuse_if_too_many(total)
            for shard in left:
                shard.folder.write_shard(shard.name, await self._responses(shard.prompts))

    async def _close_all(self, shards: Sequence[_Shard], meter: Meter) -> list[_Shard]:
        """Close those shards of which no request fails, and return the others."""
        left: list[_Shard] = []
        for shard in shards:
            rows = await self._responses(shard.prompts)
            self._lost |= {row.prompt_id: row for row in rows if row.state != "ok"}
            if any(map(_has_failed, rows)):
                left.append(shard)
                continue
            shard.folder.write_shard(shard.name, rows)
            meter.advance(len(rows))
        return left

    async def _responses(self, prompts: Sequence[Prompt]) -> list[TaughtResponse]:
        """The responses to some prompts side by side; after an error the others still come back: they are paid for."""
        rows: list[TaughtResponse] = []
        for outcome in await asyncio.gather(*map(self._respond, prompts), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
            rows.append(outcome)
        return rows

    def _refuse_if_too_many(self, total: int) -> None:
        failed = [row for row in self._lost.values() if _has_failed(row)]
        broke = sum(row.state == "over budget" for row in failed)
        remedy = "raise annotation.max_usd first" if broke else "raise annotation.max_failed to continue without them"
        refuse_shortfall(
            f"annotation.teacher {self._section.model!r}",
            Counter(f"{row.state}: {row.detail}" for row in failed),
            total=total,
            missing="prompts have no response",
            remedy=f"Nothing paid for is lost: run again and only these are asked anew, or {remedy}",
            max_failed=0.0 if broke else self._max_failed,
        )

    async def _respond(self, prompt: Prompt) -> TaughtResponse:
        if lost := self._lost.get(prompt.prompt_id):
            return lost  # asked in this call; the next one asks again
        question = Question(
            asked=self._section,
            judge=self.identity,
            prompt_id=prompt.prompt_id,
            order=(),
            body=self._body(prompt),
            read=_reader(prompt.assistant_prefix),
        )
        verdict = await self._client.ask(question)
        if not verdict.is_answer:
            return TaughtResponse(prompt_id=prompt.prompt_id, state=verdict.state, detail=verdict.detail)
        try:
            text = _response(verdict.raw, prefix=prompt.assistant_prefix)
        except Unparsable as error:  # an answer of a version that read less closely
            return TaughtResponse(prompt_id=prompt.prompt_id, state="unparsable", detail=str(error))
        if is_refusal(text):
            return TaughtResponse(prompt_id=prompt.prompt_id, state="refused", detail="in words")
        return TaughtResponse(prompt_id=prompt.prompt_id, state="ok", text=text)

    def _body(self, prompt: Prompt) -> dict[str, object]:
        section = self._section
        body: dict[str, object] = {"model": section.model, "messages": _messages(prompt, system=section.system)}
        body[section.max_tokens_field] = section.max_tokens
        if section.temperature is not None:
            body["temperature"] = section.temperature
        if section.top_p is not None:
            body["top_p"] = section.top_p
        if section.send_seed:
            body["seed"] = integer(Purpose.TEACHER, self._seed, prompt.prompt_id, below=2**31)
        return body


def _messages(prompt: Prompt, *, system: str) -> list[dict[str, str]]:
    """The prompt's messages; its own system message stands in the place of the section's."""
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    if prompt.assistant_prefix:
        asked = "Begin your response with exactly these words, and go on from there:\n"
        system = "\n\n".join([*([system] if system else []), asked + prompt.assistant_prefix])
    return [{"role": "system", "content": system}, *messages] if system else messages


def _has_failed(row: TaughtResponse) -> bool:
    """Whether no word of the teacher's came back: the next call may have more luck."""
    return row.state in ("failed", "over budget")


def _reader(prefix: str) -> Reader:
    """Read a response: all of it, or it is none. There are no scores."""

    def read(reply: Reply) -> tuple[float, ...]:
        if reply.finish == "length":
            raise Unparsable(_CUT)
        if reply.finish not in ("stop", None):
            raise Unparsable(f"the response ended by {reply.finish!r}, not by 'stop'")
        if reply.is_in_reasoning:
            raise Unparsable("the response is empty: all that came stands in reasoning_content")
        _response(reply.text or "", prefix=prefix)
        return ()

    return read


def _response(text: str, *, prefix: str) -> str:
    """Return a teacher's response without its thought and the words that the turn began with.

    Raises:
        Unparsable: there is none.
    """
    text = text.strip()
    if not opens_thought(prefix):  # else the gold response is to carry the thought
        found = split_thought(text)
        if not found.whole:
            raise Unparsable("the response ends inside its thought")
        text = found.answer.strip()
    if not text.startswith(prefix):
        raise Unparsable("the response does not begin with the prompt's assistant_prefix")
    text = text.removeprefix(prefix)
    if not text.strip():
        raise Unparsable("the response is empty")
    return text
