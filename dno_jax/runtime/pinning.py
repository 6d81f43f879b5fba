"""An id on the Hub means one commit for the whole of a run, on every process and after every restart."""

from __future__ import annotations

import json

import numpy as np
import yaml

from dno_jax.config.base import hub_id
from dno_jax.errors import DnoError
from dno_jax.model.hf.hub import commit_of
from dno_jax.parallel.cluster import broadcast_from_primary, is_primary
from dno_jax.run_dir import RunDir
from dno_jax.runtime.programs import ConfigT

_LENGTH = 40  # of a commit's name


def pinned(config: ConfigT) -> ConfigT:
    """Return the configuration with the commit of model.path, where that is an id on the Hub.

    It is the commit that the run directory was made from, unless another revision is asked for now; else what the id
    means today. Process 0 decides for all.

    Raises:
        DnoError: the Hub does not give it, or cannot be reached and the cache has not all of it.
    """
    path = config.model.path
    if (found := hub_id(path)) is None:
        return config
    repo, revision = found
    code, error = np.zeros(_LENGTH, np.uint8), None
    if is_primary():
        try:
            commit = (_noted(RunDir(config.run_dir), repo) if revision is None else None) or commit_of(path)
            code = np.frombuffer(commit.encode(), np.uint8)
        except DnoError as caught:
            error = DnoError(f"model.path: {caught}")
    code = broadcast_from_primary(code)
    if error is not None:
        raise error
    if not code.any():
        raise DnoError(f"model.path {path}: process 0 could not find it; its message says why")
    model = config.model.model_copy(update={"path": f"{repo}@{code.tobytes().decode()}"})
    return config.model_copy(update={"model": model})


def _noted(run_dir: RunDir, repo: str) -> str | None:
    """Return the commit of this repository that a run directory was made from."""
    if run_dir.source_path.exists():
        path = json.loads(run_dir.source_path.read_text())["path"]
    elif run_dir.config_path.exists():
        path = yaml.safe_load(run_dir.config_path.read_text())["model"]["path"]
    else:
        return None
    found = hub_id(path)
    return None if found is None or found[0] != repo else found[1]
