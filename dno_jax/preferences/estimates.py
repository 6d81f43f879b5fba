"""What verdicts say of a pool: win rates r_t with their errors, Eq. 8's labels, ranks and cycles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float

from dno_jax.preferences.transforms import LEAST, transformed
from dno_jax.statistics import counted_means

_Real = TypeVar("_Real", float, np.ndarray)


@dataclass(frozen=True)
class WinRates:
    """Each candidate's probability to beat the opponents.

    Attributes:
        rate: estimates of r_t, in [0, 1].
        standard_error: of `rate`, from the spread over the opponents; nan where there are fewer than two.
    """

    rate: Float[np.ndarray, " C"]
    standard_error: Float[np.ndarray, " C"]


def check_preference_matrix(wins: np.ndarray) -> Float[np.ndarray, "C C"]:
    """Return the matrix as float64 if it is one of preference probabilities.

    Raises:
        ValueError: empty or not square, a value outside [0, 1], or P + P^T != 1.
    """
    wins = np.asarray(wins, np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not wins.size:
        raise ValueError(f"a preference matrix is square and not empty, got shape {wins.shape}")
    if not np.all((wins >= 0.0) & (wins <= 1.0)):
        raise ValueError(f"preference probabilities lie in [0, 1], got {wins.min()} to {wins.max()}")
    asymmetry = np.abs(wins + wins.T - 1.0).max()
    if asymmetry > 1e-6:
        raise ValueError(f"P + P^T must be 1 everywhere (so the diagonal 1/2); it is off by {asymmetry:.3g}")
    return wins


def win_rates(
    wins: Float[np.ndarray, "C C"],
    *,
    opponents: Sequence[int] | np.ndarray | None = None,
    own: Sequence[int] | np.ndarray | None = None,
    transform: str = "identity",
) -> WinRates:
    """Return each candidate's mean probability to beat the opponents, itself left out.

    r_i = (sum_j opponents_j P_ij - own_i / 2) / (sum_j opponents_j - own_i).

    - `opponents` = counts of the samples of policy t alone: the unbiased estimate of r_t(x, y) = P(y > pi_t)
      (Algorithm 1, line 3), for the samples (own 1) and for gold (own 0). It is so for each sample, that is with every
      text weighted by its count; given a text and no more, the pools that hold it have more of it than pi_t has.
    - All candidates with gold among them: the paper's estimate (Algorithm 2, line 5). It is unbiased for gold, but for
      a sample E r = (K-1)/K r_t(y) + P(y > y_gold)/K.
    - In a pair of samples each one's rival is among its opponents. Given the pair the difference has mean
      (K-2)/(K-1) (r_t(y1) - r_t(y2)) + (2 P(y1 > y2) - 1)/(K-1).

    The standard error holds the candidate fixed. It is honest for independent opponents and verdicts: where one
    uncertain verdict serves several samples of a text it is too small.

    Args:
        wins: P(row beats column), in [0, 1], wins + wins^T = 1.
        opponents: [C] counts >= 0, how many of the opponent policy's samples gave this text; None: one each.
        own: [C] of 0 or 1, whether the candidate is itself one of the opponents; None: 1 where opponents > 0.
        transform: Psi, of `transforms.transformed`; then it is the mean of Psi(P), of P within [.01, .99].

    Raises:
        ValueError: no preference matrix, an unknown transform, counts of the wrong shape or value, or a candidate
            without opponent.
    """
    wins = transformed(check_preference_matrix(wins), transform, least=LEAST)
    count = wins.shape[0]
    opponents = np.ones(count) if opponents is None else _counts("opponents", opponents, count)
    own = (opponents > 0).astype(np.float64) if own is None else _counts("own", own, count)
    if np.any(own > 1):
        raise ValueError(f"own holds only 0 and 1, got {own.tolist()}")
    if np.any(absent := own > opponents):
        raise ValueError(f"candidate {int(absent.argmax())} has own = 1 but opponents = 0: it cannot be left out")
    times = opponents[None, :] - np.diag(own)  # [C, C]: how often the row meets the column
    met = times.sum(axis=1)
    if np.any(alone := met < 1):
        raise ValueError(f"candidate {int(alone.argmax())} has no opponent left; a win rate needs at least one")
    return WinRates(*counted_means(wins, times))


def _counts(name: str, values: Sequence[int] | np.ndarray, count: int) -> Float[np.ndarray, " C"]:
    values = np.asarray(values, np.float64)
    if values.shape != (count,):
        raise ValueError(f"{name} has shape {values.shape}, expected one value for each of {count} candidates")
    if not np.all((values >= 0) & (values == np.floor(values)) & np.isfinite(values)):
        raise ValueError(f"{name} are counts: whole and not negative, got {values.tolist()}")
    return values


def soft_target(chosen_reward: _Real, rejected_reward: _Real, *, temperature: float = 1.0) -> _Real:
    """Return sigma((r1 - r2) / temperature), the label of Eq. 8, elementwise in float64.

    At temperature 1 and win rates in [0, 1] it lies in [0.269, 0.731]. Temperature c is the rewards r / c; with
    eta / c for eta the target of soft policy iteration, pi_t exp(r / eta), stays as it is (section 5's remark).

    Estimated rewards bias the label, even where the estimates are unbiased, by at most Var((r1 - r2) / temperature)
    over 12 sqrt 3: half the largest |sigma''|, by Taylor's theorem.

    Args:
        chosen_reward, rejected_reward: r1 and r2, numbers or arrays of one shape.
        temperature: > 0, in the unit of the rewards.

    Raises:
        ValueError: temperature <= 0.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return _sigmoid((np.asarray(chosen_reward, np.float64) - np.asarray(rejected_reward, np.float64)) / temperature)


def scores_to_wins(scores: Sequence[float] | np.ndarray, *, temperature: float = 0.0) -> Float[np.ndarray, "C C"]:
    """Return the pairwise verdicts that point-wise scores imply.

    Args:
        scores: [C] points.
        temperature: 0: the higher score wins, equals make 1/2. Above: P = sigma((s_i - s_j) / temperature).

    Raises:
        ValueError: temperature < 0.
    """
    if not temperature >= 0.0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    values = np.asarray(scores, np.float64)
    gaps = values[:, None] - values[None, :]
    return _sigmoid(gaps / temperature) if temperature else 0.5 * (1.0 + np.sign(gaps))


def _sigmoid(x: Any) -> Any:
    # By tanh: exp would overflow, and here sigma(x) + sigma(-x) is 1 but for one rounding.
    return 0.5 * (1.0 + np.tanh(0.5 * x))


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


def count_cycles(wins: Float[np.ndarray, "C C"]) -> int:
    """Return the number of intransitive triples, a > b > c > a by strict majority (P > 1/2)."""
    beats = _majority(wins).astype(np.float64)
    # trace(B^3) meets every directed cycle once per corner. Sums of ones are exact in float64, and float has BLAS.
    return round(float(((beats @ beats) * beats.T).sum())) // 3


def count_decided_triples(wins: Float[np.ndarray, "C C"]) -> int:
    """Return the number of triples that could be cyclic: none of their three pairs stands at 1/2."""
    beats = _majority(wins)
    decided = (beats | beats.T).astype(np.float64)
    return round(float(((decided @ decided) * decided).sum())) // 6


def _majority(wins: np.ndarray) -> Bool[np.ndarray, "C C"]:
    wins = check_preference_matrix(wins)
    # P - P^T > 0 is P > 1/2, and never holds both ways; a mean of verdicts may miss 1/2 by a rounding.
    return wins - wins.T > 1e-12
