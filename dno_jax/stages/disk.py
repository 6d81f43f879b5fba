"""Whether the disk holds what a run will write, said before the start: a full disk after days is a bad surprise."""

from __future__ import annotations

import secrets
import shutil

import jax
import numpy as np
from etils import epath

from dno_jax.config import RunConfig
from dno_jax.errors import DnoError
from dno_jax.parallel.cluster import barrier, broadcast_from_primary, is_primary
from dno_jax.run_dir import RunDir
from dno_jax.runtime.arguments import trained_state
from dno_jax.runtime.runtime import Runtime
from dno_jax.sampling.memory import show_bytes
from dno_jax.training.checkpoint import policy_fingerprint


def check(runtime: Runtime[RunConfig]) -> None:
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
            f"run_dir {runtime.run_dir.path}: {show_bytes(free)} are free on its disk, and the run will write "
            f"{show_bytes(sum(wanted.values()))} of checkpoints ({parts}); free that much, give another run_dir, or "
            "set training.keep_policies=1, training.keep_states=1, or an adapter, whose policies are small"
        )


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


def missing(runtime: Runtime[RunConfig]) -> dict[str, int]:
    """Bytes of checkpoints that are yet to be written, at most at a time."""
    config, run_dir, programs = runtime.config, runtime.run_dir, runtime.programs
    if run_dir.exported_path.exists():
        return {}
    keep = config.training.keep_policies
    kept = config.iterations if keep == "all" else min(config.iterations, keep + 2)  # the best, and the next
    there = [index for index in range(config.iterations + 1) if policy_fingerprint(run_dir.policy(index))]
    state, _ = trained_state(programs)
    of_state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    left = kept - len([index for index in there if index])
    return {
        "policy 0": 0 if 0 in there else 4 * programs.num_parameters,
        "later policies": max(left, 0) * 4 * (programs.adapter_params or programs.num_parameters),
        "training states": max(config.training.keep_states + 1 - _states(config, run_dir), 0) * of_state
        if left > 0
        else 0,
        "export": 2 * programs.num_parameters,
    }


def _states(config: RunConfig, run_dir: RunDir) -> int:
    """Training states that lie there already."""
    folders: list[epath.Path] = [run_dir.stage("train", t).path / "states" for t in range(config.iterations)]
    return sum(path.name.isdecimal() for folder in folders if folder.exists() for path in folder.iterdir())
