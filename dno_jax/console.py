"""Progress on the console: bars with rate and time left on a terminal, an occasional line in a log.

Whatever is printed here may quote what a model, a server or a file says: nothing of it acts on the terminal.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Span, Text

from dno_jax.display import printable


class PlainConsole(Console):
    """A console on which no text acts: control sequences are spelt out, and there is neither markup nor emoji code.

    Tables are as wide as their numbers need, wider than the terminal if need be: a number that is cut is another one.
    """

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        needed = max((_needed(self, item) for item in objects), default=0)
        before = self._width
        if needed > self.width:
            self._width = needed
        try:
            super().print(*objects, **options)
        finally:
            self._width = before

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text) and printable(renderable.plain) != renderable.plain:
            renderable = _spelt_out(renderable)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def _spelt_out(text: Text) -> Text:
    """The same before it is laid out: what grew afterwards would be cut at the edge."""
    found = text.copy()
    found.plain = printable(text.plain)
    grown = [len(printable(text.plain[:end])) for span in text.spans for end in (span.start, span.end)]
    found.spans = [
        Span(start, end, span.style) for start, end, span in zip(grown[::2], grown[1::2], text.spans, strict=True)
    ]
    return found


def _needed(console: Console, item: Any) -> int:
    """Columns without which a number of a table would be cut: columns that may wrap are words, and are folded."""
    if isinstance(item, Group):
        return max((_needed(console, part) for part in item.renderables), default=0)
    if not isinstance(item, Table):
        return 0
    options = console.options.update(width=_WIDEST)
    folded = 0
    for column in item.columns:
        if not column.no_wrap:
            cells = [Measurement.get(console, options, cell).maximum for cell in (column.header, *column.cells)]
            folded += max(0, max(cells, default=0) - _LEAST_FOLDED)
    return Measurement.get(console, options, item).maximum - folded


console = PlainConsole(stderr=True)  # progress, warnings, words about a command
results = PlainConsole()  # what it was asked for, and nothing else: what a pipe or a file takes
_WIDEST = 1000
_LEAST_FOLDED = 12
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_ASIDES = 1.0
_SECONDS_BETWEEN_REMINDERS = 600.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        unit, scale = task.fields["unit"], task.fields["scale"]
        return Text("" if rate is None else f"{_amount(rate, scale, digits=1)} {unit}/s", style="cyan")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        done, total = (_amount(n or 0, task.fields["scale"]) for n in (task.completed, task.total))
        return Text(f"{done:>{len(total)}}/{total}", style="progress.download")


def _amount(count: int | float, scale: int, *, digits: int = 0) -> str:
    """A number of units, each of which is `scale` counts: with two decimals where it is more than one."""
    return f"{count / scale:,.{digits if scale == 1 else 2}f}" if digits or scale > 1 else f"{int(count)}"


class _Board:
    """The one live display of the process: sampling and annotation draw on it together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._progress: Progress | None = None

    def join(self) -> Progress:
        with self._lock:
            if self._progress is None:
                columns = (
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    _Count(),
                    _Rate(),
                    TimeRemainingColumn(),
                )
                self._progress = Progress(*columns, console=console)
                self._progress.start()
            self._users += 1
            return self._progress

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._progress is not None:
                self._progress.stop()
                self._progress = None


_board = _Board()


class Meter:
    """Counts one stage's work up to its total.

    with Meter("sample", total=n, unit="prompts") as meter:
        meter.advance(k)

    One unit is `scale` counts: bytes are shown in GB with unit="GB", scale=10**9.
    """

    def __init__(
        self,
        description: str,
        *,
        total: int,
        unit: str,
        scale: int = 1,
        done: int = 0,
        enabled: bool = True,
        aside: Callable[[], str] | None = None,
    ):
        """Count from `done` to `total`; `aside` is asked, once a second at most, for a word beside the description."""
        self._description, self._total, self._unit, self._scale = description, total, unit, scale
        self._aside, self._asked = aside, -math.inf
        self._done = self._first = done
        self._said: int | None = None
        self._enabled = enabled
        self._progress: Progress | None = None
        self._note = ""

    def __enter__(self) -> Meter:
        self._start = self._spoke = time.monotonic()
        if self._enabled and console.is_terminal:
            self._progress = _board.join()
            self._task = self._progress.add_task(
                self._description, total=self._total, completed=self._done, unit=self._unit, scale=self._scale
            )
        return self

    def advance(self, count: int, *, note: str = "") -> None:
        """Add finished work; `note` follows the description."""
        self._done += count
        self._note = note or self._note
        if self._aside is not None and time.monotonic() - self._asked >= _SECONDS_BETWEEN_ASIDES:
            self._note, self._asked = self._aside(), time.monotonic()
        if self._progress is not None:
            description = f"{self._description} {self._note}".rstrip()
            self._progress.update(self._task, completed=self._done, description=description)
        elif self._enabled and time.monotonic() - self._spoke >= _SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            self._say()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            _board.leave()
        elif self._enabled and kind is None and self._said != self._done:
            self._say()

    def expect(self, total: int) -> None:
        """Set a total that was not known at the start."""
        self._total = total
        if self._progress is not None:
            self._progress.update(self._task, total=total)

    def _say(self) -> None:
        self._said = self._done
        rate = (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate else float("inf")
        ending = f", {left:,.0f} s left" if 0 < left < float("inf") else ""
        note = f" {self._note}" if self._note else ""
        console.print(
            f"{self._description}{note}: {_amount(self._done, self._scale)}/{_amount(self._total, self._scale)} "
            f"{self._unit} ({_amount(rate, self._scale, digits=1)}/s{ending})",
            soft_wrap=True,
        )


class Reminder:
    """Says what is being waited for on the first call, and then every ten minutes."""

    def __init__(self) -> None:
        self._due = -math.inf

    def __call__(self, message: str) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _SECONDS_BETWEEN_REMINDERS
            say(message)


def say(message: str) -> None:
    """Print one line for a person."""
    console.print(message, soft_wrap=True)
