"""Win rates at equal length: AlpacaEval's regression for two players of any run (arXiv 2404.04475).

    logit P(player preferred) = strength + slope tanh(d / sd(d)),    d = characters more than the opponent's

and the length-controlled win rate is the one at d = 0. Its interval is the cluster-robust one over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dno_jax.evaluation.comparisons import Row
from dno_jax.statistics import Z95, Estimate

_MOST_STEPS = 100


def length_controlled(rows: Sequence[Row]) -> Estimate | None:
    """Return the win rate of a player over an opponent at equal length; None where nothing can be said of it.

    That is where one of them wins all, all comparisons came to the same (ties, say), or too few lengths overlap to tell
    length from strength.

    Args:
        rows: of one player and one opponent.
    """
    value = np.asarray([row.preference for row in rows], np.float64)
    longer = np.asarray([row.longer for row in rows], np.float64)
    _, prompt = np.unique(np.asarray([row.prompt_id for row in rows]), return_inverse=True)
    num_prompts = int(prompt.max(initial=-1)) + 1
    if num_prompts < 3 or not 0.0 < value.mean() < 1.0 or np.ptp(value) < 1e-9:
        return None
    spread = longer.std(ddof=1)
    columns = [np.ones(len(rows))] + ([np.tanh(longer / spread)] if spread > 0.0 else [])
    design = np.column_stack(columns)
    found = _logistic(design, value)
    if found is None:
        return None
    weights, curve = found
    off = design * (value - _sigmoid(design @ weights))[:, None]
    sums = np.stack([np.bincount(prompt, weights=column, minlength=num_prompts) for column in off.T], axis=1)
    inverse = np.linalg.inv(curve)
    robust = num_prompts / (num_prompts - 1) * inverse @ (sums.T @ sums) @ inverse
    half = Z95 * np.sqrt(max(robust[0, 0], 0.0))
    low, rate, high = (float(_sigmoid(weights[0] + shift)) for shift in (-half, 0.0, half))
    return Estimate(rate, low, high, len(rows), num_prompts)


def _logistic(design: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Weights and curvature of the likeliest fit; None where there is none (separated, or singular)."""
    weights = np.zeros(design.shape[1])
    for _ in range(_MOST_STEPS):
        fitted = _sigmoid(design @ weights)
        curve = design.T @ (design * (fitted * (1.0 - fitted))[:, None])
        if np.linalg.cond(curve) > 1e10:
            return None
        step = np.linalg.solve(curve, design.T @ (value - fitted))
        weights = weights + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-9:
            return weights, curve
        if np.abs(weights).max() > 15.0:
            return None
    return None


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(x))))
