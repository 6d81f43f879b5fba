"""In and out: a Hugging Face checkpoint becomes policy 0, a policy becomes a Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath

from dno_jax.config import RunConfig
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.parallel.mesh import barrier, is_primary
from dno_jax.parallel.sharding import TRAIN, relayout, replicated
from dno_jax.report.console import say
from dno_jax.stages.runtime import Runtime
from dno_jax.training.checkpoint import policy_fingerprint, save_policy


def import_initial(config: RunConfig) -> str:
    """Make policy 0 of the run directory from `model.path`, once; return its fingerprint."""
    runtime = Runtime.start(config)
    path = runtime.run_dir.policy(0)
    found = policy_fingerprint(path)
    if found is not None:
        return found
    _, params = hf.load(config.model.path, shardings=runtime.param_shardings(TRAIN))
    digest = save_policy(path, params)
    if is_primary():
        say(f"imported {config.model.path} as policy 0 ({digest[:12]})")
    return digest


def export(config: RunConfig, *, policy: int, path: str, overwrite: bool = False) -> None:
    """Write a policy as a Hugging Face checkpoint that reloads to the same logits.

    Raises:
        DnoError: the policy does not exist, the target does, or what was written does not reload to the same model.
    """
    if epath.Path(path).exists() and not overwrite:
        raise DnoError(f"{path} exists; give another path, or --overwrite")
    runtime = Runtime.start(config)
    params = relayout(runtime.load_policy(policy, TRAIN), replicated(runtime.mesh))
    if is_primary():
        local = local_copy(params)
        hf.save(path, runtime.model_config, local, source=config.model.path, overwrite=overwrite)
    barrier(f"export {policy}")


def local_copy(params: Any) -> Any:
    """Replicated global arrays as this process's own: what one process does alone must not be a collective."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), params)
