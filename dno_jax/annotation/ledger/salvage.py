"""What can still be read of a damaged file of verdicts, in a new one."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dno_jax.annotation.ledger.database import primary_code
from dno_jax.annotation.ledger.store import TABLES, VerdictStore
from dno_jax.errors import DnoError

_LEAST_BYTES = 100  # of a verdict: its key alone takes 64


@dataclass(frozen=True)
class Salvaged:
    """
    Attributes:
        rows: that could be read, by table.
        lost_usd: dollars that verdicts cost, and no receipt says: `max_usd` does not know of them.
        aside: where the damaged file lies now.
    """

    rows: Mapping[str, int]
    lost_usd: float
    aside: Path


def salvage(path: str | os.PathLike[str]) -> Salvaged:
    """Put a file with all rows that can be read in the place of a damaged one.

    Raises:
        DnoError: there is no such file, another process has it open, nothing can be read of it, or the new one cannot
            be written.
    """
    old, new, aside = Path(path), Path(f"{path}.salvaged"), Path(f"{path}.damaged")
    if not old.is_file():
        raise DnoError(f"{old}: no such file")
    for taken in (new, aside):
        if taken.exists():
            raise DnoError(f"{taken} exists: an earlier attempt left it; move it away first")
    # The new store's thread reads it, too.
    with closing(sqlite3.connect(old, isolation_level=None, check_same_thread=False)) as connection:
        _keep_others_out(connection, old)
        try:
            tables = {name: _columns(connection, name) for name in TABLES}
        except sqlite3.Error as error:
            raise DnoError(f"{old}: nothing can be read of it ({error}); move it away, its verdicts are lost") from None
        most = os.path.getsize(old) // _LEAST_BYTES
        with closing(VerdictStore(new)) as store:
            rows = store.restore({name: _rows(connection, name, own, most=most) for name, own in tables.items()})
            cost = sum(tally.usd for tally in store.tallies())
            lost = cost - sum(receipt.usd for receipt in store.receipts())
    for suffix in ("", "-wal", "-shm"):  # a journal belongs to its own file
        if os.path.exists(f"{old}{suffix}"):
            os.replace(f"{old}{suffix}", f"{aside}{suffix}")
    os.replace(new, old)
    return Salvaged(rows, max(0.0, lost), aside)


def _keep_others_out(connection: sqlite3.Connection, path: Path) -> None:
    """Hold the file: a run that has it open would go on writing to it where it is moved."""
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        if primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DnoError(f"{path}: another process has it open: end that process first") from None
        # else it is damaged, as it is said to be


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    present = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}  # an earlier version had fewer
    return [name for name in TABLES[table].split(", ") if name in present]


def _rows(connection: sqlite3.Connection, table: str, names: list[str], *, most: int) -> Iterator[dict[str, Any]]:
    """Yield the rows that can be read, by halving whatever cannot until the damaged pages are cut out."""
    if not names:
        return
    try:
        (last,) = connection.execute(f"SELECT max(rowid) FROM {table}").fetchone()
    except sqlite3.DatabaseError:
        last = most
    ranges = [(1, (last or 0) + 1)]
    while ranges:
        first, end = ranges.pop()
        try:
            query = f"SELECT {', '.join(names)} FROM {table} WHERE rowid >= ? AND rowid < ? ORDER BY rowid"
            found = connection.execute(query, (first, end)).fetchall()
        except sqlite3.DatabaseError:
            if end - first > 1:
                middle = (first + end) // 2
                ranges += [(middle, end), (first, middle)]
            continue
        yield from (dict(zip(names, row, strict=True)) for row in found)
