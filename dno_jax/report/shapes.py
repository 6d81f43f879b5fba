"""A figure: a table of numbers with names, and how it is drawn."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dno_jax.display import printable

_SHOWN_ROWS = 40


@dataclass(frozen=True)
class Shape:
    """How a figure's columns become a plot.

    Attributes:
        kind: "intervals" (points with 95 % intervals), "heat" (a square of numbers), "bars" (stacked, lying),
            "histogram" (outlines of counts by bin), "lines" (curves over steps).
        x, y, colour: columns.
        percent: whether y is a share.
        rule: a value of y that is marked.
        low, high: columns with an interval's ends.
    """

    kind: Literal["intervals", "heat", "bars", "histogram", "lines"]
    x: str
    y: str
    colour: str = ""
    percent: bool = False
    rule: float | None = None
    low: str = "low"
    high: str = "high"


@dataclass(frozen=True)
class Figure:
    """Numbers of a run.

    Attributes:
        name: of its files, and its place in the page.
        section: of the page.
        note: what the numbers are, for a reader of the plot and for who cannot see it.
        rows: cells are numbers, words, or None where nothing was measured.
    """

    name: str
    section: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]
    shape: Shape | None = None

    @property
    def records(self) -> list[dict[str, Any]]:
        """The rows by column; words of others do not act."""
        rows = ([printable(cell) if isinstance(cell, str) else cell for cell in row] for row in self.rows)
        return [dict(zip(self.columns, row, strict=True)) for row in rows]

    @property
    def shown_rows(self) -> Sequence[tuple[Any, ...]]:
        """At most so many rows that a person reads them: evenly chosen, the last one among them."""
        step = -(-len(self.rows) // _SHOWN_ROWS)
        return self.rows if step <= 1 else [*self.rows[:-1:step], self.rows[-1]]

    def csv(self) -> str:
        """All rows, for a spreadsheet. Words that one would compute are kept from it by a quote."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[_inert(cell) for cell in row] for row in self.rows])
        return out.getvalue()


def _inert(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in tuple("=+-@\t\r") else cell
