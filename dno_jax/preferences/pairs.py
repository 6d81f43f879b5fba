"""Rules that make training pairs of a judged pool: section 5.1's, its variants', and the neighbouring methods'.

A rule returns its pairs, widest gap first and then by id, and the reasons of the pairs that it dropped: reason -> count
over the C (C - 1) / 2 unordered pairs of the pool. Each of them is either returned or counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from dno_jax.preferences.estimates import check_preference_matrix

_SOURCES = ("student", "gold", "data")
# Rewards are means of few terms: in spite of binary fractions 0.6 - 0.4 must pass a margin of 0.2, and 0.1 + 0.2 tie
# with 0.3.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class ScoredCandidate:
    """One judged response of a pool.

    Attributes:
        candidate_id: its rollout id.
        reward: points of the rubric, or mean win rate in the pool.
        source: "student" (a sample of the policy), "gold" (the teacher's) or "data" (neither: from a data set).
        degenerate: for `large_margin_pairs` an automatic negative, whatever its reward; other rules go by the reward.
        count: how many samples gave this text, >= 1.
    """

    candidate_id: str
    reward: float
    source: str = "student"
    degenerate: bool = False
    count: int = 1

    def __post_init__(self) -> None:
        if self.source not in _SOURCES:
            raise ValueError(f"candidate {self.candidate_id!r}: source is one of {_SOURCES}, got {self.source!r}")
        if self.count < 1:
            raise ValueError(f"candidate {self.candidate_id!r}: count must be >= 1, got {self.count}")

    @property
    def is_gold(self) -> bool:
        return self.source == "gold"


@dataclass(frozen=True)
class PairChoice:
    """Two candidates in order of preference.

    Attributes:
        weight: how many pairs of samples this pair of texts stands for.
        preference: P(chosen beats rejected) where the rule knows it directly, else None.
    """

    chosen: ScoredCandidate
    rejected: ScoredCandidate
    weight: float = 1.0
    preference: float | None = None

    @property
    def kind(self) -> str:
        return f"{self.chosen.source}>{self.rejected.source}"

    @property
    def margin(self) -> float:
        return self.chosen.reward - self.rejected.reward


def large_margin_pairs(
    candidates: Sequence[ScoredCandidate],
    *,
    positive_floor: float,
    margin: float,
    student_margin: float,
    max_pairs: int | None = None,
    winner: str = "any",
) -> tuple[list[PairChoice], Counter[str]]:
    """Choose the pairs of one prompt by section 5.1's rules.

    A chosen response has at least `positive_floor` reward and is not degenerate. A pair's gap is at least `margin`, or
    `student_margin` where the chosen response is the student's. A degenerate response is a negative to every chosen
    one. Equal rewards never make a pair, even at margin 0: a tie is no preference.

    Args:
        candidates: the judged pool of one prompt, without duplicates.
        positive_floor, margin, student_margin: in the unit of `reward`.
        max_pairs: keep the widest gaps (then the lower ids); None keeps all.
        winner: "any", or "gold" for DNO-Restrictive: of these pairs only those that the teacher wins.
    """
    if winner not in ("any", "gold"):
        raise ValueError(f'winner is "any" or "gold", got {winner!r}')
    _check_rewards(candidates)

    def rule(first: ScoredCandidate, second: ScoredCandidate) -> PairChoice | str:
        if first.degenerate and second.degenerate:
            return "both degenerate"
        automatic = first.degenerate or second.degenerate
        if automatic:
            chosen, rejected = (second, first) if first.degenerate else (first, second)
        elif _equal(first.reward, second.reward):
            return "tie"
        else:
            chosen, rejected = _by_reward(first, second)
        if chosen.reward < positive_floor:
            return "chosen below positive_floor"
        least = student_margin if chosen.source == "student" else margin
        if not automatic and chosen.reward - rejected.reward < least - _ROUNDING:
            return "below margin"
        # Last, so that the other counts are those of "any" and this one is what the restriction costs.
        return PairChoice(chosen, rejected) if winner == "any" or chosen.is_gold else "winner is not gold"

    pairs, dropped = _walk(candidates, rule)
    if max_pairs is not None and len(pairs) > max_pairs:
        dropped["over max_pairs_per_prompt"] += len(pairs) - max_pairs
        pairs = pairs[:max_pairs]
    return pairs, dropped


def spin_pairs(candidates: Sequence[ScoredCandidate]) -> tuple[list[PairChoice], Counter[str]]:
    """Let gold beat every sample of the student, whatever the rewards (SPIN); weighted by count."""
    gold_there = any(candidate.is_gold for candidate in candidates)

    def rule(first: ScoredCandidate, second: ScoredCandidate) -> PairChoice | str:
        chosen, rejected = (first, second) if first.is_gold else (second, first)
        if chosen.is_gold and rejected.source == "student":
            return _weighted(chosen, rejected)
        if not gold_there:
            return "no gold"
        return "both students" if first.source == second.source == "student" else "not gold against student"

    return _walk(candidates, rule)


def best_worst_pair(
    candidates: Sequence[ScoredCandidate], *, margin: float = 0.0
) -> tuple[list[PairChoice], Counter[str]]:
    """Set the highest reward against the lowest (Self-Rewarding, INPO); among equals the smaller id stands for them.

    Args:
        margin: the least gap, in the unit of `reward`. Where all rewards are equal there is no pair at any margin.
    """
    _check_rewards(candidates)
    if not candidates:
        return [], Counter()
    rewards = [candidate.reward for candidate in candidates]
    best, worst = (
        min(candidate.candidate_id for candidate in candidates if _equal(candidate.reward, extreme))
        for extreme in (max(rewards), min(rewards))
    )

    def rule(first: ScoredCandidate, second: ScoredCandidate) -> PairChoice | str:
        if best == worst:
            return "tie"
        if {first.candidate_id, second.candidate_id} != {best, worst}:
            return "not best against worst"
        pair = PairChoice(*_by_reward(first, second))
        return "below margin" if pair.margin < margin - _ROUNDING else pair

    return _walk(candidates, rule)


def all_pairs(candidates: Sequence[ScoredCandidate], *, keep_ties: bool) -> tuple[list[PairChoice], Counter[str]]:
    """Take every pair, the higher reward chosen (Algorithm 1, line 4), weighted by the product of the counts.

    Args:
        keep_ties: keep pairs of equal rewards, the smaller id chosen: Eq. 8's label 1/2 is information too.
    """
    _check_rewards(candidates)

    def rule(first: ScoredCandidate, second: ScoredCandidate) -> PairChoice | str:
        if _equal(first.reward, second.reward) and not keep_ties:
            return "tie"
        return _weighted(*_by_reward(first, second))

    return _walk(candidates, rule)


def verdict_pairs(
    candidates: Sequence[ScoredCandidate], wins: Float[np.ndarray, "C C"], *, keep_ties: bool
) -> tuple[list[PairChoice], Counter[str]]:
    """Take every pair by its own verdict, not by the rewards (iterative DPO, IPO, INPO), weighted by the counts.

    A pair's gap is here its preference, P(chosen beats rejected) >= 1/2.

    Args:
        wins: P(row beats column), rows in order of the candidates.
        keep_ties: keep pairs of preference 1/2, the smaller id chosen.

    Raises:
        ValueError: no preference matrix, or not one of these candidates.
    """
    wins = check_preference_matrix(wins)
    if len(wins) != len(candidates):
        raise ValueError(f"the verdict is of {len(wins)} candidates, expected the {len(candidates)} of the pool")
    row = {candidate.candidate_id: i for i, candidate in enumerate(candidates)}

    def preference(winner: ScoredCandidate, loser: ScoredCandidate) -> float:
        return float(wins[row[winner.candidate_id], row[loser.candidate_id]])

    def rule(first: ScoredCandidate, second: ScoredCandidate) -> PairChoice | str:
        ours, theirs = preference(first, second), preference(second, first)
        if _equal(ours, theirs) and not keep_ties:
            return "tie"
        chosen, rejected = _in_order(first, second, ours, theirs)
        return _weighted(chosen, rejected, preference=preference(chosen, rejected))

    return _walk(candidates, rule)


def matched_pairs(
    candidates: Sequence[ScoredCandidate], *, rng: np.random.Generator
) -> tuple[list[PairChoice], Counter[str]]:
    """Draw partners at random, each candidate in at most one pair: for losses per response (SPPO, SPO, Nash-MD-PG).

    The higher reward is chosen, of equals the smaller id.

    Returns:
        The pairs, and dropped *responses* by reason (not pairs, unlike the other rules): the odd one out, or none.

    Raises:
        ValueError: a count above 1; a response that stands for several would be in several pairs.
    """
    _check_rewards(candidates)
    for candidate in candidates:
        if candidate.count != 1:
            raise ValueError(
                f"candidate {candidate.candidate_id!r} stands for {candidate.count} samples; matching needs one "
                "candidate for each sample"
            )
    order = [candidates[i] for i in rng.permutation(len(candidates))]
    pairs = [PairChoice(*_by_reward(*partners)) for partners in zip(order[::2], order[1::2], strict=False)]
    return sorted(pairs, key=_order), Counter({"odd one out": 1} if len(order) % 2 else {})


def _walk(
    candidates: Sequence[ScoredCandidate], rule: Callable[[ScoredCandidate, ScoredCandidate], PairChoice | str]
) -> tuple[list[PairChoice], Counter[str]]:
    """Ask the rule for the pair that each two candidates make, or for the reason why they make none."""
    _check_unique("candidate", (candidate.candidate_id for candidate in candidates))
    outcomes = [rule(first, second) for first, second in combinations(candidates, 2)]
    pairs = sorted((outcome for outcome in outcomes if isinstance(outcome, PairChoice)), key=_order)
    return pairs, Counter(outcome for outcome in outcomes if isinstance(outcome, str))


def _order(pair: PairChoice) -> tuple[float, str, str]:
    gap = pair.margin if pair.preference is None else pair.preference
    # Rules that need no reward may meet nan, which has no place in an order.
    return (0.0 if math.isnan(gap) else -gap, pair.chosen.candidate_id, pair.rejected.candidate_id)


def _check_rewards(candidates: Sequence[ScoredCandidate]) -> None:
    for candidate in candidates:
        if math.isnan(candidate.reward):
            raise ValueError(f"candidate {candidate.candidate_id!r} has reward nan; this rule compares rewards")


def _equal(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=0.0, abs_tol=_ROUNDING)


def _by_reward(first: ScoredCandidate, second: ScoredCandidate) -> tuple[ScoredCandidate, ScoredCandidate]:
    return _in_order(first, second, first.reward, second.reward)


def _in_order(
    first: ScoredCandidate, second: ScoredCandidate, ours: float, theirs: float
) -> tuple[ScoredCandidate, ScoredCandidate]:
    """The one with the higher value, then the other; of equals the smaller id first."""
    ahead = first.candidate_id < second.candidate_id if _equal(ours, theirs) else ours > theirs
    return (first, second) if ahead else (second, first)


def _weighted(chosen: ScoredCandidate, rejected: ScoredCandidate, *, preference: float | None = None) -> PairChoice:
    return PairChoice(chosen, rejected, weight=float(chosen.count * rejected.count), preference=preference)


def _check_unique(what: str, ids: Iterable[str]) -> None:
    for name, count in Counter(ids).items():
        if count > 1:
            raise ValueError(f"{what} {name!r} is there {count} times; ids must be unique")


def repeated_ngram_share(token_ids: Sequence[int], n: int) -> float:
    """Return the share of n-grams that repeat an earlier one, in [0, 1]; 0 for sequences shorter than n."""
    total = len(token_ids) - n + 1
    if total < 1:
        return 0.0
    distinct = {tuple(token_ids[i : i + n]) for i in range(total)}
    return 1.0 - len(distinct) / total


def replay_counts(available: Sequence[int], *, num_new: int, fraction: float, decay: float) -> list[int]:
    """Return how many old pairs to mix in, by age, so that each age's share of the whole stays at most its cap.

    The share of the mixed set that may come from `age` iterations back is fraction * decay^(age-1): 0.3, 0.15, ... in
    the paper. Shares are of the new mix (the paper leaves open of which set); where an age has too few pairs, the
    others are not raised above their caps.

    Args:
        available: pairs on hand by age, youngest (t-1) first.
        num_new: pairs built in this iteration.
        fraction, decay: see above.
    """
    counts = [0] * len(available)
    shares = [fraction * decay**age for age in range(len(available))]
    # With every age at its cap the mix has num_new / (1 - sum of shares) pairs; an age with fewer pairs than its cap
    # makes the mix smaller and with it every other cap, so lower the total until it is consistent.
    total = float(num_new + sum(available))
    for _ in range(64):
        counts = [min(have, int(share * total + 1e-9)) for have, share in zip(available, shares, strict=True)]
        mixed = num_new + sum(counts)
        if mixed >= total:
            break
        total = float(mixed)
    return counts
