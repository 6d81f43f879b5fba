"""Devices as a (data, fsdp, expert, tensor) mesh, and processes as one program."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError

AXES = ("data", "fsdp", "expert", "tensor")


def make_mesh(section: MeshSection, devices: list[jax.Device] | None = None) -> Mesh:
    """Lay all devices out as the configured mesh (Auto axes: the compiler partitions, we constrain).

    Raises:
        DnoError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _axis_sizes(section, len(devices), kind=devices[0].platform)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(section: MeshSection, num_devices: int) -> AbstractMesh:
    """Lay out devices of which none need be here; it says where things would lie, and holds no array.

    Raises:
        DnoError: the axes do not multiply to the number of devices.
    """
    sizes = _axis_sizes(section, num_devices, kind="planned")
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _axis_sizes(section: MeshSection, num_devices: int, *, kind: str) -> tuple[int, ...]:
    sizes = [getattr(section, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % fixed == 0:
        sizes[sizes.index(-1)] = num_devices // fixed
    if math.prod(sizes) != num_devices:
        shape = ", ".join(f"{axis}={getattr(section, axis)}" for axis in AXES)
        raise DnoError(
            f"mesh ({shape}) does not divide the {num_devices} {kind} devices of this run; "
            "make the product of the axes equal to the number of devices, or set one axis to -1"
        )
    return tuple(sizes)


@dataclass(frozen=True)
class Submesh:
    """The rows of a mesh that this process can run by itself, together with those it shares a model with.

    Attributes:
        mesh: whole (expert, tensor) groups of devices, their rows on its data axis.
        index, count: which of how many parts.
        leads: whether this process writes what the part finds.
    """

    mesh: Mesh
    index: int
    count: int
    leads: bool


def own_submesh(mesh: Mesh) -> Submesh:
    """Return the part of a mesh that this process runs; what the parts run needs nothing of each other."""
    models = mesh.devices.reshape(-1, *mesh.devices.shape[2:])
    parts = submeshes_of(np.vectorize(lambda device: device.process_index)(models))
    index = next(i for i, (processes, _) in enumerate(parts) if jax.process_index() in processes)
    processes, members = parts[index]
    own = Mesh(models[list(members)][:, None], AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Submesh(own, index=index, count=len(parts), leads=jax.process_index() == processes[0])


def submeshes_of(process: np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return which models run apart from all others: (processes, models) of each part, both ascending.

    Args:
        process: [models, expert, tensor], the index of the process that has each device.
    """
    parts: list[tuple[set[int], set[int]]] = []
    for model, devices in enumerate(process):
        processes, members = set(devices.ravel().tolist()), {model}
        for other in [part for part in parts if part[0] & processes]:
            parts.remove(other)
            processes, members = processes | other[0], members | other[1]
        parts.append((processes, members))
    found = [(tuple(sorted(processes)), tuple(sorted(members))) for processes, members in parts]
    return sorted(found, key=lambda part: part[1])


def one_device_mesh() -> Mesh:
    """Lay out the default device alone."""
    return make_mesh(MeshSection(), jax.local_devices()[:1])


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
