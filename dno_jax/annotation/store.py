"""Every verdict ever paid for, in one sqlite file, keyed by the content of the request.

A verdict is committed when it arrives, before its caller sees it, so a crash costs the requests in flight and no more.
Only state "ok" is an answer; what failed is kept for people and for its count of tries, and is asked again.

The journal is WAL: a reader never waits for a writer, and a kill -9 leaves at most a journal that the next open
replays. `synchronous` is FULL, not WAL's usual NORMAL, because NORMAL may lose the last commits when the machine itself
dies (a preempted node), and each was paid for. It costs 0.2 ms a verdict on a local disk (measured, against 0.03 ms for
NORMAL), while the verdict takes seconds: which is also why commits simply block the event loop and need no thread.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from dno_jax.errors import DnoError
from dno_jax.records import JudgementState

_SCHEMA_VERSION = 1
_LOCK_SECONDS = 30.0
_CREATE = """
    CREATE TABLE IF NOT EXISTS verdicts (
        key        TEXT PRIMARY KEY,  -- sha256 of the canonical JSON of judge, parameters and messages as sent
        judge      TEXT NOT NULL,
        prompt_id  TEXT NOT NULL,     -- of the pool that asked first
        state      TEXT NOT NULL,     -- ok, refused, unparsable, failed; only ok is an answer
        scores     TEXT,              -- JSON list in the order of presentation; NULL unless ok
        raw        TEXT NOT NULL,     -- the last reply in the judge's own words
        detail     TEXT NOT NULL,
        model      TEXT NOT NULL,     -- what the endpoint says it is
        tries      INTEGER NOT NULL,  -- requests, all runs together; tokens likewise
        tokens_in  INTEGER NOT NULL,
        tokens_out INTEGER NOT NULL,
        created_at TEXT NOT NULL      -- UTC; of the last change
    )
"""
# An answer stays: neither a later failure nor a second answer (two processes asking at once) replaces it.
_PUT = """
    INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
    ON CONFLICT (key) DO UPDATE SET
        state = excluded.state, scores = excluded.scores, raw = excluded.raw, detail = excluded.detail,
        model = excluded.model, tries = tries + excluded.tries, tokens_in = tokens_in + excluded.tokens_in,
        tokens_out = tokens_out + excluded.tokens_out, created_at = excluded.created_at
    WHERE state != 'ok'
"""
_COLUMNS = "state, scores, raw, detail, model, tries, tokens_in, tokens_out"


@dataclass(frozen=True)
class Verdict:
    """What one request came to.

    Attributes:
        scores: [C] in the order of presentation; None unless state is "ok".
        raw: the judge's own words.
        detail: why there is no answer.
        model: the model as the endpoint names it.
        tries: requests it took.
        tokens_in, tokens_out: what the endpoint counted, over all tries.
    """

    state: JudgementState
    scores: tuple[int, ...] | None = None
    raw: str = ""
    detail: str = ""
    model: str = ""
    tries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __post_init__(self) -> None:
        if (self.state == "ok") != (self.scores is not None):
            raise ValueError(f"state {self.state!r} with scores {self.scores}: an answer has scores, nothing else has")


class VerdictStore:
    """The file of verdicts; several processes may have it open, each through a store of its own."""

    def __init__(self, path: str | os.PathLike[str]):
        """Open the file, making it if there is none.

        Raises:
            DnoError: it cannot be opened, is no database of ours, or is locked.
        """
        self.path = os.fspath(path)
        if "://" in self.path:
            raise DnoError(f"{self.path}: sqlite cannot write to an object store; give a path in a file system")
        self._lock = threading.Lock()  # a stage may build it in one thread and run its event loop in another
        with self._explained():
            self._connection = sqlite3.connect(
                self.path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def get(self, key: str) -> Verdict | None:
        """Return the answer to a request, or None where it has to be asked (again).

        Raises:
            DnoError: the file is damaged or locked.
        """
        verdict = self.look(key)
        return verdict if verdict is not None and verdict.state == "ok" else None

    def look(self, key: str) -> Verdict | None:
        """Return whatever is known of a request, failures included."""
        with self._lock, self._explained():
            row = self._connection.execute(f"SELECT {_COLUMNS} FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else self._verdict(row)

    def put(self, key: str, verdict: Verdict, *, judge: str, prompt_id: str) -> Verdict:
        """Commit a verdict, and return the one that stands: an earlier answer to the same request is kept.

        Raises:
            DnoError: the file is damaged, locked, or the disk is full.
        """
        scores = None if verdict.scores is None else json.dumps(verdict.scores)
        row = (key, judge, prompt_id, verdict.state, scores, verdict.raw, verdict.detail, verdict.model, verdict.tries)
        with self._lock, self._explained():
            # Autocommit: this statement is the transaction, and it is on the disk when execute returns.
            self._connection.execute(_PUT, (*row, verdict.tokens_in, verdict.tokens_out))
        return self.get(key) or verdict

    def totals(self) -> dict[str, int]:
        """Count rows by state, and sum tries and tokens over all runs."""
        with self._lock, self._explained():
            states = self._connection.execute("SELECT state, count(*) FROM verdicts GROUP BY state ORDER BY state")
            counts = dict(states.fetchall())
            total = self._connection.execute("SELECT total(tries), total(tokens_in), total(tokens_out) FROM verdicts")
            tries, tokens_in, tokens_out = total.fetchone()
        return counts | {"tries": int(tries), "tokens_in": int(tokens_in), "tokens_out": int(tokens_out)}

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _prepare(self) -> None:
        # A file system without shared memory answers with another journal mode: slower, and as safe.
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, _SCHEMA_VERSION):
            raise DnoError(
                f"{self.path}: a store of version {found}, this program reads {_SCHEMA_VERSION}: move it away"
            )
        self._connection.execute(_CREATE)
        self._connection.execute(f"SELECT {_COLUMNS} FROM verdicts LIMIT 1").fetchone()
        if found != _SCHEMA_VERSION:  # only when new: a write would wait for the lock each time it is opened
            self._connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def _verdict(self, row: tuple[object, ...]) -> Verdict:
        state, scores, raw, detail, model, tries, tokens_in, tokens_out = row
        try:
            return Verdict(
                state=cast(JudgementState, state),
                scores=None if scores is None else tuple(int(score) for score in json.loads(cast(str, scores))),
                raw=str(raw),
                detail=str(detail),
                model=str(model),
                tries=cast(int, tries),
                tokens_in=cast(int, tokens_in),
                tokens_out=cast(int, tokens_out),
            )
        except (ValueError, TypeError) as error:
            raise DnoError(f"{self.path}: a row that this program never wrote ({error}); move the file away") from None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DnoError(f"{self.path}: {error}; {_remedy(error)}") from None


def _remedy(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another process has held its lock for {_LOCK_SECONDS:.0f} s: end that process, then start again"
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return "give a run directory that exists and can be written"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return "see to the disk (full, or failing), then start again: what was committed is kept"
    return (
        "not a sound database: salvage it with `sqlite3 FILE .recover | sqlite3 NEW` and put NEW in its place, or move "
        "it away (its verdicts are then paid for again)"
    )
