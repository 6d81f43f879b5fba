"""Weights & Biases: one run for a run directory, its curves beside each other."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.run_dir import RunDir

_runs: dict[tuple[str, str], Any] = {}  # by project and place: wandb ends them when the process does


class WandbCurve:
    """The figures of one curve, against steps of their own."""

    def __init__(self, project: str, run_dir: RunDir, *, curve: str):
        """Join the directory's run, or begin it.

        Raises:
            DnoError: the package is not installed, or nobody is logged in (it would ask, and the run would wait).
        """
        self._curve = curve
        place = os.fspath(run_dir.path)
        if (project, place) not in _runs:
            _runs[project, place] = _begin(project, run_dir, place)
        self._run = _runs[project, place]
        self._run.define_metric(f"{curve}/*", step_metric=f"{curve}/step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        named = {f"{self._curve}/{name.rpartition('/')[2]}": value for name, value in values.items()}
        self._run.log({f"{self._curve}/step": step} | named)

    def close(self) -> None:
        """Nothing: the run goes on with the next curve."""


def _begin(project: str, run_dir: RunDir, place: str) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise DnoError('report.wandb needs the package wandb: pip install "dno_jax[wandb]"') from None
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if not (offline or os.environ.get("WANDB_API_KEY") or _has_login()):
        raise DnoError("report.wandb: nobody is logged in; `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
    return wandb.init(
        project=project,
        name=run_dir.path.name,
        id=hashlib.sha256(place.encode()).hexdigest()[:16],
        resume="allow",
        dir=None if "://" in place else place,
        settings=wandb.Settings(console="off", silent=True),
    )


def _has_login() -> bool:
    """Whether `wandb login` has left its key where wandb looks for it."""
    files = (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc")
    return any("wandb" in Path(file).read_text(errors="replace") for file in files if file and Path(file).is_file())
