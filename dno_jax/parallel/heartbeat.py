"""Whether the other processes are alive, and the one sentence with which the rest end where one is not.

jax has a heartbeat of its own, at whose end it aborts a process with a C++ stack and no word about what to do. Ours is
shorter: every process leaves a sign with the coordinator now and then; process 0 misses the others', and they miss it.
Who ends for a reason of its own leaves the reason there. Nothing here is a collective.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax

from dno_jax import stopping

_WORDS, _SIGNS, _PARTED = "dno_jax/words/", "dno_jax/signs/", "dno_jax/parted"
STOP = f"{_WORDS}stop"  # left by a process that was asked to stop
_ENDS = f"{_WORDS}ends"  # by one that ends, with its exit status and a sentence
_LOOK_SECONDS = 0.5
_HEARD_OF_SECONDS = 3 * _LOOK_SECONDS  # all have looked by then
_GONE_SECONDS = 2.0
_LONGEST_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class Others:
    """What is known of the processes of a run when they have met.

    Attributes:
        client: of the coordinator, which process 0 runs.
        gone: set where the line to the coordinator has broken (relay.py).
        index: of this process.
        hosts: of all, by index.
        seconds: without a sign, after which a process is taken for dead.
    """

    client: Any
    gone: threading.Event
    index: int
    hosts: Sequence[str]
    seconds: float

    def named(self, index: int) -> str:
        return f"process {index} on {self.hosts[index]}"


class Heartbeat:
    """Two threads: one that talks to the coordinator, which may hang with it, and one that counts the silence."""

    def __init__(self, others: Others):
        self._others = others
        self._watched = range(1, len(others.hosts)) if others.index == 0 else range(1)
        self._silent = dict.fromkeys(self._watched, 0.0)
        self._signs: dict[int, str] = {}
        self._answered = 0.0  # seconds since the coordinator last answered
        self._over = False
        for work in (self._talk, self._count):
            threading.Thread(target=work, name=f"heartbeat {work.__name__}", daemon=True).start()

    def fail(self, status: int) -> None:
        """Tell the others that this process ends by an error of its own, and give them time to hear of it."""
        mine = self._others
        self._leave_end(status, f"{mine.named(mine.index)} has failed (exit status {status}): see what it has said")

    def await_verdict(self) -> None:
        """Return when all others have shown signs of life; where one has not, this process ends meanwhile.

        For an error that a lost connection may explain: a peer's death is an exception here before it is noticed.
        """
        time.sleep(self._others.seconds + _HEARD_OF_SECONDS)

    def part(self) -> None:
        """Wait until all have come to their end, watching still; then watch no more."""
        with suppress(jax.errors.JaxRuntimeError):
            self._others.client.wait_at_barrier(_PARTED, _LONGEST_SECONDS * 1000)
        self.rest()

    def rest(self) -> None:
        """Watch no more: at a process's exit jax's coordinator goes too."""
        self._over = True

    def _leave_end(self, status: int, why: str) -> None:
        self._over = True
        with suppress(jax.errors.JaxRuntimeError):
            self._others.client.key_value_set(_ENDS, f"{status} {why}")
            time.sleep(_HEARD_OF_SECONDS)

    def _talk(self) -> None:
        period = min(self._others.seconds / 10, 5.0)
        due, count = 0.0, 0
        while not self._over:
            with suppress(jax.errors.JaxRuntimeError):  # no answer: the other thread counts
                self._heed(dict(self._read(_WORDS)))
                if time.monotonic() >= due:
                    due, count = time.monotonic() + period, count + 1
                    self._exchange_signs(count)
                self._answered = 0.0
            time.sleep(min(_LOOK_SECONDS, period))

    def _heed(self, words: dict[str, str]) -> None:
        if _ENDS in words and not self._over:
            status, why = words[_ENDS].split(" ", 1)
            stopping.end_now(why, int(status))
        if STOP in words and not stopping.asked():  # what is left of a run could only wait for who was asked
            os.kill(os.getpid(), signal.SIGTERM)

    def _exchange_signs(self, count: int) -> None:
        mine, client = self._others.index, self._others.client
        client.key_value_set(f"{_SIGNS}{mine}", str(count), allow_overwrite=True)
        signs = self._read(_SIGNS) if mine == 0 else self._read(f"{_SIGNS}0")
        for key, sign in signs:
            index = int(key.rsplit("/", 1)[1])
            if index in self._silent and self._signs.get(index) != sign:
                self._signs[index], self._silent[index] = sign, 0.0

    def _read(self, place: str) -> list[tuple[str, str]]:
        with unless("NOT_FOUND"):
            if place.endswith("/"):
                return self._others.client.key_value_dir_get(place)
            return [(place, self._others.client.key_value_try_get(place))]
        return []

    def _count(self) -> None:
        """Count in ticks: a whole job that is suspended and goes on has missed little.

        On a machine that is too busy to let this thread run, a tick is long, and jax would abort before we had counted.
        """
        seconds = self._others.seconds  # what is left of it goes between signs, and to telling the others
        limit = max(0.85 * seconds - 2.0, 0.5 * seconds)
        longest = max(2 * _LOOK_SECONDS, limit / 8)
        before = time.monotonic()
        while not self._over:
            time.sleep(_LOOK_SECONDS)
            tick, before = min(time.monotonic() - before, longest), time.monotonic()
            self._answered += tick
            for index in self._watched:
                self._silent[index] += tick
                if self._silent[index] >= limit and not self._over:
                    silence = f"has given no sign of life for {self._others.seconds:g} s (heartbeat_seconds)"
                    self._end_without(index, f"{silence}: it is dead, hangs, or cannot be reached")
            if self._others.gone.is_set() and self._answered >= _GONE_SECONDS and not self._over:
                self._end_without(0, "has ended without a word, or its connection is lost")

    def _end_without(self, index: int, what: str) -> None:
        why = f"{self._others.named(index)} {what}; the same command goes on from what is saved"
        if self._others.index == 0:  # with it the coordinator ends, by which the others would hear of nothing
            self._leave_end(stopping.STOPPED, why)
        stopping.end_now(why, stopping.STOPPED)


@contextmanager
def unless(status: str) -> Iterator[None]:
    """Let a coordinator's answer of this status pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if status not in str(error):
            raise
