"""Whether the disk holds what a run or a training will write, said before the start: a full disk is a late surprise."""

from __future__ import annotations

import secrets
import shutil
from typing import Any

import jax
import numpy as np
from etils import epath

from dno_jax.config import AnyConfig, RunConfig
from dno_jax.errors import DnoError
from dno_jax.parallel.cluster import barrier, broadcast_from_primary, is_primary
from dno_jax.run_dir import RunDir
from dno_jax.runtime.arguments import trained_state
from dno_jax.runtime.programs import ConfigT, Programs
from dno_jax.runtime.runtime import Runtime
from dno_jax.sampling.memory import show_bytes
from dno_jax.training.checkpoint import is_pruned, policy_fingerprint


def check(runtime: Runtime[ConfigT]) -> None:
    """See that checkpoints have room on the disk of the run directory. Texts and verdicts are small beside them.

    Raises:
        DnoError: naming what is free, what will be written, and what makes it less.
    """
    wanted = {name: size for name, size in missing(runtime).items() if size}
    folder = runtime.run_dir.path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if sum(wanted.values()) > free:
        parts = ", ".join(f"{name} {show_bytes(size)}" for name, size in wanted.items())
        raise DnoError(
            f"run_dir {runtime.run_dir.path}: {show_bytes(free)} are free on its disk, and "
            f"{show_bytes(sum(wanted.values()))} of checkpoints will be written ({parts}); free that much, give "
            f"another run_dir{_less(runtime.config)}"
        )


def _less(config: AnyConfig) -> str:
    """Say what is not set yet and makes checkpoints less."""
    section = config.training
    ways = []
    if isinstance(config, RunConfig) and section.keep_policies != 1 and config.outer.scheme != "average":
        ways.append("training.keep_policies=1")
    if section.keep_states > 1:
        ways.append("training.keep_states=1")
    said = f"set {', '.join(ways)}" if ways else ""
    if "adapter" in type(config).model_fields and getattr(config, "adapter", None) is None:
        said = f"{said}, or " if said else ""
        said += "train an adapter (adapter.rank=64), whose checkpoints are small"
    return f", or {said}" if said else ""


def refuse_apart(run_dir: RunDir) -> None:
    """See that all processes see the folder in which a bucket's directory is worked on.

    Raises:
        DnoError: this one does not.
    """
    if run_dir.bucket is None or jax.process_count() == 1:
        return
    token = int(broadcast_from_primary(np.asarray(secrets.randbits(30))))
    note = run_dir.path / f".processes-{token}"  # a name that nobody's cache of names says is missing
    if is_primary():
        note.write_text("seen by all processes of the run\n")
    barrier("bucket's folder")
    if not note.exists():
        raise DnoError(
            f"run_dir {run_dir.bucket.url}: process {jax.process_index()} does not see the folder in which process 0 "
            f"works on it ({run_dir.path}): set DNO_SCRATCH to a folder of a file system that all processes share, run "
            "one process, or give such a folder as run_dir"
        )
    barrier("bucket's folder is seen")
    if is_primary():
        note.unlink()


def checkpoint_bytes(programs: Programs[ConfigT]) -> dict[str, int]:
    """Bytes of the checkpoints that lie beside each other at most; the export's as in bfloat16."""
    config = programs.config
    state, _ = trained_state(programs)
    states = {"training states": (config.training.keep_states + 1) * _bytes(state)}
    exports = 2 * programs.num_parameters
    if not isinstance(config, RunConfig):
        adapters = 4 * (programs.adapter_params or 0)
        return states | {"export": exports + adapters}
    if config.outer.scheme == "average":  # which every policy is part of
        exports *= config.iterations + 1
    return {
        "policy 0": 4 * programs.num_parameters,
        "later policies": _later(config) * _policy_bytes(programs),
        **states,
        "export": exports,
    }


def missing(runtime: Runtime[ConfigT]) -> dict[str, int]:
    """Bytes of checkpoints that are yet to be written, at most at a time."""
    config, run_dir, programs = runtime.config, runtime.run_dir, runtime.programs
    found, keep = checkpoint_bytes(programs), config.training.keep_states
    if not isinstance(config, RunConfig):
        lying = min(_states(run_dir.path / "states"), keep + 1)
        done = run_dir.export_path.exists()
        return {} if done else found | {"training states": found["training states"] * (keep + 1 - lying) // (keep + 1)}
    if run_dir.exported_path.exists():
        return {}
    there = [index for index in range(config.iterations + 1) if _lies(run_dir.policy(index))]
    left = max(_later(config) - sum(index > 0 for index in there), 0)
    lying = sum(_states(run_dir.stage("train", t).path / "states") for t in range(config.iterations))
    states = found["training states"] * max(keep + 1 - lying, 0) // (keep + 1)
    return found | {
        "policy 0": 0 if 0 in there else found["policy 0"],
        "later policies": left * _policy_bytes(programs),
        "training states": states if left else 0,
    }


def _later(config: RunConfig) -> int:
    """Policies that lie beside policy 0 at most."""
    keep = config.training.keep_policies
    every = keep == "all" or config.outer.scheme == "average"
    return config.iterations if every else min(config.iterations, int(keep) + 2)  # the best, and the next


def _policy_bytes(programs: Programs[Any]) -> int:
    """A policy that was trained, and the moments that the next training goes on with."""
    state, _ = trained_state(programs)
    carried = _bytes(state.opt_state) if programs.config.optimizer.carry else 0
    return 4 * (programs.adapter_params or programs.num_parameters) + carried


def _lies(policy: epath.Path) -> bool:
    return policy_fingerprint(policy) is not None and not is_pruned(policy)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _states(folder: epath.Path) -> int:
    """Training states that lie there already."""
    return sum(path.name.isdecimal() for path in folder.iterdir()) if folder.exists() else 0
