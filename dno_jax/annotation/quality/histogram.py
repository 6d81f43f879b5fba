"""Histograms of points, made when they are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LEAST_WIDTH = 2.0**-6
_MAX_BINS = 24


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
