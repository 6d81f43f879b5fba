"""Metrics to metrics.jsonl and to sinks, fetched one step behind so that the device never waits for the host."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax

from dno_jax.console import say
from dno_jax.run_dir import RunDir
from dno_jax.tracker import Sinks
from dno_jax.training.health import Health


@dataclass(eq=False)
class NotFinite(Exception):
    """A step whose loss or gradient is NaN or infinite, where no more of them may be skipped.

    Attributes:
        names: of the batch's rows.
        skipped: steps of the training that were skipped before.
    """

    step: int
    loss: float
    grad_norm: float
    names: Sequence[str]
    skipped: int = 0


@dataclass(frozen=True)
class Course:
    """Which training figures are of, and what its steps may be.

    Attributes:
        first_step: that this call takes.
        skipped: steps without a finite loss that earlier calls skipped.
        max_skipped: how many there may be.
        peak: FLOP/s of all devices at their best; None where it is not known.
    """

    iteration: int
    stage: str
    first_step: int = 0
    skipped: int = 0
    max_skipped: int = 0
    peak: float | None = None


class MetricsWriter:
    """Takes each step's metrics as device arrays and writes those of the step before.

    Raises:
        NotFinite: from `write` and `flush`, when the metrics of the step before, or of this one, have been written.
    """

    def __init__(self, run_dir: RunDir, course: Course, *, enabled: bool, sinks: Sinks | None = None):
        """Write where `enabled`, to `sinks` too."""
        self._run_dir = run_dir
        self._course = course
        self._skipped = course.skipped
        self._enabled = enabled
        self._pending: tuple[int, dict[str, Any], Sequence[str], dict[str, float]] | None = None
        self._clock = time.perf_counter()
        self._sinks = sinks or Sinks()
        self._health = Health(f"{course.stage} {course.iteration}", say if enabled else _nobody)
        self.last: dict[str, float] = {}
        if enabled:
            run_dir.forget_metrics(iteration=course.iteration, stage=course.stage, from_step=course.first_step)

    def write(self, step: int, metrics: dict[str, Any], *, names: Sequence[str], **host: float) -> None:
        """Queue one step's device metrics and host figures.

        Args:
            names: of the batch's rows, to be told where the step has no finite loss or gradient.
            host: `tokens` becomes tokens_per_second, `flops` tflops_per_second and, where the peak is known, mfu.
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
        row["step_seconds"] = seconds = max(now - self._clock, 1e-9)
        if "tokens" in row:
            row["tokens_per_second"] = row.pop("tokens") / seconds
        if "flops" in row:
            flops = row.pop("flops") / seconds
            row["tflops_per_second"] = flops / 1e12
            if self._course.peak is not None:
                row["mfu"] = flops / self._course.peak
        self._clock = now
        row = self._health.look(step, row)
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        if finite or not self.last:
            self.last = row
        if self._enabled:
            place = {"iteration": self._course.iteration, "stage": self._course.stage, "step": step}
            self._run_dir.append_metrics(place | {name: float(f"{value:.7g}") for name, value in row.items()})
            self._sinks.write(step, {f"{self._course.stage}/{name}": value for name, value in row.items()})
        if not finite:
            if self._skipped >= self._course.max_skipped:
                raise NotFinite(step, row["loss"], row["grad_norm"], names, self._skipped)
            self._skipped += 1
            if self._enabled:
                say(
                    f"warning: {self._course.stage} {self._course.iteration}, step {step}: the loss is {row['loss']:g} "
                    f"and the gradient's norm {row['grad_norm']:g}; the step is skipped, which may happen to "
                    f"{self._course.max_skipped - self._skipped} more (training.skip_nonfinite). Its rows: "
                    f"{', '.join(names[:16])}"
                )

    def close(self) -> None:
        with suppress(NotFinite):  # training has stopped: what it stopped for is to be told
            self.flush()
        self._sinks.close()


def skipped_before(run_dir: RunDir, course: Course) -> int:
    """Count the steps that earlier calls of a training skipped and that are not taken again, by metrics.jsonl."""
    return sum(
        row.get("skipped") == 1.0 and row.get("step", 0) < course.first_step
        for row in run_dir.read_metrics()
        if (row.get("iteration"), row.get("stage")) == (course.iteration, course.stage)
    )


def _nobody(text: str) -> None:
    del text
