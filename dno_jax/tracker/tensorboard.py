"""TensorBoard's event files, written where they are asked for.

tensorboardX's own SummaryWriter hands events through a queue between processes to a thread, which may miss the word to
end: then its `close` waits for ever.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from dno_jax.files import explained

_FLUSH_SECONDS = 10.0


class Board:
    """The curves of one training."""

    def __init__(self, folder: epath.Path, *, first_step: int):
        """Open a new file; steps from `first_step` on that earlier files have are not shown again."""
        from tensorboardX.event_file_writer import EventsWriter

        self._folder, self._flushed = folder, time.monotonic()
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(os.fspath(folder / "events"))
        start = _message("event").SessionLog
        self._add(step=first_step, session_log=start(status=start.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one step's figures.

        Raises:
            DnoError: they cannot be written.
        """
        Summary = _message("summary").Summary
        figures = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=figures))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            with explained(self._folder):
                self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        with explained(self._folder):
            self._file.close()

    def _add(self, **what: object) -> None:
        with explained(self._folder):
            self._file.write_event(_message("event").Event(wall_time=time.time(), **what))


def _message(name: str) -> Any:
    """The module of a kind of message; what is in it is made when it is imported, so that no checker sees it."""
    return importlib.import_module(f"tensorboardX.proto.{name}_pb2")
