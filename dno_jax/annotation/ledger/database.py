"""A sqlite file that is written on arrival by a thread of its own, and read without waiting for it.

The journal is WAL: a reader never waits for a writer, and a kill -9 leaves at most a journal that the next open
replays. `synchronous` is FULL, not WAL's usual NORMAL, because NORMAL may lose the last commits when the machine itself
dies (a preempted node), and each was paid for. A commit then waits for the disk, 0.2 to 4 ms on local ones (measured,
idle and busy), and a fast judge answers more often than that. So one thread commits, and whatever arrives while it
waits for the disk shares the next commit; each caller still waits for its own, and nobody sees what is not yet there.
"""

from __future__ import annotations

import os
import queue
import random
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from dno_jax.errors import DnoError

LOCK_SECONDS = 30.0
_MOST_AT_ONCE = 256  # writes of one commit: bounds what one failing disk takes down together

T = TypeVar("T")
Write = Callable[[sqlite3.Connection], T]


class Database:
    """One file; several processes may have it open, each through a database of its own."""

    def __init__(self, path: str | os.PathLike[str], *, prepare: Write[None]):
        """Open the file, making it if there is none.

        Args:
            prepare: makes or brings up to date the tables; it runs before anything else does.

        Raises:
            DnoError: it cannot be opened, is no database, or is locked.
        """
        self.path = os.fspath(path)
        if "://" in self.path:
            raise DnoError(f"{self.path}: sqlite cannot write to an object store; give a path in a file system")
        self._jobs: queue.SimpleQueue[tuple[Write[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._reading = threading.Lock()  # a stage may build it in one thread and run its event loop in another
        self._writer = self._connect()
        try:
            with self.explained():
                _keep_a_wal(self._writer)
                self._writer.execute("PRAGMA synchronous = FULL")
                prepare(self._writer)
            self._reader = self._connect()
        except BaseException:
            self._writer.close()
            raise

    def read(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Return all rows that are committed.

        Raises:
            DnoError: the file is damaged or locked.
        """
        with self._reading, self.explained():
            return self._reader.execute(sql, values).fetchall()

    def stream(self, sql: str, values: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Yield rows as they stood when the first was asked for, without holding them all.

        Raises:
            DnoError: as `read`.
        """
        connection = self._connect()
        try:
            with self.explained():
                yield from connection.execute(sql, values)
        finally:
            connection.close()

    def write(self, job: Write[T]) -> Future[T]:
        """Have a job done in the next transaction; the future is done when that is on the disk.

        The future fails with a DnoError where the file is damaged or locked, or the disk full: nothing of the
        transaction is kept then.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # what has arrived is committed even if nobody waits for it any more
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._commit_all, name="verdict store", daemon=True)
                self._thread.start()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Commit what was given, then let go of the file."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
        self._reader.close()
        self._writer.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn sqlite's errors into ours: the file, what is wrong, and what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise DnoError(f"{self.path}: {error}; {_remedy(error, self.path)}") from None

    def _connect(self) -> sqlite3.Connection:
        with self.explained():
            return sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)

    def _commit_all(self) -> None:
        open_ = True
        while open_:
            waiting = [self._jobs.get()]
            while len(waiting) < _MOST_AT_ONCE and not self._jobs.empty():
                waiting.append(self._jobs.get())
            jobs = [item for item in waiting if item is not None]
            open_ = len(jobs) == len(waiting)
            if jobs:
                self._commit(jobs)

    def _commit(self, jobs: list[tuple[Write[Any], Future[Any]]]) -> None:
        try:
            with self.explained(), transaction(self._writer):
                results = [job(self._writer) for job, _ in jobs]
        except BaseException as error:
            # What is wrong with the file (a lock, a full disk) is a DnoError, and wrong for all. Anything else is one
            # job's own, and must not take the others' verdicts with it.
            if len(jobs) == 1 or isinstance(error, DnoError):
                for _, future in jobs:
                    future.set_exception(error)
            else:
                for job in jobs:
                    self._commit([job])
        else:
            for (_, future), result in zip(jobs, results, strict=True):
                future.set_result(result)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing; on the disk at the end."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have rolled it back already
            connection.execute("ROLLBACK")
        raise


def _keep_a_wal(connection: sqlite3.Connection) -> None:
    """Set the journal mode; a file system without shared memory keeps another: slower, and as safe."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # Where several processes make the file at once, sqlite says so at once instead of waiting: each holds a
            # share of the file and wants it alone, so that all would wait for each other.
            if _primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.001, 0.02))


def _primary_code(error: sqlite3.Error) -> int:
    """Return sqlite's code of an error without its extension."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _remedy(error: sqlite3.Error, path: str) -> str:
    code = _primary_code(error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another process has held its lock for {LOCK_SECONDS:.0f} s: end that process, then start again"
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return "it has to lie in a folder that exists and can be written: the run directory, or annotation.store's"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return "see to the disk (full, or failing), then start again: what was committed is kept"
    old, new = shlex.quote(path), shlex.quote(f"{path}.recovered")
    return (
        f"not a sound database. Recover what is whole with `sqlite3 {old} .recover | sqlite3 {new}`, and put that in "
        "its place (docs/annotation.md, The store); or move it away, and its verdicts are paid for again"
    )
