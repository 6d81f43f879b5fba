"""How processes meet, and what they do together: one program on every process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from dno_jax.errors import DnoError


def initialize(
    *, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of one run; call before anything touches a device.

    With explicit values any machines work; without them SLURM, Cloud TPU and Kubernetes are detected by jax where their
    environment says that there is more than one process. A lone process joins nothing.

    Raises:
        DnoError: only some of the three values are given, or they contradict each other.
    """
    if coordinator is None and num_processes is None and process_id is None:
        if _inside_cluster():
            jax.distributed.initialize()
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise DnoError("--coordinator, --num-processes and --process-id go together: give all three, or none")
    if not 0 <= process_id < num_processes:
        raise DnoError(f"--process-id is {process_id}; expected 0 to {num_processes - 1}")
    if num_processes > 1:
        jax.distributed.initialize(coordinator, num_processes, process_id)


def _inside_cluster() -> bool:
    """Whether a launcher started several processes, by the variables it leaves in the environment."""
    tasks = os.environ.get("SLURM_NTASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return tasks != "1" or len(workers) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def is_primary() -> bool:
    """Whether this process runs the host-side stages and writes the manifests."""
    return jax.process_index() == 0


def broadcast_from_primary(values: np.ndarray) -> np.ndarray:
    """Return process 0's copy of an array on every process."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def gather_from_processes(values: np.ndarray) -> np.ndarray:
    """Return every process's copy of an array, [processes, ...], on every process."""
    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values))


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def wait_until(ready: Callable[[], bool], *, seconds: float = 0.5) -> None:
    """Poll for something that another process writes; no collective that could time out is held meanwhile."""
    while not ready():
        time.sleep(seconds)
