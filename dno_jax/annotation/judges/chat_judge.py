"""One model with one rubric: the questions it is asked about a pool, and the judgement that their verdicts make."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from dno_jax.addresses import Purpose, integer
from dno_jax.annotation.judges.forms import LISTWISE, ONE_TOKEN, PAIRWISE, load_rubric
from dno_jax.annotation.judges.replies import TOP_LOGPROBS
from dno_jax.annotation.pool import Pool
from dno_jax.annotation.question import Question, Rounds, Verdict
from dno_jax.config import OpenAISection
from dno_jax.records import Answer, Judgement, JudgementState

Asked = Sequence[tuple[Question, Verdict]]

# Of the reasons why there is no judgement, the first of these that occurs is told: the least of the judge's making.
_WORST_FIRST: tuple[JudgementState, ...] = ("failed", "over budget", "unparsable", "refused")
_FORMS = {"listwise": LISTWISE, "pairwise": PAIRWISE, "logprob": ONE_TOKEN}


class ChatJudge(ABC):
    """One model with one rubric.

    Attributes:
        section: the model and how it is asked.
        rubric: what it is told, and how its replies are read.
        seed: the run's; decides orders, seats, and what is sent as the request's seed.
    """

    def __init__(self, section: OpenAISection, *, seed: int, place: str = "annotation.openai"):
        """Read the rubric.

        Args:
            place: the section's field in the configuration.

        Raises:
            DnoError: no rubric, or one of another form.
        """
        self.section = section
        self.rubric = load_rubric(_FORMS[section.form], section.rubric, place=f"{place}.rubric")
        self.seed = seed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.identity!r})"

    @property
    def judge(self) -> str:
        """What of the judge changes the answer to one question: orders, schedule and seed stand in the questions."""
        section = self.section
        return (
            f"openai {section.model} {section.form} rubric={self.rubric.identity} temperature={section.temperature} "
            f"max_tokens={self._max_tokens}"
        )

    @property
    def identity(self) -> str:
        return f"{self.judge} {self._plan} seed={self.seed}{'' if self.section.send_seed else ' (not sent)'}"

    @abstractmethod
    def rounds(self, pool: Pool, *, repeat: int = 0) -> Rounds: ...

    def question(self, pool: Pool, *, order: tuple[int, ...], repeat: int = 0) -> Question:
        """Ask about some candidates of a pool.

        Args:
            order: [n] indices into the pool; the first is shown first.
        """
        shown = tuple(pool.candidates[index].text for index in order)
        messages = self.rubric.messages(pool.prompt.messages, shown)
        return Question(
            asked=self.section,
            judge=self.judge,
            prompt_id=pool.prompt.prompt_id,
            order=order,
            body=self._body(messages, repeat=repeat),
            read=lambda reply: self.rubric.read(reply, shown),
            schema=self.rubric.schema(len(order)),
            repeat=repeat,
        )

    @property
    @abstractmethod
    def _plan(self) -> str:
        """Which questions are asked."""

    @property
    def _max_tokens(self) -> int:
        return 1 if self.section.form == "logprob" else self.section.max_tokens

    def _body(self, messages: Sequence[dict[str, str]], *, repeat: int) -> dict[str, Any]:
        section = self.section
        body: dict[str, Any] = {
            "model": section.model,
            "messages": messages,
            section.max_tokens_field: self._max_tokens,
        }
        if section.temperature is not None:
            body["temperature"] = section.temperature
        if section.send_seed:
            body["seed"] = integer(Purpose.JUDGE, self.seed, messages, repeat, below=2**31)
        if section.form == "logprob":
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body


def all_answered(asked: Asked) -> bool:
    """Whether every question has an answer: where one has none, the pool has none."""
    return all(verdict.is_answer for _, verdict in asked)


def judgement(
    pool: Pool,
    asked: Asked,
    *,
    judge: str,
    scores: tuple[float, ...] | None = None,
    wins: tuple[tuple[float, ...], ...] | None = None,
    state: JudgementState = "ok",
    detail: str = "",
) -> Judgement:
    """Make the row of a pool from what was asked; exactly one of `scores` and `wins` where it is an answer."""
    words = [verdict.raw for _, verdict in asked]
    return Judgement(
        prompt_id=pool.prompt.prompt_id,
        candidate_ids=pool.candidate_ids,
        judge=judge,
        state=state,
        scores=scores,
        wins=wins,
        raw=words[0] if len(words) == 1 else json.dumps(words, ensure_ascii=False),
        detail=detail,
        answers=tuple(
            Answer(order=question.order, state=verdict.state, scores=verdict.scores, judge=question.judge)
            for question, verdict in asked
        ),
    )


def no_judgement(pool: Pool, asked: Asked, *, judge: str) -> Judgement:
    """Say why there is none: in the words of the first question without an answer, of those in the worst state."""
    states = {verdict.state for _, verdict in asked}
    worst: JudgementState = next(state for state in _WORST_FIRST if state in states)
    detail = next(verdict.detail for _, verdict in asked if verdict.state == worst)
    return judgement(pool, asked, judge=judge, state=worst, detail=detail)
