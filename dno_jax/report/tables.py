"""Tables that are whole in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group
from rich.table import Table

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
