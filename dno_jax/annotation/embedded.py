"""Annotators that ask nobody: criteria, a table of preferences, the teacher by definition, points in the data."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod

import numpy as np

from dno_jax.addresses import Purpose, uniform
from dno_jax.annotation.oracles import majority_matrix, words
from dno_jax.annotation.pool import Annotator, Candidate, Pool, prompt_text
from dno_jax.config import OracleSection, TableSection
from dno_jax.errors import DnoError
from dno_jax.preferences import check_preference_matrix
from dno_jax.records import Judgement


class _Embedded(Annotator):
    """No endpoint and no store: a verdict is a function of the pool, the same every time."""

    @abstractmethod
    def _judge(self, pool: Pool) -> Judgement: ...

    def recall(self, pool: Pool, *, repeat: int = 0) -> Judgement | None:
        judgement = self._judge(pool)
        return judgement if judgement.state == "ok" else None

    async def judge(self, pool: Pool, *, repeat: int = 0) -> Judgement:
        return self._judge(pool)

    def _judgement(
        self,
        pool: Pool,
        *,
        wins: tuple[tuple[float, ...], ...] | None = None,
        scores: tuple[float, ...] | None = None,
        failure: str = "",
    ) -> Judgement:
        return Judgement(
            prompt_id=pool.prompt.prompt_id,
            candidate_ids=pool.candidate_ids,
            judge=self.identity,
            state="failed" if failure else "ok",
            wins=wins,
            scores=scores,
            detail=failure,
        )


class OracleAnnotator(_Embedded):
    """The majority of criteria (`oracles`)."""

    def __init__(self, section: OracleSection):
        """Check the criteria.

        Raises:
            DnoError: an unknown criterion.
        """
        majority_matrix("", (), criteria=section.criteria, target_words=section.target_words)
        self._section = section

    @property
    def identity(self) -> str:
        criteria = ",".join(self._section.criteria)
        return f"oracle majority criteria={criteria} target_words={self._section.target_words}"

    def _judge(self, pool: Pool) -> Judgement:
        wins = majority_matrix(
            prompt_text(pool.prompt),
            [candidate.text for candidate in pool.candidates],
            criteria=self._section.criteria,
            target_words=self._section.target_words,
        )
        return self._judgement(pool, wins=wins)


class TableAnnotator(_Embedded):
    """A preference known exactly, over a few answers: for games that a language model plays.

    A response is the answer that its first word spells, whatever follows. One that is no answer loses to every answer
    for certain, and is as good as another that is none.

    With `draws` every unordered pair of a pool gets one Bernoulli draw of its preference, a fair coin where both are
    equally good. A draw is addressed by seed, prompt and the two candidate ids: neither the order of the pool nor what
    else is in it matters, the same pair is never drawn anew, and other samples or iterations are other candidates.
    """

    def __init__(self, section: TableSection, *, seed: int):
        """Check the table.

        Args:
            seed: part of every draw's address.

        Raises:
            DnoError: answers that repeat or are not one word each; preferences of another size than the answers,
                outside [0, 1], or with P + P^T other than 1.
        """
        self._rank = _ranks(section.answers)
        self._preferences = _checked(section.preferences, count=len(section.answers))
        self._draws = section.draws
        self._seed = seed

    @property
    def identity(self) -> str:
        table = json.dumps([list(self._rank), self._preferences])
        how = f"draws seed={self._seed}" if self._draws else "probabilities"
        return f"table {','.join(self._rank)} #{hashlib.sha256(table.encode()).hexdigest()[:16]} {how}"

    def preference(self, first: str, second: str) -> float:
        """Return P(first beats second) of two responses."""
        row, column = self._find(first), self._find(second)
        if row is None or column is None:
            return 0.5 * (1 + (row is not None) - (column is not None))
        return self._preferences[row][column]

    def _judge(self, pool: Pool) -> Judgement:
        prompt_id = pool.prompt.prompt_id
        wins = tuple(tuple(self._win(prompt_id, row, column) for column in pool.candidates) for row in pool.candidates)
        return self._judgement(pool, wins=wins)

    def _find(self, response: str) -> int | None:
        return self._rank.get(next(iter(words(response)), ""))

    def _win(self, prompt_id: str, row: Candidate, column: Candidate) -> float:
        if row == column:
            return 0.5
        if not self._draws:
            return self.preference(row.text, column.text)
        # Both entries of a pair come from one draw, which asks whether the first by id wins.
        first, second = sorted((row, column), key=lambda candidate: candidate.candidate_id)
        drawn = uniform(Purpose.TABLE, self._seed, prompt_id, first.candidate_id, second.candidate_id)
        return float((drawn < self.preference(first.text, second.text)) == (row == first))


class GoldAnnotator(_Embedded):
    """The teacher's response beats every other, and all others tie: SPIN's pairs; nobody looks at a text."""

    @property
    def identity(self) -> str:
        return "gold beats all"

    def _judge(self, pool: Pool) -> Judgement:
        gold = [name.rpartition("/")[2] == "gold" for name in pool.candidate_ids]
        return self._judgement(pool, wins=tuple(tuple(0.5 * (1 + row - column) for column in gold) for row in gold))


class GivenAnnotator(_Embedded):
    """The points that come with the data, found by the candidate's text (blanks around it aside)."""

    @property
    def identity(self) -> str:
        return "given scores"

    def _judge(self, pool: Pool) -> Judgement:
        given: dict[str, set[float]] = {}
        for response in pool.prompt.candidates:
            if response.score is not None:
                text = pool.prompt.assistant_prefix + response.text
                given.setdefault(text.strip(), set()).add(response.score)
        found = [given.get(candidate.text.strip(), set()) for candidate in pool.candidates]
        # The last part of an id only: the reasons of many pools are counted by their words.
        short = [name.rpartition("/")[2] for name in pool.candidate_ids]
        if missing := [name for name, scores in zip(short, found, strict=True) if not scores]:
            names = ", ".join(missing)
            return self._judgement(pool, failure=f"the prompt's candidates give no score for the text of {names}")
        if torn := [name for name, scores in zip(short, found, strict=True) if len(scores) > 1]:
            names = ", ".join(torn)
            return self._judgement(pool, failure=f"the prompt's candidates give several scores for the text of {names}")
        return self._judgement(pool, scores=tuple(min(scores) for scores in found))


def _ranks(answers: tuple[str, ...]) -> dict[str, int]:
    """Lower-case answer -> its row in the table."""
    place = "annotation.table.answers"
    for answer in answers:
        if words(answer) != [answer.lower()]:
            raise DnoError(f"{place}: {answer!r} is not one word, so no response could begin with it")
    ranks = {answer.lower(): rank for rank, answer in enumerate(answers)}
    if len(ranks) != len(answers):
        raise DnoError(f"{place}: an answer is there twice (case aside): {', '.join(answers)}")
    return ranks


def _checked(preferences: tuple[tuple[float, ...], ...], *, count: int) -> tuple[tuple[float, ...], ...]:
    place = "annotation.table.preferences"
    lengths = [len(row) for row in preferences]
    if lengths != [count] * count:
        raise DnoError(f"{place}: {count} answers need {count} rows of {count}, got rows of {lengths}")
    try:
        check_preference_matrix(np.asarray(preferences))
    except ValueError as error:
        raise DnoError(f"{place}: {error}") from None
    return preferences
