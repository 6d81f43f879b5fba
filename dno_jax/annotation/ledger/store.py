"""Every verdict ever paid for, in one sqlite file, keyed by the content of the request; and what each run paid.

What arrives is committed before its caller sees it, so a crash costs the requests in flight and no more. Only "ok" and
"tie" are answers, and an answer is never replaced; what failed is kept for people and for its count of tries, and is
asked again. Runs may share a file.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

from dno_jax.annotation.ledger.database import Database, transaction
from dno_jax.annotation.question import Verdict
from dno_jax.annotation.transport.batch_api import OpenBatch
from dno_jax.errors import DnoError

_SCHEMA_VERSION = 4
_VERDICTS = """
    CREATE TABLE IF NOT EXISTS verdicts (
        key        TEXT PRIMARY KEY,  -- sha256 of the canonical JSON of judge, request and repetition
        judge      TEXT NOT NULL,
        prompt_id  TEXT NOT NULL,     -- of the pool that asked first
        state      TEXT NOT NULL,     -- ok, tie, refused, unparsable, failed; only ok and tie are answers
        scores     TEXT,              -- JSON list in the order of presentation; NULL unless an answer
        raw        TEXT NOT NULL,     -- the last reply in the judge's own words
        detail     TEXT NOT NULL,
        model      TEXT NOT NULL,     -- what the endpoint says it is
        tries      INTEGER NOT NULL,  -- requests, all runs together; tokens and dollars likewise
        tokens_in  INTEGER NOT NULL,
        tokens_out INTEGER NOT NULL,
        created_at TEXT NOT NULL,     -- UTC; of the last change
        usd        REAL NOT NULL DEFAULT 0
    )
"""
_RECEIPTS = """
    CREATE TABLE IF NOT EXISTS receipts (
        run        TEXT NOT NULL,     -- its directory, seen from this file's
        model      TEXT NOT NULL,     -- as the configuration names it
        requests   INTEGER NOT NULL,
        tokens_in  INTEGER NOT NULL,
        tokens_out INTEGER NOT NULL,
        usd        REAL NOT NULL,
        unmetered  INTEGER NOT NULL,  -- requests whose usage nobody stated: they count as the most they can have cost
        PRIMARY KEY (run, model)
    )
"""
_OTHERS = """
    CREATE TABLE IF NOT EXISTS other_models (
        run      TEXT NOT NULL,
        model    TEXT NOT NULL,     -- that was asked
        answered TEXT NOT NULL,     -- that answered, as the endpoint names it
        replies  INTEGER NOT NULL,
        PRIMARY KEY (run, model, answered)
    )
"""
_BATCHES = """
    CREATE TABLE IF NOT EXISTS batches (
        token    TEXT PRIMARY KEY,  -- names a batch here and in its metadata
        url      TEXT NOT NULL,     -- of the endpoint that has it
        keys     TEXT NOT NULL,     -- JSON list of the questions whose answers are still to be collected
        batch_id TEXT               -- NULL while it is not known whether it was made
    )
"""
_IDENTITY = """
    CREATE TABLE IF NOT EXISTS identity (
        one      INTEGER PRIMARY KEY CHECK (one = 1),
        store_id TEXT NOT NULL  -- tells it from others, wherever it lies
    )
