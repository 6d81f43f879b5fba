"""Means with their uncertainty. Comparisons on one prompt are not independent votes: prompts are clusters.

Pure numpy.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

_Z95 = 1.959963984540054
_DIGITS = 4


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval (None where nothing can be said), over `count` values of `prompts` prompts."""

    value: float
    low: float | None
    high: float | None
    count: int
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        """As reports have it, rounded."""
        value, low, high = (None if x is None else round(x, _DIGITS) for x in (self.value, self.low, self.high))
        return {"value": value, "low": low, "high": high, "n": self.count, "prompts": self.prompts}


@dataclass
class Tally:
    """A mean of values that come in clusters, one per prompt, in constant memory.

    Attributes:
        total, count: sum and number of all values.
        clusters: prompts that gave any.
        total_squares, products, count_squares: sums over clusters of total^2, total * count and count^2.
    """

    total: float = 0.0
    count: int = 0
    clusters: int = 0
    total_squares: float = 0.0
    products: float = 0.0
    count_squares: int = 0

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray, prompt_ids: Sequence[Hashable]) -> Tally:
        """Return the tally of values, each with its prompt."""
        _, cluster = np.unique(np.asarray(prompt_ids), return_inverse=True)
        totals, counts = np.bincount(cluster, weights=np.asarray(values, np.float64)), np.bincount(cluster)
        tally = cls()
        for total, count in zip(totals.tolist(), counts.tolist(), strict=True):
            tally.add(total, count)
        return tally

    def add(self, total: int | float, count: int) -> None:
        """Add one prompt's values: their sum and their number; no value is nothing to add."""
        if count:
            self.total += total
            self.count += count
            self.clusters += 1
            self.total_squares += total * total
            self.products += total * count
            self.count_squares += count * count

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def variance(self) -> float:
        """Of the mean, from the spread of the clusters' sums (cluster-robust); 0 where there is but one cluster."""
        if self.clusters < 2:
            return 0.0
        mean = self.mean
        spread = self.total_squares - 2 * mean * self.products + mean**2 * self.count_squares
        return self.clusters / (self.clusters - 1) * max(spread, 0.0) / self.count**2

    def share(self) -> Estimate:
        """Return the mean of values in [0, 1] with Wilson's interval at the effective number of comparisons.

        That is the number at which independent comparisons would have this variance, at most their real number. Where
        all agree, so that no variance can be seen, it is the number of clusters: many samples of one prompt are one
        witness.
        """
        rate, variance = self.mean, self.variance
        binomial = rate * (1.0 - rate)
        seen = variance > 1e-12 and binomial > 1e-12
        effective = min(binomial / variance, float(self.count)) if seen else float(self.clusters)
        square = _Z95**2
        middle = (rate + square / (2 * effective)) / (1 + square / effective)
        half = _Z95 / (1 + square / effective) * math.sqrt(binomial / effective + square / (4 * effective**2))
        return Estimate(rate, max(0.0, middle - half), min(1.0, middle + half), self.count, self.clusters)

    def points(self) -> Estimate:
        """Return the mean of values on any scale with the normal interval; none where there is but one cluster."""
        if self.clusters < 2:
            return Estimate(self.mean, None, None, self.count, self.clusters)
        half = _Z95 * math.sqrt(self.variance)
        return Estimate(self.mean, self.mean - half, self.mean + half, self.count, self.clusters)


def counted_means(
    values: Float[np.ndarray, "C N"], counts: Float[np.ndarray, "C N"]
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Return each row's mean and its standard error; the error is nan where fewer than two values were counted.

    Args:
        values: any finite ones.
        counts: how often each was met, whole and >= 0, at least one in every row.
    """
    met = counts.sum(axis=1)
    mean = (counts * values).sum(axis=1) / met
    squares = (counts * (values - mean[:, None]) ** 2).sum(axis=1)
    variance = np.where(met > 1, squares / np.maximum(met - 1, 1), np.nan)
    return mean, np.sqrt(variance / met)
