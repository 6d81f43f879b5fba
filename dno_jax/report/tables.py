"""Tables that are whole in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 80
_GAP = 2


def stacked(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Group:
    """Return a table that continues below itself, its first column repeated, where it is wider than 80 columns."""
    rows = list(rows)
    widths = [max(map(len, cells)) + _GAP for cells in zip(columns, *rows, strict=True)]
    parts: list[list[int]] = []
    for index in range(1, len(columns)):
        if not parts or widths[0] + sum(widths[i] for i in parts[-1]) + widths[index] > WIDTH:
            parts.append([])
        parts[-1].append(index)
    tables: list[Table] = []
    for part in parts:
        table = Table(title=None if tables else title, box=None, padding=(0, 0, 0, _GAP), pad_edge=False)
        for index in (0, *part):
            table.add_column(columns[index], justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row[0], *(row[index] for index in part))
        tables.append(table)
    return Group(*tables)


def shares_text(shares: Mapping[str, float]) -> str:
    """Write out the shares that are not zero: "31 % of samples, 5 % of gold"."""
    return ", ".join(f"{100.0 * share:.3g} % of {name}" for name, share in shares.items() if share)


def duration(seconds: float) -> str:
    """Seconds in the unit in which a person would say them."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:,.1f} h"


@dataclass(frozen=True)
class PlainTable:
    """A table of the terminal as words, for other pages: the same numbers, whatever the width."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without_empty_columns(self) -> PlainTable:
        """The table less the columns, after the first, in which nothing was measured."""
        kept = [i for i in range(len(self.columns)) if not i or any(row[i].strip() for row in self.rows)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return PlainTable(self.title, tuple(self.columns[i] for i in kept), rows)


def plain(renderable: RenderableType) -> tuple[list[PlainTable], list[str]]:
    """Take tables and sentences out of what is printed; a table that `stacked` has split is one again."""
    tables: list[PlainTable] = []
    words: list[str] = []
    for part in renderable.renderables if isinstance(renderable, Group) else [renderable]:
        if isinstance(part, Group):
            more, said = plain(part)
            tables, words = tables + more, words + said
        elif isinstance(part, Table):
            columns = [_words(column.header) for column in part.columns]
            rows = list(zip(*([_words(cell) for cell in column.cells] for column in part.columns), strict=True))
            if part.title is None and tables and not any(columns[:1]) and len(rows) == len(tables[-1].rows):
                left = tables.pop()
                rows = [before + row[1:] for before, row in zip(left.rows, rows, strict=True)]
                tables.append(PlainTable(left.title, (*left.columns, *columns[1:]), tuple(rows)))
            else:
                tables.append(PlainTable(_words(part.title or ""), tuple(columns), tuple(rows)))
        elif said := _words(part).strip():
            words.append(said)
    return tables, words


def _words(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
