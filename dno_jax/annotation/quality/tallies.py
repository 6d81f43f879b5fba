"""Means over prompts with intervals, and histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dno_jax.statistics import Z95, share_interval

_DIGITS = 4
_LEAST_WIDTH = 2.0**-6
_MAX_BINS = 24


@dataclass
class Tally:
    """A mean of values that come in clusters, one per prompt: those of one prompt are no independent witnesses.

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

    def share(self) -> dict[str, Any]:
        """Return value, 95 % interval (Wilson's), n and prompts, of values in [0, 1]."""
        low, high = share_interval(self.mean, variance=self.variance, count=self.count, clusters=self.clusters)
        return self._figure(low, high)

    def points(self) -> dict[str, Any]:
        """Return the same of values on any scale; no interval where there is but one cluster."""
        if self.clusters < 2:
            return self._figure(None, None)
        half = Z95 * math.sqrt(self.variance)
        return self._figure(self.mean - half, self.mean + half)

    def _figure(self, low: float | None, high: float | None) -> dict[str, Any]:
        value, low, high = (None if value is None else round(value, _DIGITS) for value in (self.mean, low, high))
        return {"value": value, "low": low, "high": high, "n": self.count, "prompts": self.clusters}


def histogram(groups: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Count values by group and bin; bins are as narrow as 24 of them for all groups allow.

    Args:
        groups: name -> finite values, at least one.

    Returns:
        `width` of a bin, a power of two, at least 2^-6; `bins`: group -> lower edge (all its digits, so that no two
        bins are one; whole numbers as such) -> count.
    """
    values = {group: np.asarray(found, np.float64) for group, found in sorted(groups.items())}
    width = _LEAST_WIDTH
    used = np.unique(np.floor(np.concatenate(list(values.values())) / width))
    while len(used) > _MAX_BINS:
        width, used = 2 * width, np.unique(np.floor(used / 2))
    bins = {}
    for group, found in values.items():
        indices, counts = np.unique(np.floor(found / width), return_counts=True)
        edges = (repr(edge).removesuffix(".0") for edge in (indices * width + 0.0).tolist())  # + 0.0: no -0
        bins[group] = dict(zip(edges, counts.tolist(), strict=True))
    return {"width": width, "bins": bins}
