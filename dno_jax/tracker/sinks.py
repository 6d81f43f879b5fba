"""One protocol for all of them; one that fails is told and left out, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from dno_jax.config import ReportSection
from dno_jax.console import say
from dno_jax.run_dir import RunDir
from dno_jax.tracker.tensorboard import Board
from dno_jax.tracker.wandb import WandbCurve

T = TypeVar("T")


class Sink(Protocol):
    """Takes the figures of one curve, such as a training's. It may raise whatever it likes."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one step's figures."""

    def close(self) -> None:
        """Leave nothing unwritten."""


class Sinks:
    """Several sinks as one that never fails: metrics.jsonl has all that is lost."""

    def __init__(self, makers: Mapping[str, Callable[[], Sink]] | None = None):
        """Open sinks by name; without any, nothing is written."""
        self._sinks: dict[str, Sink] = {}
        for name, make in (makers or {}).items():
            if (sink := self._tried(name, make)) is not None:
                self._sinks[name] = sink

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, sink in list(self._sinks.items()):
            self._tried(name, lambda sink=sink: sink.write(step, values))

    def close(self) -> None:
        for name, sink in list(self._sinks.items()):
            self._tried(name, sink.close)
        self._sinks.clear()

    def _tried(self, name: str, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except Exception as error:
            self._sinks.pop(name, None)
            say(f"warning: {name} is left out from here on ({type(error).__name__}: {error}); metrics.jsonl has all")
            return None


def open_sinks(
    section: ReportSection, run_dir: RunDir, *, curve: str, first_step: int = 0, enabled: bool = True
) -> Sinks:
    """Open what a configuration asks for.

    Args:
        curve: what the figures are of, such as train_000.
        first_step: that will be written; later ones of earlier calls are taken again.
        enabled: whether this process is the one that writes.
    """
    makers: dict[str, Callable[[], Sink]] = {}
    if enabled and section.tensorboard:
        makers["TensorBoard"] = lambda: Board(run_dir.tensorboard_path / curve, first_step=first_step)
    if enabled and section.wandb is not None:
        project = section.wandb
        makers["Weights & Biases"] = lambda: WandbCurve(project, run_dir, curve=curve)
    return Sinks(makers)
