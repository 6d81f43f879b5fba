"""In and out: a Hugging Face checkpoint becomes policy 0, a policy becomes a Hugging Face checkpoint."""

from __future__ import annotations

import hashlib
import json
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
from dno_jax.run_dir import write_atomically
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
    params = relayout(runtime.load_policy(runtime.run_dir.policy(policy), TRAIN), replicated(runtime.mesh))
    if is_primary():
        local = local_copy(params)
        hf.save(path, runtime.model_config, local, source=config.model.path, overwrite=overwrite)
    barrier(f"export {policy}")


def export_pool(config: RunConfig, *, path: str) -> None:
    """Write the mixture that Algorithm 1 returns: policies 0 .. T-1, of which each prompt draws one.

    `mixture.json`, written last, marks the pool whole and says how `pool_member` draws.
    """
    size = config.iterations
    names = [f"policy-{policy:03d}" for policy in range(size)]
    for policy, name in enumerate(names):
        if not (epath.Path(path) / name).exists():
            export(config, policy=policy, path=str(epath.Path(path) / name))
    if is_primary():
        rule = "int(sha256('<seed>/<prompt_id>')[:8 bytes], big endian) mod the number of policies, for each prompt"
        text = json.dumps({"policies": names, "seed": config.seed, "draw": rule}, indent=2)
        write_atomically(epath.Path(path) / "mixture.json", text + "\n")
    barrier("export pool")


def pool_member(prompt_id: str, *, seed: int, size: int) -> int:
    """Draw the policy that answers a prompt, uniformly of `size`: unif(pi_1 .. pi_T), Algorithm 1, line 6."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()[:8], "big") % size


def local_copy(params: Any) -> Any:
    """Replicated global arrays as this process's own: what one process does alone must not be a collective."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), params)
