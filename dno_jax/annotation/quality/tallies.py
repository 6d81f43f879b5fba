"""Figures of a stream in constant memory: means over prompts, and histograms."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dno_jax.preferences import Z95, share_interval

_DIGITS = 4


@dataclass
class Tally:
    """A mean of values that come in clusters, one a prompt: those of one prompt are no independent witnesses.

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

    def merge(self, other: Tally) -> None:
        self.total += other.total
        self.count += other.count
        self.clusters += other.clusters
        self.total_squares += other.total_squares
        self.products += other.products
        self.count_squares += other.count_squares

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


class Histogram:
    """Counts by group and bin. Bins begin narrow and double their width whenever more than `max_bins` are in use.

    The width is thus the least that does for everything seen, in whatever order it was seen.
    """

    def __init__(self, *, max_bins: int = 24):
        self._max_bins = max_bins
        self._width = 2.0**-6
        self._counts: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def add(self, group: str, values: Iterable[float]) -> None:
        counts = self._counts[group]
        before = len(counts)
        counts.update([math.floor(value / self._width) for value in values])
        if len(counts) > before:
            self._fit()

    def merge(self, other: Histogram) -> None:
        self._widen(max(self._width, other._width))
        for group, counts in other._at(self._width).items():
            self._counts[group].update(counts)
        self._fit()

    def as_dict(self) -> dict[str, Any]:
        """Return the width of a bin and, by group, lower edge -> count."""
        bins = {
            group: {_edge(index * self._width): count for index, count in sorted(counts.items())}
            for group, counts in sorted(self._counts.items())
        }
        return {"width": self._width, "bins": bins}

    def _fit(self) -> None:
        while len(set().union(*self._counts.values())) > self._max_bins:
            self._widen(2 * self._width)

    def _widen(self, width: float) -> None:
        self._counts, self._width = self._at(width), width

    def _at(self, width: float) -> defaultdict[str, Counter[int]]:
        """The counts in bins of another width, a power of two times as wide."""
        times = round(width / self._width)
        found: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for group, counts in self._counts.items():
            for index, count in counts.items():
                found[group][index // times] += count
        return found


def _edge(value: float) -> str:
    """All its digits, so that no two bins are one; whole numbers as such."""
    return repr(value).removesuffix(".0")
