"""Devices as a (data, fsdp, expert, tensor) mesh, and the part of it that a process runs by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import numpy as np
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
