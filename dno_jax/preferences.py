"""From verdicts to training pairs: win rates r_t, and the large-margin pairs of section 5.1. Pure numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class ScoredCandidate:
    """One judged response of a pool.

    Attributes:
        candidate_id: its rollout id.
        reward: points of the rubric, or mean win rate in the pool.
        is_gold: the teacher's response, not a sample of the policy.
        degenerate: an automatic negative, whatever its reward.
    """

    candidate_id: str
    reward: float
    is_gold: bool = False
    degenerate: bool = False


@dataclass(frozen=True)
class PairChoice:
    chosen: ScoredCandidate
    rejected: ScoredCandidate

    @property
    def kind(self) -> str:
        return f"{_who(self.chosen)}>{_who(self.rejected)}"

    @property
    def margin(self) -> float:
        return self.chosen.reward - self.rejected.reward


def _who(candidate: ScoredCandidate) -> str:
    return "gold" if candidate.is_gold else "student"


def check_preference_matrix(wins: np.ndarray) -> Float[np.ndarray, "C C"]:
    """Return the matrix as float64 if it is one of preference probabilities.

    Raises:
        ValueError: not square, a value outside [0, 1], or P + P^T != 1.
    """
    wins = np.asarray(wins, np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1]:
        raise ValueError(f"a preference matrix is square, got shape {wins.shape}")
    if not np.all((wins >= 0.0) & (wins <= 1.0)):
        raise ValueError(f"preference probabilities lie in [0, 1], got {wins.min()} to {wins.max()}")
    asymmetry = np.abs(wins + wins.T - 1.0).max()
    if asymmetry > 1e-6:
        raise ValueError(f"P + P^T must be 1 everywhere (so the diagonal 1/2); it is off by {asymmetry:.3g}")
    return wins


def expected_win_rates(wins: Float[np.ndarray, "C C"]) -> Float[np.ndarray, " C"]:
    """Return each candidate's mean probability to beat the others of its pool (Algorithm 2, line 5).

    This is the paper's estimate of r_t(x, y): the mean over the other K of {y^1..y^K, y_gold}. With a teacher's
    response in the pool it is biased for the student's samples: E r = (K-1)/K r_t(y) + P(y > y_gold)/K.

    Args:
        wins: P(row beats column), in [0, 1], wins + wins^T = 1.
    """
    wins = check_preference_matrix(wins)
    count = wins.shape[0]
    if count < 2:
        raise ValueError("a win rate needs at least two candidates")
    return (wins.sum(axis=1) - np.diagonal(wins)) / (count - 1)


def scores_to_wins(scores: Sequence[float]) -> Float[np.ndarray, "C C"]:
    """Return the pairwise verdicts that point-wise scores imply: 1 for the higher one, 1/2 for equals."""
    values = np.asarray(scores, np.float64)
    return 0.5 * (1.0 + np.sign(values[:, None] - values[None, :]))


def win_matrix(*, wins: Sequence[Sequence[float]] | None, scores: Sequence[float] | None) -> Float[np.ndarray, "C C"]:
    """Return P(row beats column) of one verdict, in whichever form the judge gave it.

    Args:
        wins: [C][C] probabilities of a pairwise judge, or None.
        scores: [C] points of a list-wise judge, or None.

    Raises:
        ValueError: neither or both are given.
    """
    if wins is not None and scores is None:
        return np.asarray(wins, np.float64)
    if scores is not None and wins is None:
        return scores_to_wins(scores)
    raise ValueError("a verdict has either wins or scores; got both, or neither (it is no answer)")


def large_margin_pairs(
    candidates: Sequence[ScoredCandidate],
    *,
    positive_floor: float,
    margin: float,
    student_margin: float,
    max_pairs: int | None = None,
) -> tuple[list[PairChoice], Counter[str]]:
    """Choose the pairs of one prompt by section 5.1's rules, and count what was dropped and why.

    A chosen response has at least `positive_floor` reward and is not degenerate. A pair's gap is at least `margin`, or
    `student_margin` where the chosen response is the student's. A degenerate response is a negative to every chosen
    one. Equal rewards never make a pair, even at margin 0: a tie is no preference.

    Args:
        candidates: the judged pool of one prompt, without duplicates.
        positive_floor, margin, student_margin: in the unit of `reward`.
        max_pairs: keep the widest gaps (then the lower ids); None keeps all.

    Returns:
        The pairs, widest gap first, and reason -> count over the C (C - 1) / 2 unordered pairs that were dropped.
    """
    pairs: list[PairChoice] = []
    dropped: Counter[str] = Counter()
    for i, first in enumerate(candidates):
        for second in candidates[i + 1 :]:
            outcome = _pair(first, second, positive_floor=positive_floor, margin=margin, student_margin=student_margin)
            if isinstance(outcome, PairChoice):
                pairs.append(outcome)
            else:
                dropped[outcome] += 1
    pairs.sort(key=lambda pair: (-pair.margin, pair.chosen.candidate_id, pair.rejected.candidate_id))
    if max_pairs is not None and len(pairs) > max_pairs:
        dropped["over max_pairs_per_prompt"] += len(pairs) - max_pairs
        pairs = pairs[:max_pairs]
    return pairs, dropped


def _pair(
    first: ScoredCandidate, second: ScoredCandidate, *, positive_floor: float, margin: float, student_margin: float
) -> PairChoice | str:
    """The pair these two make, or the reason why they make none."""
    if first.degenerate and second.degenerate:
        return "both degenerate"
    automatic = first.degenerate or second.degenerate
    if automatic:
        chosen, rejected = (second, first) if first.degenerate else (first, second)
    elif first.reward == second.reward:
        return "tie"
    else:
        chosen, rejected = (first, second) if first.reward > second.reward else (second, first)
    if chosen.reward < positive_floor:
        return "chosen below positive_floor"
    least = margin if chosen.is_gold else student_margin
    # Rewards are means of few terms: 0.6 - 0.4 must pass a margin of 0.2 in spite of binary fractions.
    if not automatic and chosen.reward - rejected.reward < least - 1e-9:
        return "below margin"
    return PairChoice(chosen, rejected)


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
