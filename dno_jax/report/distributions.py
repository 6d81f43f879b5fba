"""Histograms over a run's pairs and responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dno_jax.data.pairs import NEW, PairFile
from dno_jax.report.facts import Facts
from dno_jax.report.figures import PAIRS
from dno_jax.report.kept import Kept
from dno_jax.report.shapes import Figure, Shape
from dno_jax.stage_dir import StageDir

_BINS = 24


def distributions(facts: Facts, lengths: Mapping[str, Sequence[int]], *, kept: Kept) -> Iterator[Figure]:
    """Yield the histograms that the run has numbers for.

    Args:
        lengths: tokens of responses, by who wrote them.
    """
    margins: dict[str, np.ndarray] = {}
    for iteration, manifest in facts.of("pair"):
        stage, key = facts.run_dir.stage("pair", iteration), ("margins", iteration, manifest.seal or object())
        found = facts.tried(lambda s=stage, k=key: kept.once(k, lambda: _margins(s)))
        if found is not None and found.size:
            margins[f"iteration {iteration}"] = found
    if margins:
        yield Figure(
            "margins",
            PAIRS,
            "Margins of new pairs",
            "Reward of the chosen response less that of the rejected one, in the unit of pairing.reward; each bin by "
            "its lower end.",
            ("of", "margin", "pairs"),
            _binned(margins),
            Shape("histogram", "margin", "pairs", "of"),
        )
    if lengths:
        yield Figure(
            "tokens",
            PAIRS,
            "Lengths of responses",
            "Tokens of the responses among the samples below; each bin by its lower end.",
            ("of", "tokens", "responses"),
            _binned({name: np.asarray(own, np.float64) for name, own in lengths.items()}, whole=True),
            Shape("histogram", "tokens", "responses", "of"),
        )


def _margins(stage: StageDir) -> np.ndarray:
    with PairFile(stage.table_path(NEW)) as file:
        parts = [
            table["chosen_reward"].to_numpy() - table["rejected_reward"].to_numpy()
            for table in file.read(("chosen_reward", "rejected_reward"))
        ]
    return np.concatenate(parts) if parts else np.empty(0)


def _binned(values: Mapping[str, np.ndarray], *, whole: bool = False) -> list[tuple[str, float, int]]:
    """Counts by bins that all series share: (series, lower end, count)."""
    low, high = min(own.min() for own in values.values()), max(own.max() for own in values.values())
    edges = np.linspace(low, high + (1 if whole else 1e-9), _BINS + 1)
    if whole:
        edges = np.unique(np.round(edges))
    if len(edges) < 2 or edges[-1] <= edges[0]:
        edges = np.array([low, low + 1.0])
    rows = []
    for name, own in values.items():
        counts, _ = np.histogram(own, edges)
        rows += [(name, round(float(edge), 4), int(count)) for edge, count in zip(edges[:-1], counts, strict=True)]
    return rows
