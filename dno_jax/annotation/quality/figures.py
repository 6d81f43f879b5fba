"""How good a judge is, from its own answers: does order decide, does length, does it agree with itself and with people?

Figures are gathered judgement by judgement, in sums and one number per candidate. Where it matters, only pairs that the
judge compared count: what a schedule infers of the others is no verdict.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from dno_jax.annotation.quality.histogram import histogram
from dno_jax.preferences import count_cycles, count_decided_triples, win_matrix
from dno_jax.records import Answer, Judgement, Source
from dno_jax.statistics import Tally

_ROUNDING = 1e-9  # means of few verdicts miss a tie by less
_STUDENTS = ("policy", "mixture")


class Response(NamedTuple):
    """What is asked about a candidate: how many words it has, and who wrote it."""

    words: int
    source: Source


class Quality:
    """Figures of one judge over one iteration; see `figures` for what they are."""

    def __init__(self) -> None:
        self._shares: defaultdict[str, Tally] = defaultdict(Tally)
        self._positions: defaultdict[int, Tally] = defaultdict(Tally)
        self._scores: defaultdict[str, Tally] = defaultdict(Tally)
        self._points: defaultdict[str, array[float]] = defaultdict(partial(array, "d"))
        self._alone: defaultdict[str, Tally] = defaultdict(Tally)  # of an ensemble's judges
        self._answers: Counter[str] = Counter()

    def add(self, judgement: Judgement, *, responses: Mapping[str, Response]) -> None:
        """Add one judgement. One without a verdict counts by the states of its answers alone.

        Args:
            responses: of every candidate, by id.

        Raises:
            KeyError: a candidate that `responses` has not.
        """
        self._answers.update(answer.state for answer in judgement.answers)
        if judgement.state != "ok":
            return
        self._add_answers([answer for answer in judgement.answers if answer.scores is not None])
        self._add_verdict(judgement, [responses[name] for name in judgement.candidate_ids])
        self._add_members(judgement)

    def add_repeat(self, first: Judgement, again: Judgement) -> None:
        """Add two judgements of one pool, asked apart; nothing is added unless both are verdicts.

        Raises:
            ValueError: they judge different candidates.
        """
        if first.candidate_ids != again.candidate_ids:
            raise ValueError(
                f"prompt {first.prompt_id!r}: a repeated judgement is of the same candidates in the same order, "
                f"got {first.candidate_ids} and {again.candidate_ids}"
            )
        if first.state != "ok" or again.state != "ok":
            return
        here, there = _wins(first), _wins(again)
        pairs = _compared(first) & _compared(again)
        alike = [1.0 - abs(_half_steps(here[pair]) - _half_steps(there[pair])) for pair in pairs]
        self._shares["repeat_agreement"].add(sum(alike), len(alike))
        if first.scores is not None and again.scores is not None:
            same = [a == b for a, b in zip(first.scores, again.scores, strict=True)]
            self._shares["repeat_same_score"].add(sum(same), len(same))

    def add_label(self, judgement: Judgement, preference: float) -> None:
        """Add a judgement of a labelled pair; unless it is a verdict, it counts as missing and no more.

        Args:
            judgement: of two candidates.
            preference: the label, P(first candidate beats second) in [0, 1]; 1/2 is undecided.

        Raises:
            ValueError: not two candidates, or a label outside [0, 1].
        """
        if len(judgement.candidate_ids) != 2 or not 0.0 <= preference <= 1.0:
            raise ValueError(
                f"{judgement.prompt_id!r}: a label is P(first beats second) in [0, 1] of two candidates, "
                f"got {preference} of {len(judgement.candidate_ids)}"
            )
        self._shares["calibration_missing"].add(judgement.state != "ok", 1)
        if judgement.state != "ok":
            return
        judged = float(_wins(judgement)[0, 1])
        self._shares["calibration_error"].add(abs(judged - preference), 1)
        if (label := _half_steps(preference)) != 0.5:
            self._shares["calibration_agreement"].add(1.0 - abs(_half_steps(judged) - label), 1)

    def figures(self) -> dict[str, Any]:
        """Return everything that has been seen; what has not been is left out.

        Each share is {value, low, high, n, prompts}: its mean, 95 % interval, and number of comparisons and prompts.

        - flip_rate: of two answers about a pair in different orders, both decided, how often they contradict.
        - answer_tie_rate: how often an answer leaves a pair it shows equal; tie_rate: how often all answers to it do.
        - first_wins: P(the response shown first beats another one | decided), the mean of the judge's own probabilities
          where it gives them; 1/2 where order has no say.
        - first_on_top: list-wise, how often the first shown has the most points (1/k where k have), and its `chance`.
        - points_by_position: list-wise, points above the mean of the answer, by place in the order shown.
        - longer_wins: P(the response of more words wins | decided, lengths differ).
        - repeat_agreement: 1 - |difference| of the verdicts (0, 1/2, 1) of a pair that was asked about again;
          repeat_same_score: how often a response gets exactly its points again.
        - calibration_agreement: share of decided labels that the judge agrees with, a tie being half;
          calibration_error: mean |P(judge) - label|; calibration_missing: labelled pairs without a verdict.
        - cyclic_share: pairwise, of triples whose three pairs are decided, those that are cyclic.
        - loudest_judge: of an ensemble, how often its mean sides with one judge against the mean of the others, a tie
          being half: the judge of whom that is most often so, by name.
        - gold_wins: mean P(gold beats a student's response).
        - scores: points (or mean win rates in the pool) by source: `mean` and histogram (lower edge -> count).
        - answers: state -> count.
        """
        found: dict[str, Any] = {name: tally.share().as_dict() for name, tally in self._shares.items() if tally.count}
        if chance := found.pop("chance", None):
            found["first_on_top"]["chance"] = chance["value"]
        if self._alone:
            judge, tally = max(self._alone.items(), key=lambda item: item[1].mean)
            found["loudest_judge"] = tally.share().as_dict() | {"judge": judge}
        if self._positions:
            found["points_by_position"] = [tally.points().as_dict() for _, tally in sorted(self._positions.items())]
        if self._scores:
            means = {source: tally.points().as_dict() for source, tally in sorted(self._scores.items())}
            found["scores"] = {"mean": means, **histogram(self._points)}
        if self._answers:
            found["answers"] = dict(self._answers)
        return found

    def _add_answers(self, answers: Sequence[Answer]) -> None:
        """Count what the order of presentation has a say in."""
        # Of each judge and pair, lower index first, every answer that decides it: its order, and who is ahead.
        decided: defaultdict[tuple[str, int, int], list[tuple[tuple[int, ...], bool]]] = defaultdict(list)
        shown = ties = first_decided = 0
        first = 0.0
        for answer in answers:
            scored = list(zip(answer.order, answer.scores or (), strict=True))
            shown += len(scored) * (len(scored) - 1) // 2
            for place, (row, score) in enumerate(scored):
                for column, other in scored[place + 1 :]:
                    if abs(score - other) <= _ROUNDING:
                        ties += 1
                        continue
                    if place == 0:
                        first_decided += 1
                        # A one-token verdict on a pair is a probability, and a liking for places may shift it by less
                        # than turns the decision.
                        first += score if len(scored) == 2 and abs(score + other - 1.0) <= _ROUNDING else score > other
                    if row < column:
                        decided[answer.judge, row, column].append((answer.order, score > other))
                    else:
                        decided[answer.judge, column, row].append((answer.order, other > score))
        flips = [
            one != another
            for found in decided.values()
            for (order, one), (other_order, another) in combinations(found, 2)
            if order != other_order
        ]
        self._shares["answer_tie_rate"].add(ties, shown)
        self._shares["first_wins"].add(first, first_decided)
        self._shares["flip_rate"].add(sum(flips), len(flips))
        self._add_positions([answer.scores for answer in answers if answer.scores and len(answer.scores) > 2])

    def _add_positions(self, lists: Sequence[Sequence[float]]) -> None:
        by_position: defaultdict[int, list[float]] = defaultdict(list)
        on_top = chance = 0.0
        for scores in lists:
            mean, top = sum(scores) / len(scores), max(scores)
            chance += 1.0 / len(scores)
            if scores[0] == top:
                on_top += 1.0 / scores.count(top)
            for position, score in enumerate(scores):
                by_position[position].append(score - mean)
        self._shares["first_on_top"].add(on_top, len(lists))
        self._shares["chance"].add(chance, len(lists))
        for position, points in by_position.items():
            self._positions[position].add(sum(points), len(points))

    def _add_members(self, judgement: Judgement) -> None:
        """Count, of an ensemble, whose side its mean takes where one judge contradicts the mean of the others."""
        said = _said(judgement)
        if len({judge for judge, *_ in said}) < 2:
            return
        counts: defaultdict[str, list[float]] = defaultdict(list)
        by_pair: defaultdict[tuple[int, int], dict[str, float]] = defaultdict(dict)
        for (judge, row, column), found in said.items():
            by_pair[row, column][judge] = sum(found) / len(found) - 0.5
        for leads in by_pair.values():
            for judge, lead in leads.items() if len(leads) > 1 else ():
                rest = (sum(leads.values()) - lead) / (len(leads) - 1)
                if lead * rest < 0.0 and min(abs(lead), abs(rest)) > _ROUNDING:
                    both = sum(leads.values()) * lead
                    counts[judge].append(0.5 if abs(both) <= _ROUNDING else float(both > 0.0))
        for judge, sided in counts.items():
            self._alone[judge].add(sum(sided), len(sided))

    def _add_verdict(self, judgement: Judgement, responses: Sequence[Response]) -> None:
        wins, compared = _wins(judgement), _compared(judgement)
        preferences = wins.tolist()
        gold = [response.source == "gold" for response in responses]
        student = [response.source in _STUDENTS for response in responses]
        ties = longer = unequal = 0
        gold_wins: list[float] = []
        for row, column in compared:
            preference, more = preferences[row][column], responses[row].words - responses[column].words
            if abs(preference - 0.5) <= _ROUNDING:
                ties += 1
            elif more:
                unequal += 1
                longer += (preference > 0.5) == (more > 0)
            if gold[row] and student[column]:
                gold_wins.append(preference)
            elif gold[column] and student[row]:
                gold_wins.append(1.0 - preference)
        self._shares["tie_rate"].add(ties, len(compared))
        self._shares["longer_wins"].add(longer, unequal)
        self._shares["gold_wins"].add(sum(gold_wins), len(gold_wins))
        if judgement.scores is None:  # points are transitive
            known = _only(wins, compared)
            self._shares["cyclic_share"].add(count_cycles(known), count_decided_triples(known))
        scores = judgement.scores or ((wins.sum(axis=1) - 0.5) / (len(wins) - 1)).tolist()
        self._add_scores(scores, responses)

    def _add_scores(self, scores: Sequence[float], responses: Sequence[Response]) -> None:
        by_source: defaultdict[str, list[float]] = defaultdict(list)
        for response, score in zip(responses, scores, strict=True):
            by_source["student" if response.source in _STUDENTS else response.source].append(score)
        for source, points in by_source.items():
            self._scores[source].add(sum(points), len(points))
            self._points[source].extend(points)


def scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of `Quality.figures` alone, flat, as a line of metrics takes them."""
    found = {name: figure["value"] for name, figure in figures.items() if "value" in figure}
    means = figures["scores"]["mean"] if "scores" in figures else {}
    return found | {f"score_{source}": mean["value"] for source, mean in means.items()}


def _wins(judgement: Judgement) -> np.ndarray:
    return win_matrix(wins=judgement.wins, scores=judgement.scores)


def _said(judgement: Judgement) -> dict[tuple[str, int, int], list[float]]:
    """What each judge said of each pair, lower index first: P(first beats second), of points 0, 1/2 or 1."""
    found: defaultdict[tuple[str, int, int], list[float]] = defaultdict(list)
    for answer in judgement.answers:
        scored = list(zip(answer.order, answer.scores or (), strict=False))
        for (row, score), (column, other) in combinations(scored, 2):
            is_pair = len(scored) == 2 and abs(score + other - 1.0) <= _ROUNDING
            p = score if is_pair else _half_steps(0.5 + 0.5 * (score - other))
            found[answer.judge, min(row, column), max(row, column)].append(p if row < column else 1.0 - p)
    return found


def _compared(judgement: Judgement) -> set[tuple[int, int]]:
    """The pairs, lower index first, that an answer shows side by side; all of them where no answer shows two."""
    count = len(judgement.candidate_ids)
    orders = [answer.order for answer in judgement.answers if len(answer.order) > 1]
    if not orders or max(map(len, orders)) == count:
        return set(combinations(range(count), 2))
    return {(min(pair), max(pair)) for order in orders for pair in combinations(order, 2)}


def _only(wins: np.ndarray, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """The matrix with all other pairs undecided."""
    known = np.full_like(wins, 0.5)
    for row, column in pairs:
        known[row, column], known[column, row] = wins[row, column], wins[column, row]
    return known


def _half_steps(preference: float) -> float:
    """The verdict that a probability comes to: 0, 1/2 or 1."""
    lead = preference - 0.5
    return 0.5 if abs(lead) <= _ROUNDING else float(lead > 0)
