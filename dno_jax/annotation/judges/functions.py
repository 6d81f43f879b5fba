"""The preference functions that ask a language model: list-wise, pairwise, and several of them together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dno_jax.addresses import Purpose, integer
from dno_jax.annotation.judges.chat_judge import ChatJudge, all_answered, judgement, no_judgement
from dno_jax.annotation.judges.schedules import all_pairs, known_wins, tournament
from dno_jax.annotation.pool import Pool, presentation_order
from dno_jax.annotation.question import PreferenceFunction, Question, Rounds, Verdict
from dno_jax.config import AnnotationSection, OpenAISection
from dno_jax.errors import DnoError
from dno_jax.preferences import win_matrix
from dno_jax.records import Judgement


class ListWise(ChatJudge):
    """All candidates in one request, graded by points; over several orders the points are averaged."""

    def rounds(self, pool: Pool, *, repeat: int = 0) -> Rounds:
        questions = [self.question(pool, order=order, repeat=repeat) for order in self._orders(pool)]
        verdicts = yield questions
        asked = list(zip(questions, verdicts, strict=True))
        if not all_answered(asked):
            return no_judgement(pool, asked, judge=self.identity)
        points: list[list[float]] = [[] for _ in pool.candidates]
        for question, verdict in asked:
            for index, score in zip(question.order, verdict.scores or (), strict=True):
                points[index].append(score)
        scores = tuple(math.fsum(own) / len(own) for own in points)
        return judgement(pool, asked, judge=self.identity, scores=scores)

    @property
    def _plan(self) -> str:
        return f"orders={self.section.num_orders}"

    def _orders(self, pool: Pool) -> list[tuple[int, ...]]:
        """Orders that differ, all there are where more are asked for: rotations of one drawn order, then of another.

        Over whole turns every candidate stands in every place equally often, so that a judge's liking for places adds
        the same to all.
        """
        found: dict[tuple[int, ...], None] = {}
        count = len(pool.candidates)
        wanted = min(self.section.num_orders, math.factorial(count))
        draws = itertools.count()
        while len(found) < wanted:
            order = presentation_order(pool, seed=self.seed, draw=next(draws))
            found |= dict.fromkeys(order[shift:] + order[:shift] for shift in range(count))
        return list(found)[:wanted]


class PairWise(ChatJudge):
    """Two candidates per request, in both orders unless told otherwise; the preference is the mean of the two.

    A judge that looks only at places says 1/2 of every pair, of which no training pair is made. Form logprob takes the
    preference from the probabilities of the reply's first token and asks for no more than that one.
    """

    def rounds(self, pool: Pool, *, repeat: int = 0) -> Rounds:
        count = len(pool.candidates)
        if self.section.schedule == "tournament":
            schedule = tournament(presentation_order(pool, seed=self.seed, purpose=Purpose.TOURNAMENT))
        else:
            schedule = all_pairs(count)
        asked: list[tuple[Question, Verdict]] = []
        played: dict[tuple[int, int], float] = {}
        pairs = next(schedule)
        while True:
            orders = [order for pair in pairs for order in self._orders(pool, pair)]
            questions = [self.question(pool, order=order, repeat=repeat) for order in orders]
            verdicts = yield questions
            asked += zip(questions, verdicts, strict=True)
            if not all_answered(asked):
                return no_judgement(pool, asked, judge=self.identity)
            given = {order: verdict.scores or () for order, verdict in zip(orders, verdicts, strict=True)}
            preferences = [_preference(given, pair) for pair in pairs]
            played |= zip(pairs, preferences, strict=True)
            try:
                pairs = schedule.send(preferences)
            except StopIteration:
                break
        return judgement(pool, asked, judge=self.identity, wins=known_wins(played, num_candidates=count))

    @property
    def _plan(self) -> str:
        return f"{self.section.schedule} {'both orders' if self.section.both_orders else 'one order'}"

    def _orders(self, pool: Pool, pair: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """The orders that a pair is shown in: of one only, which is a function of the two ids, not of the schedule."""
        first, second = sorted(pair, key=lambda index: pool.candidate_ids[index])
        if not self.section.both_orders:
            ids = pool.candidate_ids[first], pool.candidate_ids[second]
            turned = integer(Purpose.SHOWN_FIRST, self.seed, pool.prompt.prompt_id, *ids, below=2)
            yield (second, first) if turned else (first, second)
            return
        yield first, second
        yield second, first


class Ensemble:
    """Several judges: the mean of their preferences. One without an answer leaves the pool without a judgement."""

    def __init__(self, members: Sequence[PreferenceFunction]):
        self.members = tuple(members)

    def __repr__(self) -> str:
        return f"Ensemble({self.identity!r})"

    @property
    def identity(self) -> str:
        return "ensemble of " + "; ".join(member.identity for member in self.members)

    def rounds(self, pool: Pool, *, repeat: int = 0) -> Rounds:
        """Run the members' rounds side by side; the points of a list-wise one count by which are higher."""
        open_rounds = {number: member.rounds(pool, repeat=repeat) for number, member in enumerate(self.members)}
        waiting = {number: next(rounds) for number, rounds in open_rounds.items()}
        judgements: list[Judgement] = []
        asked: list[tuple[Question, Verdict]] = []
        while waiting:
            questions = [question for own in waiting.values() for question in own]
            verdicts = yield questions
            asked += zip(questions, verdicts, strict=True)
            if not all_answered(asked):
                return no_judgement(pool, asked, judge=self.identity)
            coming = iter(verdicts)
            for number, own in list(waiting.items()):
                try:
                    waiting[number] = open_rounds[number].send(list(itertools.islice(coming, len(own))))
                except StopIteration as end:
                    judgements.append(end.value)
                    del waiting[number]
        found = [win_matrix(wins=own.wins, scores=own.scores) for own in judgements]
        wins = tuple(tuple(row) for row in np.mean(found, axis=0).tolist())
        return judgement(pool, asked, judge=self.identity, wins=wins)


def build_function(section: AnnotationSection, *, seed: int) -> PreferenceFunction:
    """Build what a configuration of kind openai or ensemble asks for.

    Args:
        seed: the run's, in [0, 2^31).

    Raises:
        DnoError: another kind, no rubric, or a rubric of another form than its judge's.
    """
    if section.kind == "openai":
        return _build_judge(section.openai, seed=seed, place="annotation.openai")
    if section.kind == "ensemble":
        judges = enumerate(section.ensemble)
        return Ensemble([_build_judge(own, seed=seed, place=f"annotation.ensemble.{i}") for i, own in judges])
    raise DnoError(f"annotation.kind={section.kind}: asks no language model; kinds that do: openai, ensemble")


def _build_judge(section: OpenAISection, *, seed: int, place: str) -> ListWise | PairWise:
    kind = ListWise if section.form == "listwise" else PairWise
    return kind(section, seed=seed, place=place)


def _preference(given: Mapping[tuple[int, int], Sequence[float]], pair: tuple[int, int]) -> float:
    """P(first beats second), the mean over the orders that the pair was shown in."""
    first, second = pair
    found = [given[order][order.index(first)] for order in (pair, (second, first)) if order in given]
    return math.fsum(found) / len(found)
