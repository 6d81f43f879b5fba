"""A trace of some steps by jax.profiler, where the configuration asks for one."""

from __future__ import annotations

import os

import jax
from etils import epath

from dno_jax.config.training import ProfileSection
from dno_jax.console import say


class Trace:
    """Begins before the first step that is to be traced, and ends before the first one that is not."""

    def __init__(self, section: ProfileSection | None, folder: epath.Path):
        self._steps = range(0) if section is None else range(section.first, section.first + section.steps)
        self._folder = folder
        self._runs = False

    def step(self, step: int) -> None:
        """Say that a step comes next."""
        if self._runs and step not in self._steps:
            self.close()
        elif not self._runs and step in self._steps:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._runs = True

    def close(self) -> None:
        """End what runs: steps that devices have been given end in it."""
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()
            say(f"steps {self._steps.start} to {self._steps.stop - 1} are traced in {self._folder}")
