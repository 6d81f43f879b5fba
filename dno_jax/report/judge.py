"""How good the judge is, in tables: one iteration in full, and all of them in one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dno_jax.annotation.quality.warnings import CHECKS, warnings
from dno_jax.config import QualitySection
from dno_jax.report.tables import stacked

# Figure -> what stands beside it, and over its column where it has one.
_ROWS = {
    "flip_rate": ("order-flip rate", "flips"),
    "tie_rate": ("tie rate", "ties"),
    "answer_tie_rate": ("tie rate of one answer", ""),
    "first_wins": ("P(first shown wins)", "first"),
    "first_on_top": ("P(first shown on top)", ""),
    "longer_wins": ("P(longer wins)", "longer"),
    "repeat_agreement": ("agreement when repeated", "repeat"),
    "repeat_same_score": ("same points when repeated", ""),
    "calibration_agreement": ("agreement with labels", "labels"),
    "calibration_error": ("mean |P - label|", ""),
    "calibration_missing": ("labels without a verdict", ""),
    "cyclic_share": ("cyclic triples", "cycles"),
    "loudest_judge": ("P(one judge overrules)", ""),
    "gold_wins": ("P(gold beats student)", "gold"),
}
NAMES = {figure: title for figure, (title, _) in _ROWS.items()}
_BARS = " ▁▂▃▄▅▆▇█"


def quality_table(figures: Mapping[str, Any], section: QualitySection, *, iteration: int) -> RenderableType:
    """One iteration's figures with intervals, counts and limits, points by source and place, and the warnings.

    Args:
        figures: as `annotation.quality.Quality.figures` returns them.
    """
    limits = {check.figure: (check.kind, getattr(section, check.field)) for check in CHECKS}
    table = Table(title=f"judge of iteration {iteration}", box=SIMPLE_HEAD)
    for column in ("", "value", "95 % interval", "over", "limit"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, (title, _) in _ROWS.items():
        if figure := figures.get(name):
            limit = _limit(*limits[name]) if name in limits else ""
            if "chance" in figure:
                limit = f"chance {figure['chance']:.3f}"
            interval = f"{figure['low']:.3f} to {figure['high']:.3f}"
            table.add_row(title, f"{figure['value']:.3f}", interval, f"{figure['n']:,}", limit)
    if scores := figures.get("scores"):
        for source, mean in scores["mean"].items():
            histogram = _histogram(scores["bins"], source)
            table.add_row(f"points of {source}", f"{mean['value']:.3f}", histogram, f"{mean['n']:,}", "")
    places = [f"{place['value']:+.2f}" for place in figures.get("points_by_position", ())]
    shown = [Text(f"points above the mean by place shown: {' '.join(places)}")] if places else []
    return Group(table, *shown, *_sentences(warnings(figures, section)))


def quality_lines(figures: Mapping[int, Mapping[str, Any]], section: QualitySection) -> RenderableType:
    """One row per iteration, and what the last one warns of; nothing where no judge was measured.

    Args:
        figures: by iteration, as in `quality_table`.
    """
    if not figures:
        return Group()
    columns = [name for name, (_, short) in _ROWS.items() if short and any(name in found for found in figures.values())]
    rows = [(str(iteration), *(_share(found.get(name)) for name in columns)) for iteration, found in figures.items()]
    table = stacked("judge: % with 95 % intervals", ("", *(_ROWS[name][1] for name in columns)), rows)
    return Group(table, *_sentences(warnings(figures[max(figures)], section)))


def _sentences(found: Sequence[str]) -> list[Text]:
    return [Text(f"warning: {sentence}", style="yellow") for sentence in found]


def _limit(kind: str, limit: float | None) -> str:
    if limit is None:
        return ""
    return {"max": f"<= {limit:g}", "min": f">= {limit:g}", "error": f"0.5 +- {limit:g}"}[kind]


def _share(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    return f"{100 * figure['value']:.0f} [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"


def _histogram(bins: Mapping[str, Mapping[str, int]], source: str) -> str:
    """A bar for every bin that some source uses, between the lowest bin's edge and the highest's."""
    counts = {float(edge): count for edge, count in bins[source].items()}
    edges, most = sorted({float(edge) for used in bins.values() for edge in used}), max(counts.values())
    bars = "".join(_BARS[-(-counts.get(edge, 0) * (len(_BARS) - 1) // most)] for edge in edges)
    return f"{edges[0]:g} {bars} {edges[-1]:g}"
