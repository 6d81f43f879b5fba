"""Devices as a (data, fsdp, expert, tensor) mesh, and the part of it that a process runs by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError

AXES = ("data", "fsdp", "expert", "tensor")


def make_mesh(section: MeshSection, devices: list[jax.Device] | None = None) -> Mesh:
    """Lay all devices out as the configured mesh (Auto axes: the compiler partitions, we constrain).

    Slices of devices that only a data centre's network joins follow each other along the data axis; every other axis,
    and with it every gather of weights, stays within one.

    Raises:
        DnoError: the axes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = slices_of(devices, section.dcn_data)
    data, *others = _axis_sizes(section, len(devices), kind=devices[0].platform, slices=len(slices))
    own = (data // len(slices), *others)
    kinds = (AxisType.Auto,) * len(AXES)
    parts = [jax.make_mesh(own, AXES, axis_types=kinds, devices=part).devices for part in slices]
    return Mesh(np.concatenate(parts), AXES, axis_types=kinds)


def slices_of(devices: Sequence[Any], count: int) -> list[list[Any]]:
    """Return the devices by the slices that they are in.

    Args:
        count: of slices; -1: those that TPUs say they are in, and one of all others.

    Raises:
        DnoError: there are another number of them, or devices cannot be parted so.
    """
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    told = devices[0].platform == "tpu"
    if count == -1:
        count = len(found) if told else 1
    if len(found) == count:
        parts = [found[index] for index in sorted(found)]
    elif told or len(devices) % count:
        raise DnoError(
            f"mesh.dcn_data is {count}, and the {len(devices)} {devices[0].platform} devices of this run are in "
            f"{len(found)} slices; set mesh.dcn_data to their number, or to -1"
        )
    else:  # in jax's order, that of the processes
        size = len(devices) // count
        parts = [list(devices[first : first + size]) for first in range(0, len(devices), size)]
    if len({len(part) for part in parts}) > 1:
        sizes = ", ".join(str(len(part)) for part in parts)
        raise DnoError(f"the slices of this run have {sizes} devices; a mesh needs slices of one size")
    return parts


def abstract_mesh(section: MeshSection, num_devices: int) -> AbstractMesh:
    """Lay out devices of which none need be here; it says where things would lie, and holds no array.

    Raises:
        DnoError: the axes do not multiply to the number of devices, or do not fit the slices.
    """
    sizes = _axis_sizes(section, num_devices, kind="planned", slices=max(section.dcn_data, 1))
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _axis_sizes(section: MeshSection, num_devices: int, *, kind: str, slices: int) -> tuple[int, ...]:
    sizes = [getattr(section, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % fixed == 0:
        sizes[sizes.index(-1)] = num_devices // fixed
    shape = ", ".join(f"{axis}={getattr(section, axis)}" for axis in AXES)
    if math.prod(sizes) != num_devices:
        raise DnoError(
            f"mesh ({shape}) does not divide the {num_devices} {kind} devices of this run; "
            "make the product of the axes equal to the number of devices, or set one axis to -1"
        )
    if sizes[0] % slices:
        raise DnoError(
            f"mesh ({shape}) has {sizes[0]} devices along data, which {slices} slices do not divide: another axis would"
            f" cross the network between slices; set mesh.data to a multiple of {slices}, or to -1 and fix the others"
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
