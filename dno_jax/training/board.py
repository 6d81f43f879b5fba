"""TensorBoard's event files, written where they are asked for.

tensorboardX's own SummaryWriter hands events through a queue between processes to a thread, which may miss the word to
end: then its `close` waits for ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from etils import epath

from dno_jax.files import explained

_FLUSH_SECONDS = 10.0


class Board:
    """The curves of one training."""

    def __init__(self, folder: epath.Path, *, first_step: int):
        """Open a new file; steps from `first_step` on that earlier files have are not shown again."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder, self._flushed = folder, time.monotonic()
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(os.fspath(folder / "events"))
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one step's figures.

        Raises:
            DnoError: they cannot be written.
        """
        from tensorboardX.proto.summary_pb2 import Summary

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
        from tensorboardX.proto.event_pb2 import Event

        with explained(self._folder):
            self._file.write_event(Event(wall_time=time.time(), **what))