"""
_IDENTIFY = "INSERT OR IGNORE INTO identity VALUES (1, lower(hex(randomblob(8))))"
# An answer stays: neither a later failure nor a second answer (two processes asking at once) replaces it.
_PUT = """
    INSERT INTO verdicts (key, judge, prompt_id, state, scores, raw, detail, model, tries, tokens_in, tokens_out, usd,
        created_at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
    ON CONFLICT (key) DO UPDATE SET
        state = excluded.state, scores = excluded.scores, raw = excluded.raw, detail = excluded.detail,
        model = excluded.model, tries = tries + excluded.tries, tokens_in = tokens_in + excluded.tokens_in,
        tokens_out = tokens_out + excluded.tokens_out, usd = usd + excluded.usd, created_at = excluded.created_at
    WHERE state NOT IN ('ok', 'tie')
"""
_PAY = """
    INSERT INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (run, model) DO UPDATE SET
        requests = requests + excluded.requests, tokens_in = tokens_in + excluded.tokens_in,
        tokens_out = tokens_out + excluded.tokens_out, usd = usd + excluded.usd,
        unmetered = unmetered + excluded.unmetered
"""
_COUNT_OTHER = """
    INSERT INTO other_models VALUES (?, ?, ?, 1)
    ON CONFLICT (run, model, answered) DO UPDATE SET replies = replies + 1
"""
_COLUMNS = "state, scores, raw, detail, model, tries, tokens_in, tokens_out, usd"
_ROW = f"key, judge, prompt_id, {_COLUMNS}, created_at"
_RECEIPT = "run, model, requests, tokens_in, tokens_out, usd, unmetered"
_BATCH = "token, url, keys, batch_id"


@dataclass(frozen=True)
class Receipt:
    """What one run paid to one model.

    Attributes:
        run: names the run in this file.
        model: as the configuration names it.
        requests: sent, answered or not.
        tokens_in, tokens_out: as the endpoints counted them.
        usd: dollars; 0 where no price was known.
        unmetered: requests whose usage nobody stated; `usd` holds the most that they can have cost.
        answered_by: of one request, another model that answered it, as the endpoint names it; empty where none did.
    """

    run: str
    model: str
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    unmetered: int = 0
    answered_by: str = ""


@dataclass(frozen=True)
class Tally:
    """How many verdicts of a judge are in one state, and what they took, all runs together."""

    judge: str
    state: str
    verdicts: int
    tries: int
    tokens_in: int
    tokens_out: int
    usd: float


class VerdictStore:
    """The file of verdicts; several processes may have it open, each through a store of its own."""

    def __init__(self, path: str | os.PathLike[str]):
        """Open the file, making it if there is none; one of an earlier version is brought up to date in place.

        Raises:
            DnoError: it cannot be opened, is no database of ours, or is locked.
        """
        self.path = os.fspath(path)
        self._database = Database(path, prepare=functools.partial(_prepare, self.path))

    @property
    def store_id(self) -> str:
        """Tells the file from others: it goes with it where it is moved."""
        return self._database.read("SELECT store_id FROM identity")[0][0]

    def get(self, key: str) -> Verdict | None:
        """Return the answer to a request, or None where it has to be asked (again).

        Raises:
            DnoError: the file is damaged or locked.
        """
        rows = self._database.read(f"SELECT {_COLUMNS} FROM verdicts WHERE key = ?", (key,))
        verdict = self._verdict(rows[0]) if rows else None
        return verdict if verdict is not None and verdict.is_answer else None

    async def put(self, key: str, verdict: Verdict, *, judge: str, prompt_id: str, paid: Receipt) -> Verdict:
        """Commit a try with its receipt, and return what now stands: an earlier answer to the request is kept.

        Args:
            paid: what is added to the run's receipt of this model, whichever verdict stands.

        Returns:
            The last verdict, or the answer; tries, tokens and dollars of all runs together.

        Raises:
            DnoError: the file is damaged, locked, or the disk is full.
        """
        scores = None if verdict.scores is None else json.dumps(verdict.scores)
        row = (key, judge, prompt_id, verdict.state, scores, verdict.raw, verdict.detail, verdict.model)
        row += (verdict.tries, verdict.tokens_in, verdict.tokens_out, verdict.usd)

        def job(connection: sqlite3.Connection) -> Any:
            connection.execute(_PUT, row)
            _pay(connection, paid)
            return connection.execute(f"SELECT {_COLUMNS} FROM verdicts WHERE key = ?", (key,)).fetchone()

        return self._verdict(await asyncio.wrap_future(self._database.write(job)))

    async def pay(self, paid: Receipt) -> None:
        """Commit what a run paid for no verdict."""

        def job(connection: sqlite3.Connection) -> None:
            _pay(connection, paid)

        await asyncio.wrap_future(self._database.write(job))

    def other_models(self, run: str) -> dict[str, dict[str, int]]:
        """Return how often other models answered a run than were asked: asked -> answered -> replies."""
        found: dict[str, dict[str, int]] = {}
        rows = "SELECT model, answered, replies FROM other_models WHERE run = ? ORDER BY model, answered"
        for model, answered, replies in self._database.read(rows, (run,)):
            found.setdefault(model, {})[answered] = replies
        return found

    def spent(self, run: str) -> float:
        """Return what a run has paid, dollars, all models together."""
        return self._database.read("SELECT total(usd) FROM receipts WHERE run = ?", (run,))[0][0]

    def receipts(self) -> list[Receipt]:
        """Return what every run paid, by run and model."""
        rows = self._database.read(f"SELECT {_RECEIPT} FROM receipts ORDER BY run, model")
        return [Receipt(*row) for row in rows]

    def tallies(self, *, judge: str | None = None, state: str | None = None) -> list[Tally]:
        """Count verdicts by judge and state.

        Args:
            judge: only judges whose identity has these words, as a model's name.
            state: only verdicts in this state.
        """
        where, values = _matching(judge, state)
        rows = self._database.read(
            "SELECT judge, state, count(*), sum(tries), sum(tokens_in), sum(tokens_out), sum(usd) FROM verdicts "
            f"{where} GROUP BY judge, state ORDER BY judge, state",
            values,
        )
        return [Tally(*row) for row in rows]

    def rows(self, *, judge: str | None = None, state: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield every verdict with all that is known of it, in the order in which they were first asked for."""
        where, values = _matching(judge, state)
        names = _ROW.split(", ")
        for row in self._database.stream(f"SELECT {_ROW} FROM verdicts {where} ORDER BY rowid", values):
            found = dict(zip(names, row, strict=True))
            yield found | {"scores": None if found["scores"] is None else json.loads(found["scores"])}

    def purge(self, *, judge: str | None = None, state: str | None = None) -> int:
        """Delete verdicts, and return how many; receipts stay, since the money is spent."""
        where, values = _matching(judge, state)
        return self._execute(f"DELETE FROM verdicts {where}", values)

    def remember_batch(self, batch: OpenBatch) -> None:
        """Note a batch, in place of what is noted under its token; it is on the disk when this returns."""
        row = (batch.token, batch.url, json.dumps(batch.keys), batch.batch_id)
        self._execute("REPLACE INTO batches VALUES (?, ?, ?, ?)", row)

    def open_batches(self) -> list[OpenBatch]:
        """Return the batches whose answers are still to be collected."""
        rows = self._database.read(f"SELECT {_BATCH} FROM batches ORDER BY rowid")
        return [OpenBatch(token, url, tuple(json.loads(keys)), batch_id) for token, url, keys, batch_id in rows]

    def close_batch(self, token: str) -> None:
        """Forget a batch; on the disk when this returns."""
        self._execute("DELETE FROM batches WHERE token = ?", (token,))

    def close(self) -> None:
        """Commit what was given, then let go of the file."""
        self._database.close()

    def _execute(self, sql: str, values: tuple[Any, ...]) -> int:
        """Have one statement on the disk, and return how many rows it changed."""
        return self._database.write(lambda connection: connection.execute(sql, values).rowcount).result()

    def _verdict(self, row: tuple[Any, ...]) -> Verdict:
        state, scores, *others = row
        try:
            read = None if scores is None else tuple(float(score) for score in json.loads(scores))
            return Verdict(state, read, *others)
        except (ValueError, TypeError) as error:
            raise DnoError(f"{self.path}: a row that this program never wrote ({error}); move the file away") from None


def _pay(connection: sqlite3.Connection, paid: Receipt) -> None:
    connection.execute(_PAY, astuple(paid)[:-1])
    if paid.answered_by:
        connection.execute(_COUNT_OTHER, (paid.run, paid.model, paid.answered_by))


def _matching(judge: str | None, state: str | None) -> tuple[str, tuple[str, ...]]:
    # Whole words: gpt-4.1 is not gpt-4.1-mini.
    wanted = {"instr(' ' || judge || ' ', ' ' || ? || ' ') > 0": judge, "state = ?": state}
    given = {condition: value for condition, value in wanted.items() if value is not None}
    return (f"WHERE {' AND '.join(given)}" if given else ""), tuple(given.values())


def _prepare(path: str, connection: sqlite3.Connection) -> None:
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found not in range(_SCHEMA_VERSION + 1):
        raise DnoError(
            f"{path}: a store of version {found}, this program reads {_SCHEMA_VERSION}: move it away, or use "
            "the program that wrote it"
        )
    if found != _SCHEMA_VERSION:  # only where needed: a write would wait for the lock each time it is opened
        with transaction(connection):
            connection.execute(_VERDICTS)
            connection.execute(_RECEIPTS)
            connection.execute(_BATCHES)
            connection.execute(_OTHERS)
            connection.execute(_IDENTITY)
            connection.execute(_IDENTIFY)
            # By shape, not by number: another process may have been here, and a recovered file may have no number.
            if "usd" not in {column[1] for column in connection.execute("PRAGMA table_info(verdicts)")}:
                connection.execute("ALTER TABLE verdicts ADD COLUMN usd REAL NOT NULL DEFAULT 0")
            connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    connection.execute(f"SELECT {_ROW} FROM verdicts LIMIT 1").fetchone()
