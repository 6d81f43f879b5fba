"""The object that says who works on a run directory in a bucket.

It is made only where there is none, which stores do in one piece (if-generation-match 0, if-none-match *). Its holder
renews it; one that was not renewed for a while was left by a dead process and is taken over. Of two that take it over
in the same moment, the one whose own stands after a pause has it; the other one, and a holder that was so slow that it
was taken over, notice before they write the index: the bucket then shows the state of one of them, never a mixture.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from typing import Any

from dno_jax.bucket.store import Store
from dno_jax.console import say
from dno_jax.display import printable
from dno_jax.errors import DnoError

LOCK = ".dno/lock.json"
BEAT_SECONDS = 20.0
STALE_SECONDS = 90.0
_SETTLE_SECONDS = 1.0


class Lost(DnoError):
    """Another process has taken the lock over."""


class Lock:
    """Of one URL, for one process."""

    def __init__(self, store: Store):
        self._store = store
        self._mine: dict[str, Any] = {}

    def acquire(self) -> None:
        """Take the lock, where nobody alive has it.

        A dead holder is waited for until it has been silent for STALE_SECONDS by the clocks of both machines.

        Raises:
            DnoError: another process has it, or the bucket cannot be written.
        """
        self._mine = {
            "owner": uuid.uuid4().hex,
            "who": f"process {os.getpid()} on {socket.gethostname()}",
            "folder": str(self._store.place.folder),
        }
        first, told = self._holder(), False
        if first is None and self._store.create(LOCK, self._text()):
            return self._settle()
        while (found := self._holder()) is not None:
            silent = time.time() - found["beat"]
            if found != first:  # it has been renewed, or passed on, while this looked
                raise DnoError(f"{self._head} in use by {_who(found)}; {self._remedy}")
            if silent > STALE_SECONDS or _is_dead_here(found, self._mine):
                say(f"{self._store.place.url}: taken over from {_who(found)}, silent for {silent:.0f} s")
                self._store.write(LOCK, self._text())
                return self._settle()
            if not told:
                say(
                    f"{self._store.place.url}: held by {_who(found)}, whose last sign of life is {max(silent, 0):.0f} "
                    f"s old; waiting whether there is another, {STALE_SECONDS - silent:.0f} s at most"
                )
                told = True
            time.sleep(BEAT_SECONDS / 10)
        return self.acquire()  # it was given back

    def renew(self) -> None:
        """Give a sign of life.

        Raises:
            Lost: another process has taken the lock.
        """
        self.check()
        self._store.write(LOCK, self._text(), patience=0.0)

    def check(self) -> None:
        """
        Raises:
            Lost: another process has taken the lock.
        """
        found = self._holder()
        if found is None or found.get("owner") != self._mine.get("owner"):
            by = "somebody has removed its lock" if found is None else f"taken over by {_who(found)}"
            raise Lost(
                f"{self._head} {by}, as this process gave no sign of life for {STALE_SECONDS:g} s, or by hand. What it "
                f"has computed since its last upload lies in {self._store.place.folder}; start again when the other is "
                "done"
            )

    def release(self) -> None:
        """Give the lock back, if it is still this process's."""
        found = self._holder()
        if found is not None and found.get("owner") == self._mine.get("owner"):
            self._store.remove(LOCK)

    def holder(self) -> str | None:
        """Who has given a sign of life lately; None where nobody has."""
        found = self._holder()
        return None if found is None or time.time() - found["beat"] > STALE_SECONDS else _who(found)

    @property
    def _head(self) -> str:
        return f"run_dir {self._store.place.url}:"

    @property
    def _remedy(self) -> str:
        return f"wait until it ends, stop it, or give another run_dir (its lock is {self._store.place.url}/{LOCK})"

    def _text(self) -> bytes:
        return (json.dumps(self._mine | {"beat": time.time()}) + "\n").encode()

    def _settle(self) -> None:
        """See, after a pause, that it is this process's: some stores do not make objects only where there are none."""
        time.sleep(_SETTLE_SECONDS)
        found = self._holder()
        if found is None or found.get("owner") != self._mine["owner"]:
            raise DnoError(f"{self._head} in use by {_who(found or {})}; {self._remedy}")

    def _holder(self) -> dict[str, Any] | None:
        text = self._store.read(LOCK)
        if text is None:
            return None
        try:
            found = json.loads(text)
            return found | {"beat": float(found["beat"])}
        except (ValueError, LookupError, TypeError):
            return {"beat": 0.0}  # nobody's: it is silent since ever


def _who(found: dict[str, Any]) -> str:
    return printable(str(found.get("who", "another process")))[:200]


def _is_dead_here(found: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether it was left in this very folder, which this process holds by a lock of the file system."""
    host = mine["who"].rpartition(" on ")[2]
    return found.get("folder") == mine["folder"] and str(found.get("who", "")).endswith(f" on {host}")
