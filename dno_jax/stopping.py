"""A process that is asked to stop: by SIGTERM, as schedulers do before they take a machine away, or by a Ctrl-C.

Either ends the work by KeyboardInterrupt, wherever it is; where that would lose something (`finishing`), it is noted
and raised at the end. A thread hears signals too, also while the main one is inside of a library: it ends the process
where the grace is over, or at a second signal. An interrupt that Python or a library drops is sent again (`repeat`), or
raised where the next piece of work is whole (`heed`). A signal that the process ignores stays ignored.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

from dno_jax.display import printable

# Exit statuses. After SIGTERM: EX_TEMPFAIL, which no failure of ours has: the same command goes on from there.
STOPPED, INTERRUPTED = 75, 130
GRACE_SECONDS = 100.0
HEARTBEAT_SECONDS = 100.0  # of several processes: without a sign of one, before the others end
_ONE_REQUEST_SECONDS = 1.0  # launchers send the first signal several times, by several ways
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class _Stop:
    """What this process was asked, and what it does meanwhile."""

    by: int | None = None  # the first signal
    since: float = 0.0
    grace: float = GRACE_SECONDS
    listens: bool = False
    heeds_interrupts: bool = True
    echoes: int = 0  # signals of our own that are still to be heard
    untold: list[Callable[[], None]] = field(default_factory=list)

    def note(self, number: int) -> None:
        """Note the first signal; whichever thread comes first."""
        if self.by is None:
            self.by, self.since = number, time.monotonic()

    def hear(self, number: int) -> None:
        """Note a signal and tell of it; a second one ends the process at once."""
        if self.echoes:
            self.echoes -= 1
            return
        if number not in _SIGNALS or (number == signal.SIGINT and not self.heeds_interrupts):
            return
        self.note(number)
        if time.monotonic() - self.since > _ONE_REQUEST_SECONDS:
            self.end("asked a second time: ends at once")
        while self.untold:
            with suppress(Exception):  # the others may be gone
                self.untold.pop()()

    def left(self) -> float | None:
        """Seconds until the grace is over; None where nobody has asked."""
        return None if self.by is None else max(self.since + self.grace - time.monotonic(), 0.0)

    def end(self, why: str) -> None:
        end_now(f"{why}; the same command goes on from what is saved", exit_status())


_stop = _Stop()


def end_now(why: str, status: int) -> NoReturn:
    """End the process here, whatever its threads do, with one sentence; what is on disk whole stays."""
    shown = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar has hidden the cursor
    with suppress(OSError):
        os.write(2, f"{shown}dno: {printable(why)}\n".encode())
    os._exit(status)


def asked() -> bool:
    """Whether this process has been asked to stop."""
    return _stop.by is not None


def heed() -> None:
    """Raise the interrupt of a stop that was asked for and went lost; called where a piece of work is whole.

    Raises:
        KeyboardInterrupt: in the main thread of a process that was asked to stop.
    """
    if asked() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def repeat() -> None:
    """Interrupt the main thread once more for what was asked already; it counts as no second request."""
    _stop.echoes += 1
    os.kill(os.getpid(), _stop.by or signal.SIGINT)


def exit_status() -> int:
    """The exit status of a command that was stopped."""
    return STOPPED if _stop.by == signal.SIGTERM else INTERRUPTED


def allow(seconds: float) -> None:
    """Set how long after the first signal the process may go on, to save what it has."""
    _stop.grace = seconds


def when_asked(tell: Callable[[], None]) -> None:
    """Call a function, from another thread, when this process is asked to stop."""
    _stop.untold.append(tell)


@contextmanager
def listening() -> Iterator[None]:
    """Heed signals while a command runs, and, once asked to stop, to the end of the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    heard, written = os.pipe()
    os.set_blocking(written, False)
    wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    _stop.listens = True
    threading.Thread(target=_listen, args=(heard,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        if not asked():  # else it sees to it that the rest of the process ends
            signal.set_wakeup_fd(wakeup)
            os.close(written)
            signal.signal(signal.SIGTERM, before)
            _forget()


def _listen(heard: int) -> None:
    while True:
        ready, _, _ = select.select([heard], [], [], _stop.left())
        if not ready:
            _stop.end(f"not at an end {_stop.grace:g} s after it was asked to stop (grace_seconds)")
        signals = os.read(heard, 64)
        if not signals:
            os.close(heard)
            return
        for number in signals:
            _stop.hear(number)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    _stop.note(number)
    interrupt = signal.getsignal(signal.SIGINT)  # asyncio has one of its own, which lets tasks end
    if not callable(interrupt):  # a shell's background jobs ignore it
        raise KeyboardInterrupt
    interrupt(signal.SIGINT, frame)


def _forget() -> None:
    global _stop
    _stop = _Stop()


@contextmanager
def finishing() -> Iterator[None]:
    """Let no signal interrupt what is inside, which looks at `asked` and ends soon; a stop is raised at its end.

    Raises:
        KeyboardInterrupt: the process was asked to stop meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A shell's background jobs ignore Ctrl-C, which is meant for the one in front: here too.
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, _note)) for number in heeded]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    if asked():
        if not _stop.listens:  # who uses this as a library goes on after it
            _forget()
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    del frame
    _stop.note(number)


@contextmanager
def conversing() -> Iterator[None]:
    """Leave a Ctrl-C to what is inside: it gives up one answer, and asks nobody to stop."""
    _stop.heeds_interrupts = False
    try:
        yield
    finally:
        _stop.heeds_interrupts = True
