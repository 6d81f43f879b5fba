"""What is asked of a judge, what it answers, and how a preference function makes one of the other.

A preference function is pure: it says what to ask about a pool, round by round, and makes a judgement of the verdicts.
Who carries the questions (a live client, a batch, the store alone, a plan that only counts them) is no business of its.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from dno_jax.annotation.pool import Pool
from dno_jax.config import ChatSection
from dno_jax.records import Judgement, VerdictState


class Unparsable(Exception):
    """A reply that is no answer; the text says why, and after `BEGINS` how the reply begins."""

    BEGINS = "; it begins "


@dataclass(frozen=True)
class Reply:
    """A chat completion that arrived.

    Attributes:
        text: what the model said; None where it said nothing.
        finish: the endpoint's finish_reason.
        refusal: the endpoint's own word for a refusal, or None.
        model: as the endpoint names it.
        first_logprobs: token -> log-probability (nats) of the most likely first tokens; None if there are none.
        reasoning: what a server's parser took for the model's thought (reasoning_content); None if there is none.
        tokens_in, tokens_out: as the endpoint counted them.
    """

    text: str | None
    finish: str | None = None
    refusal: str | None = None
    model: str = ""
    first_logprobs: Mapping[str, float] | None = None
    reasoning: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def is_in_reasoning(self) -> bool:
        """Whether all that came stands among the reasoning."""
        return not (self.text or "").strip() and bool((self.reasoning or "").strip())

    @property
    def said(self) -> str:
        """The words that came, wherever they stand."""
        return (self.reasoning if self.is_in_reasoning else self.text) or ""


Reader = Callable[[Reply], tuple[float, ...]]
"""Reads a whole reply: one number per candidate shown, in the order shown; raises Unparsable on anything else.

Of a pair the numbers are (p, 1 - p), p the probability that the first shown is better; equal ones are a tie.
"""


@dataclass(frozen=True)
class Question:
    """One request to one judge.

    Attributes:
        asked: the section of the configuration that says whom and how.
        judge: identity of the judge: everything but prompt, candidates and order that changes an answer.
        prompt_id: of the pool that asks.
        order: [n] indices into the pool of the candidates shown, the first shown first.
        body: the chat.completions request, without what only some endpoints take.
        schema: JSON schema of the reply, sent where the endpoint takes one: the same question, asked more clearly.
        read: reads the reply.
        repeat: 0, or which repetition of the same request this is; each is paid for.
    """

    asked: ChatSection
    judge: str
    prompt_id: str
    order: tuple[int, ...]
    body: Mapping[str, Any]
    read: Reader = field(compare=False)
    schema: Mapping[str, Any] | None = None
    repeat: int = 0

    @cached_property
    def key(self) -> str:
        """sha256 of the canonical JSON of judge, request and repetition: what a verdict is stored under."""
        content: dict[str, Any] = {"judge": self.judge, "request": self.body}
        if extras := self.asked.extras:
            content["extras"] = extras
        if self.repeat:
            content["repeat"] = self.repeat
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What one question came to.

    Attributes:
        state: only "ok" and "tie" are answers.
        scores: [n] as `Reader` gives them; None unless it is an answer.
        raw: the judge's own words.
        detail: why there is no answer.
        model: the model as the endpoint names it.
        tries: requests it took.
        tokens_in, tokens_out: what the endpoint counted, over all tries.
        usd: what the tries cost, dollars; 0 where no price is known.
    """

    state: VerdictState
    scores: tuple[float, ...] | None = None
    raw: str = ""
    detail: str = ""
    model: str = ""
    tries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0

    def __post_init__(self) -> None:
        if self.is_answer != (self.scores is not None):
            raise ValueError(f"state {self.state!r} with scores {self.scores}: an answer has scores, nothing else has")

    @property
    def is_answer(self) -> bool:
        return self.state in ("ok", "tie")


Rounds = Generator[Sequence[Question], Sequence[Verdict], Judgement]
"""Yields the questions of a round, is sent their verdicts in the same order, and returns the judgement."""


@runtime_checkable
class PreferenceFunction(Protocol):
    """What to ask about a pool, and what the verdicts come to."""

    @property
    def identity(self) -> str:
        """Everything that changes a judgement: models, rubrics and their versions, parameters, schedule."""
        ...

    def rounds(self, pool: Pool, *, repeat: int = 0) -> Rounds:
        """Begin to judge a pool.

        Args:
            repeat: asks everything anew under other keys, to see how far a judge agrees with itself.
        """
        ...


def advance(rounds: Rounds, verdicts: Sequence[Verdict] | None) -> Sequence[Question] | Judgement:
    """Give a preference function the verdicts of its last round (None at first); return the next round or the end."""
    try:
        return next(rounds) if verdicts is None else rounds.send(verdicts)
    except StopIteration as end:
        return end.value
