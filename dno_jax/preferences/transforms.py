"""Payoffs other than the probability itself: Psi(P), before win rates are taken (arXiv 2505.20627)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

TRANSFORMS = ("identity", "sign", "logit")
LEAST = 0.01  # of estimated preferences: log-odds of verdicts that are 0 or 1 are those of .01 and .99


def transformed(
    wins: Float[np.ndarray, "*X C C"], transform: str, *, least: float = 0.0
) -> Float[np.ndarray, "*X C C"]:
    """Return Psi(P), with 1/2 for even odds: Psi + Psi^T = 1, and the game stays one of equals.

    identity: P. sign: 1, 1/2 or 0, by whether P is above, at or below 1/2: how strong a majority is no longer counts.
    logit: 1/2 + log P/(1 - P), in nats: of a Bradley-Terry preference 1/2 + the difference of rewards. Under each of
    them a Nash policy answers from the top cycle alone, the smallest set whose members beat all others.

    Args:
        wins: P(row beats column), checked.
        transform: one of `TRANSFORMS`.
        least: P is kept within [least, 1 - least] first (logit).

    Raises:
        ValueError: an unknown transform, or the log-odds of a certain preference.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}; there are {', '.join(TRANSFORMS)}")
    if transform == "identity":
        return wins
    if transform == "sign":
        # P - P^T is odd to the last bit; a mean of verdicts may miss 1/2 by a rounding.
        gap = wins - wins.swapaxes(-1, -2)
        return 0.5 + 0.5 * np.sign(np.where(np.abs(gap) > 1e-12, gap, 0.0))
    kept = np.clip(wins, least, 1.0 - least)
    if not np.all((kept > 0.0) & (kept < 1.0)):
        raise ValueError("transform logit needs preferences strictly between 0 and 1; some are certain: take sign")
    return 0.5 + np.log(kept) - np.log(kept.swapaxes(-1, -2))
