"""Histograms of a stream in constant memory."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any


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
