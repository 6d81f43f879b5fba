"""Metrics to metrics.jsonl and TensorBoard, fetched one step behind so that the device never waits for the host."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax

from dno_jax.run_dir import RunDir
from dno_jax.training.board import Board


@dataclass(eq=False)
class NotFinite(Exception):
    """A step whose loss or gradient is NaN or infinite.

    Attributes:
        names: of the batch's rows.
    """

    step: int
    loss: float
    grad_norm: float
    names: Sequence[str]


class MetricsWriter:
    """Takes each step's metrics as device arrays and writes those of the step before.

    Raises:
        NotFinite: from `write` and `flush`, when the metrics of the step before, or of this one, have been written.
    """

    def __init__(
        self, run_dir: RunDir, *, iteration: int, stage: str, tensorboard: bool, enabled: bool, first_step: int
    ):
        self._run_dir = run_dir
        self._place = {"iteration": iteration, "stage": stage}
        self._enabled = enabled
        self._pending: tuple[int, dict[str, Any], Sequence[str], dict[str, float]] | None = None
        self._clock = time.perf_counter()
        self._board: Board | None = None
        self.last: dict[str, float] = {}
        if enabled:
            run_dir.forget_metrics(iteration=iteration, stage=stage, from_step=first_step)
        if enabled and tensorboard:
            self._board = Board(run_dir.tensorboard_path / f"{stage}_{iteration:03d}", first_step=first_step)

    def write(self, step: int, metrics: dict[str, Any], *, names: Sequence[str], **host: float) -> None:
        """Queue one step's device metrics and host figures (`tokens` becomes tokens_per_second).

        Args:
            names: of the batch's rows, to be told where the step has no finite loss or gradient.
        """
        self.flush()
        self._pending = (step, metrics, names, host)

    def flush(self) -> None:
        if self._pending is None:
            return
        step, metrics, names, host = self._pending
        self._pending = None
        row = {name: float(value) for name, value in jax.device_get(metrics).items()} | host
        now = time.perf_counter()
        if "tokens" in row:
            row["tokens_per_second"] = row.pop("tokens") / max(now - self._clock, 1e-9)
        self._clock = now
        self.last = row
        if self._enabled:
            rounded = {name: float(f"{value:.7g}") for name, value in row.items()}
            self._run_dir.append_metrics({**self._place, "step": step, **rounded})
            if self._board is not None:
                self._board.write(step, {f"{self._place['stage']}/{name}": value for name, value in row.items()})
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            raise NotFinite(step, row["loss"], row["grad_norm"], names)

    def close(self) -> None:
        with suppress(NotFinite):  # training has stopped: what it stopped for is to be told
            self.flush()
        if self._board is not None:
            self._board.close()
