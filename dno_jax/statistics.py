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

from dno_jax.addresses import Purpose, rng

Z95 = 1.959963984540054
_DIGITS = 4
_NO_VARIANCE = 1e-12

Values = int | float | np.ndarray


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

    @property
    def effective(self) -> float:
        """The number of independent comparisons whose mean would vary as this one does, of values in [0, 1].

        Above the real number where ties or probabilities vary less than coins. Where all agree, so that no variance
        can be seen, it is the number of clusters: many samples of one prompt are one witness.
        """
        rate, variance = self.mean, self.variance
        return float(effective_number(rate, variance, self.clusters))

    def share(self) -> Estimate:
        """Return the mean of values in [0, 1] with Wilson's interval at the effective number of comparisons.

        By simulation it covers the truth 93 to 97 times in 100 from 50 prompts on for means from 0.1 to 0.9, with
        ties, with several comparisons per prompt and with both; from 100 prompts on for means from 0.05 to 0.95.
        """
        low, high = wilson(self.mean, self.effective)
        return Estimate(self.mean, float(low), float(high), self.count, self.clusters)

    def points(self) -> Estimate:
        """Return the mean of values on any scale with the normal interval; none where there is but one cluster."""
        if self.clusters < 2:
            return Estimate(self.mean, None, None, self.count, self.clusters)
        half = Z95 * math.sqrt(self.variance)
        return Estimate(self.mean, self.mean - half, self.mean + half, self.count, self.clusters)


def effective_number(rate: Values, variance: Values, clusters: Values) -> np.ndarray:
    """Return how many independent comparisons would have means of this variance; see `Tally.effective`."""
    rate, variance = np.asarray(rate, np.float64), np.asarray(variance, np.float64)
    binomial = rate * (1.0 - rate)
    seen = (variance > _NO_VARIANCE) & (binomial > _NO_VARIANCE)
    return np.where(seen, binomial / np.where(seen, variance, 1.0), np.asarray(clusters, np.float64))


def wilson(rate: Values, effective: Values, *, quantile: float = Z95) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of shares seen in `effective` independent comparisons, elementwise.

    Args:
        quantile: standard errors to either side; 1.96 for 95 %, more for several intervals at once.
    """
    rate, effective = np.asarray(rate, np.float64), np.asarray(effective, np.float64)
    square = quantile**2
    middle = (rate + square / (2 * effective)) / (1 + square / effective)
    spread = np.maximum(rate * (1.0 - rate), 0.0) / effective + square / (4 * effective**2)
    half = quantile / (1 + square / effective) * np.sqrt(spread)
    return np.asarray(np.maximum(middle - half, 0.0)), np.asarray(np.minimum(middle + half, 1.0))


def correlated(covariance: Float[np.ndarray, "M M"], *, seed: int, draws: int) -> Float[np.ndarray, "D M"]:
    """Draw normal errors of mean 0 with this covariance, which need not have full rank."""
    values, vectors = np.linalg.eigh(covariance)
    roots = vectors * np.sqrt(np.maximum(values, 0.0))
    return rng(Purpose.ERRORS, seed).standard_normal((draws, len(covariance))) @ roots.T


def most_extreme(
    covariance: Float[np.ndarray, "M M"], *, freedom: int, seed: int = 0, draws: int = 10_000
) -> Float[np.ndarray, " D"]:
    """Return draws, in rising order, of the largest |t| of M means with this covariance and true errors of none.

    Its 95 % quantile makes M intervals that hold all at once (max-t); correlated means need less than Bonferroni's.

    Args:
        freedom: degrees of freedom of the variances: prompts less one.
    """
    scale = np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
    seen = scale > 0.0
    correlation = np.eye(len(covariance))  # a mean without variance counts as independent of the others
    both = np.outer(seen, seen)
    correlation[both] = (covariance / np.where(both, np.outer(scale, scale), 1.0))[both]
    largest = np.abs(correlated(correlation, seed=seed, draws=draws)).max(axis=1)
    chi = rng(Purpose.ERRORS, seed, "freedom").chisquare(max(freedom, 1), draws) / max(freedom, 1)
    return np.sort(largest / np.sqrt(chi))


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
