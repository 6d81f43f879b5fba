"""How far a share of comparisons can be trusted: those of one prompt are no independent votes."""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def share_interval(rate: float, *, variance: float, count: int, clusters: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval at the effective number of comparisons.

    That is the number at which independent comparisons would have this variance, at most their real number. Where all
    agree, so that no variance can be seen, it is the number of clusters: many samples of one prompt are one witness.

    Args:
        rate: the mean of values in [0, 1].
        variance: of `rate`, between clusters.
        count: comparisons.
        clusters: prompts they come from, >= 1.
    """
    binomial = rate * (1.0 - rate)
    seen = variance > 1e-12 and binomial > 1e-12
    effective = min(binomial / variance, float(count)) if seen else float(clusters)
    square = Z95**2
    centre = (rate + square / (2 * effective)) / (1 + square / effective)
    half = Z95 / (1 + square / effective) * math.sqrt(binomial / effective + square / (4 * effective**2))
    return max(0.0, centre - half), min(1.0, centre + half)
