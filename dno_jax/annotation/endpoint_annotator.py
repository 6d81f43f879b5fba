"""Judging pools by asking: a preference function says what, a client carries it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from dno_jax.annotation.client import JudgeClient
from dno_jax.annotation.pool import Annotator, Candidate, Pool
from dno_jax.annotation.question import PreferenceFunction, Question, Verdict, advance
from dno_jax.config import OpenAISection
from dno_jax.records import Judgement, Message, Prompt

_SAMPLE = Pool(
    Prompt(prompt_id="probe", messages=(Message(role="user", content="Name a colour."),)),
    (Candidate("probe/0", "Blue."), Candidate("probe/1", "Green.")),
)


class EndpointAnnotator(Annotator):
    """Judges pools by a preference function whose questions a client carries."""

    def __init__(self, function: PreferenceFunction, client: JudgeClient):
        """
        Args:
            client: closed with the annotator.
        """
        self._function = function
        self.client = client

    def __repr__(self) -> str:
        return f"EndpointAnnotator({self.identity!r})"

    @property
    def identity(self) -> str:
        return self._function.identity

    @property
    def width(self) -> int:
        return self.client.width

    @property
    def asks_by_batch(self) -> bool:
        return self.client.asks_by_batch

    @property
    def may_repeat(self) -> bool:
        return True

    def recall(self, pool: Pool, *, repeat: int = 0) -> Judgement | None:
        """Return the judgement if all that it asks is already paid for, else None."""
        found = self._recall(pool, repeat=repeat)
        return found if isinstance(found, Judgement) else None

    def _recall(self, pool: Pool, *, repeat: int) -> Judgement | list[Question]:
        """Return the judgement, or what the pool asks next that the store cannot answer."""
        rounds = self._function.rounds(pool, repeat=repeat)
        verdicts: list[Verdict] | None = None
        while not isinstance(found := advance(rounds, verdicts), Judgement):
            known = [(question, self.client.recall(question)) for question in found]
            if missing := [question for question, verdict in known if verdict is None]:
                return missing
            verdicts = [verdict for _, verdict in known if verdict is not None]
        return found

    async def probe(self, *, patient: bool = True) -> None:
        """Ask every model that is asked first for a sign of life.

        Raises:
            DnoError: saying what is wrong with the endpoint, the key or the model.
        """
        questions = advance(self._function.rounds(_SAMPLE), None)
        assert not isinstance(questions, Judgement)
        for asked in {question.asked: question for question in questions}.values():
            await self.client.probe(asked, patient=patient)

    async def judge(self, pool: Pool, *, repeat: int = 0) -> Judgement:
        """Return the judgement of one pool, round by round; all that arrives is in the store before this returns.

        Args:
            repeat: 0, or which repetition of the same questions this is.

        Raises:
            DnoError: nobody can be asked (a refused key, a dead endpoint), or the store fails.
        """
        rounds = self._function.rounds(pool, repeat=repeat)
        verdicts: list[Verdict] | None = None
        while not isinstance(found := advance(rounds, verdicts), Judgement):
            # After an error the others still come back: they are paid for.
            outcomes = await asyncio.gather(*map(self.client.ask, found), return_exceptions=True)
            verdicts = []
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
                verdicts.append(outcome)
        return found

    async def ask_ahead(self, pools: Sequence[Pool], *, repeat: int = 0) -> None:
        """Ask what the pools need by the Batch API, round after round, where the configuration says so.

        What an earlier run has asked by batch is collected in any case. What comes back is in the store, where `judge`
        finds it; the rest it asks live.
        """
        tried: set[str] = set()
        while True:
            found = [self._recall(pool, repeat=repeat) for pool in pools]
            missing = [question for one in found if not isinstance(one, Judgement) for question in one]
            under_way = self.client.by_batch()
            batched = [question for question in missing if _by_batch(question) or question.key in under_way]
            wanted = [question for question in batched if question.key not in tried]
            if not wanted:
                return
            tried.update(question.key for question in wanted)
            await self.client.ask_by_batch(wanted)

    def refuse_over_budget(self, missing: int) -> None:
        if missing:
            raise self.client.budget.stop(missing=missing)

    async def drain(self) -> None:
        await self.client.drain()

    def receipt(self) -> dict[str, Any]:
        return self.client.receipt()

    async def close(self) -> None:
        await self.client.close()


def _by_batch(question: Question) -> bool:
    return isinstance(question.asked, OpenAISection) and question.asked.batch
