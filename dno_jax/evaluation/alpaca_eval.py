"""AlpacaEval 2.0's arithmetic: win rate, its standard error, and the length-controlled win rate (arXiv 2404.04475).

Preferences are AlpacaEval's: 1 where the reference is better, 2 where the model is, 1.5 for a draw.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

STRENGTHS = np.logspace(-4.0, 4.0, 10)  # C: how little the weights are shrunk
_FOLDS = 5
_GAMED_WEIGHT = 0.1  # of each row of the two gamed baselines: a fifth in all
_FEATURES = 3
_MOST_STEPS = 100


def shows_model_first(instruction: str) -> bool:
    """Return whether AlpacaEval shows the judge the model's output first, the reference's second."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True], k=1)[0]


@dataclass(frozen=True)
class Scores:
    """A row of the leaderboard, in per cent where it has rates.

    Attributes:
        standard_error: of `win_rate`; nan of one preference.
        discrete_win_rate: every preference rounded to a win, a loss or a draw.
        n_total: preferences; those that are nan (a judge's reply that was no answer) are left out.
    """

    win_rate: float
    standard_error: float
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    discrete_win_rate: float


def scores(preferences: Sequence[float] | Float[np.ndarray, " N"]) -> Scores:
    """Return a model's scores.

    Args:
        preferences: in [1, 2]; 0 is an old spelling of 1.5; nan where there is none.

    Raises:
        ValueError: there is no preference, or one outside [1, 2].
    """
    found = np.asarray(preferences, np.float64)
    found = np.where(found == 0.0, 1.5, found)
    found = found[~np.isnan(found)]
    if not found.size or found.min() < 1.0 or found.max() > 2.0:
        raise ValueError(f"expected preferences in [1, 2], at least one, got {found.size} of them")
    won, count = found - 1.0, found.size
    drawn = found == 1.5
    discrete = np.where(drawn, 0.5, np.round(found) - 1.0)
    return Scores(
        win_rate=100.0 * float(won.mean()),
        standard_error=100.0 * float(won.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan,
        n_wins=int((won > 0.5).sum()),
        n_wins_base=int((won < 0.5).sum()),
        n_draws=int(drawn.sum()),
        n_total=count,
        discrete_win_rate=100.0 * float(discrete.mean()),
    )


@dataclass(frozen=True)
class Rows:
    """A model's rows as the regression has them.

    Attributes:
        place: position in the official file, by which rows are grouped.
        preference: in [1, 2]; 0 is an old spelling of 1.5; nan where there is none.
        longer: characters of the reference's output more than of the model's.
        difficulty: of the instruction.
    """

    place: Int[np.ndarray, " N"]
    preference: Float[np.ndarray, " N"]
    longer: Float[np.ndarray, " N"]
    difficulty: Float[np.ndarray, " N"]

    @property
    def features(self) -> Float[np.ndarray, "N 3"]:
        """tanh of the length difference over its deviation, the difficulty, and 1."""
        spread = self.longer.std(ddof=1) if self.longer.size > 1 else 0.0
        scaled = self.longer / spread if spread > 0.0 else np.zeros_like(self.longer)
        return np.column_stack([np.tanh(scaled), self.difficulty, np.ones_like(self.longer)])

    def told(self) -> Rows:
        """Return the rows that have a preference.

        Raises:
            ValueError: one lies outside [1, 2].
        """
        found = np.where(self.preference == 0.0, 1.5, self.preference)
        there = ~np.isnan(found)
        if not np.all((found[there] >= 1.0) & (found[there] <= 2.0)):
            raise ValueError(f"expected preferences in [1, 2], got {found[there].min()} to {found[there].max()}")
        return Rows(self.place[there], found[there], self.longer[there], self.difficulty[there])


@dataclass(frozen=True)
class LengthControlled:
    """
    Attributes:
        win_rate, standard_error: in per cent.
        strength: C, as given or chosen.
        weights: of the length, the difficulty and the constant.
    """

    win_rate: float
    standard_error: float
    strength: float
    weights: tuple[float, float, float]


def length_controlled(rows: Rows, gamed: Sequence[Rows] = (), *, strength: float | None = None) -> LengthControlled:
    """Return AlpacaEval's length-controlled win rate: what the fitted regression says at equal lengths.

        logit P(model wins) = w_length tanh(d / sd(d)) + w_difficulty difficulty + w_const

    with an L1 penalty and no intercept. Rows of the baseline gamed by length (`gamed`) are added with constant 0 and a
    fifth of the weight in all; the penalty's strength C is chosen among 10 by cross-validation over instructions.

    Args:
        rows: the model's, one per instruction.
        gamed: of the verbose and the concise baseline against the baseline.
        strength: C; None: cross-validated.

    Raises:
        ValueError: no rows with a preference, or one outside [1, 2].
    """
    parts = [rows, *gamed] = [part.told() for part in (rows, *gamed)]
    if not rows.place.size:
        raise ValueError("a length-controlled win rate needs rows with a preference")
    design = np.concatenate([part.features for part in parts])
    design[rows.place.size :, 2] = 0.0
    won = np.concatenate([part.preference for part in parts]) - 1.0
    weight = np.concatenate([np.full(part.place.size, _GAMED_WEIGHT if i else 1.0) for i, part in enumerate(parts)])
    group = np.concatenate([part.place for part in parts])
    if strength is None:
        strength = _chosen(design, won, weight, group)
    weights = fit(design, won, weight, strength=strength)
    at_equal = rows.features[:, 1:] @ weights[1:]
    expected = _sigmoid(at_equal)
    error = float(expected.std(ddof=1)) / math.sqrt(expected.size) if expected.size > 1 else math.nan
    first, second, third = (float(w) for w in weights)
    return LengthControlled(100.0 * float(expected.mean()), 100.0 * error, strength, (first, second, third))


def fit(
    design: Float[np.ndarray, "N 3"], won: Float[np.ndarray, " N"], weight: Float[np.ndarray, " N"], *, strength: float
) -> Float[np.ndarray, " 3"]:
    """Return the weights that minimise |w|_1 + C sum of weighted log losses, `won` being soft labels in [0, 1].

    Proximal Newton: the quadratic model with the L1 term is solved exactly, and the step is halved until the objective
    falls.
    """
    weights = np.zeros(design.shape[1])

    def objective(w: np.ndarray) -> float:
        z = design @ w
        return float(np.abs(w).sum() + strength * (weight * (np.logaddexp(0.0, z) - won * z)).sum())

    value = objective(weights)
    for _ in range(_MOST_STEPS):
        expected = _sigmoid(design @ weights)
        slope = strength * (design.T @ (weight * (expected - won)))
        curve = strength * (design.T @ (design * (weight * expected * (1.0 - expected))[:, None]))
        curve = curve + 1e-9 * np.eye(len(weights))
        target = _quadratic(slope, curve, weights)
        length = 1.0
        while (found := objective(weights + length * (target - weights))) > value and length > 1e-8:
            length *= 0.5
        moved = length * np.abs(target - weights).max()
        if found > value:
            break
        weights, value = weights + length * (target - weights), found
        if moved < 1e-10:
            break
    return weights


def _quadratic(slope: np.ndarray, curve: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Minimise slope (w - start) + (w - start) curve (w - start) / 2 + |w|_1, by the signs that the weights may have.

    Of the 27 patterns of signs one is consistent; it is nearly always the one before.
    """
    linear = slope - curve @ start
    for signs in (np.sign(start), *map(np.asarray, itertools.product((-1.0, 0.0, 1.0), repeat=len(start)))):
        on, weights = signs != 0.0, np.zeros(len(start))
        if on.any():
            weights[on] = np.linalg.solve(curve[np.ix_(on, on)], -(linear[on] + signs[on]))
        gradient = linear + curve @ weights
        if np.all(weights * signs >= 0.0) and np.all(np.abs(gradient[~on]) <= 1.0 + 1e-9):
            return weights
    return start


def _chosen(design: np.ndarray, won: np.ndarray, weight: np.ndarray, group: np.ndarray) -> float:
    """Return the C of the least log loss on instructions that were left out, the mean over folds."""
    fold = folds(group)
    losses = np.zeros(len(STRENGTHS))
    for left_out in range(_FOLDS):
        seen = fold != left_out
        if seen.all() or not seen.any():
            continue
        for number, strength in enumerate(STRENGTHS):
            z = design[~seen] @ fit(design[seen], won[seen], weight[seen], strength=strength)
            loss = np.logaddexp(0.0, z) - won[~seen] * z
            losses[number] += (weight[~seen] * loss).sum() / weight[~seen].sum()
    return float(STRENGTHS[losses.argmin()])


def folds(group: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Return each row's fold: groups whole, the largest first into the lightest fold, as scikit-learn's GroupKFold."""
    _, index, sizes = np.unique(group, return_inverse=True, return_counts=True)
    loads, fold = np.zeros(_FOLDS), np.zeros(len(sizes), np.int64)
    for one in np.argsort(sizes)[::-1]:
        lightest = int(loads.argmin())
        loads[lightest] += sizes[one]
        fold[one] = lightest
    return fold[index]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def predicted(weights: Mapping[str, float], difficulty: Float[np.ndarray, " N"]) -> float:
    """Return the length-controlled win rate of published weights ("not_gamed_baseline"'s), in per cent."""
    return 100.0 * float(_sigmoid(weights["difficulty"] * difficulty + weights["const"]).mean())
