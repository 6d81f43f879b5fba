"""Devices to plan for: this machine's, others by their number and memory, or those of a topology to compile for."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.parallel.chips import CHIPS, Chip, chip_of
from dno_jax.parallel.mesh import abstract_mesh, make_mesh
from dno_jax.parallel.sharding import AnyMesh
from dno_jax.runtime.capacity import device_capacity
from dno_jax.sampling.memory import Capacity

_NAME = re.compile(r"(?P<chip>[a-z0-9-]+):(?P<shape>[1-9]\d*(x[1-9]\d*){0,2})(\*(?P<slices>[1-9]\d*))?")
_COMPILED = {"tpu": ("v5e", "v5p", "v6e", "tpu7x"), "gpu": ("h100", "h200")}
_TPU_ENVIRONMENT = {  # libtpu asks a machine's metadata otherwise, and waits for an answer
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
_CARDS = {"h100": b"NVIDIA H100 80GB HBM3", "h200": b"NVIDIA H200 141GB HBM3e"}
_GPUS_OF_HOST = 8
_FLAT = ("v5e", "v6e")  # TPUs whose slices have two sizes; others have three


@dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        name: as a person wrote it, or what it is.
        count: of devices.
        devices: to compile for; None: nothing is compiled, and all is arithmetic.
        chip: what a device can do; None where that is not known.
        capacity: memory of a device.
        note: why nothing is compiled, where something else was asked for.
    """

    name: str
    count: int
    devices: Sequence[Any] | None
    chip: Chip | None
    capacity: Capacity
    note: str = ""

    @property
    def platform(self) -> str | None:
        """The devices' platform; None where nobody says."""
        return self.devices[0].platform if self.devices else (self.chip.platform if self.chip else None)

    def mesh(self, section: MeshSection) -> AnyMesh:
        """Lay the devices out.

        Raises:
            DnoError: the mesh does not fit them.
        """
        if self.devices is None:
            return abstract_mesh(section, self.count)
        return make_mesh(section, list(self.devices))


def known_topologies() -> str:
    """Say what `--topology` takes."""
    names = ", ".join(chip.name for chip in CHIPS)
    return (
        "v5e:16x16, v5p:4x4x4, v6e:8x8 or tpu7x:2x2x4 (a TPU and its shape; *2 after it for two slices), h100:8 or "
        f"h200:2x8 (GPUs, or hosts x GPUs), cpu:8; estimated without a compiler: any of {names}"
    )


def refuse_share(mfu: float | None, target: Target) -> None:
    """
    Raises:
        DnoError: a share of a chip's peak is given, and the chip is not known.
    """
    if mfu is not None and target.chip is None:
        raise DnoError(
            f"--mfu {mfu:g} is a share of a chip's peak, and nobody says which chip {target.name} is: add --topology, "
            f"such as --topology h100:8; known: {known_topologies()}"
        )


def target_of(topology: str | None, *, num_devices: int | None, memory: int | None, compiled: bool = True) -> Target:
    """Return what to plan for.

    Args:
        topology: a name; None takes this machine's devices, or `num_devices` of `memory` bytes.
        memory: bytes of one device, in place of what it has.
        compiled: whether programs are to be compiled for it.

    Raises:
        DnoError: an unknown name, a shape that the chip has not, or no compiler for it.
    """
    if num_devices is not None and num_devices < 1:
        raise DnoError(f"--devices is {num_devices}; expected at least 1")
    given = None if memory is None else Capacity(memory, "--memory")
    if topology is None:
        if num_devices is None:
            here = jax.devices()
            own = device_capacity(jax.local_devices()) if given is None else given
            return Target("this machine", len(here), here, chip_of(here[0].device_kind), own)
        if given is None:
            raise DnoError(
                f"--devices {num_devices} are not asked for their memory: add --memory, such as --memory 16GiB"
            )
        return Target(f"{num_devices} devices", num_devices, None, None, given)
    if num_devices is not None:
        raise DnoError(f"--devices {num_devices} with --topology {topology}: the topology says how many; leave one out")
    found = _NAME.fullmatch(topology)
    name = found["chip"] if found else ""
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    if found is None or (chip is None and name != "cpu"):
        raise DnoError(f"--topology is {topology!r}; known: {known_topologies()}")
    sizes = [int(size) for size in found["shape"].split("x")]
    slices = int(found["slices"] or 1)
    _check_shape(topology, name, platform="cpu" if chip is None else chip.platform, sizes=sizes, slices=slices)
    if chip is None:
        return _cpus(topology, sizes[0], given)
    own = given or Capacity(chip.usable, f"what a program may take of a {chip.name}")
    count = slices
    for size in sizes:
        count *= size
    if chip.name == "tpu7x":
        count *= 2
    if not compiled or chip.name not in _COMPILED[chip.platform]:
        return Target(topology, count, None, chip, own, "" if not compiled else f"no compiler for {chip.name} here")
    if chip.platform == "tpu":
        return Target(topology, count, _tpus(topology, chip.name, found["shape"], slices), chip, own)
    devices, note = _gpus(chip.name, sizes)
    return Target(topology, count, devices, chip, own, note)


def _check_shape(topology: str, name: str, *, platform: str, sizes: list[int], slices: int) -> None:
    """See that a shape is one of its kind: what is left over would be planned for nobody.

    Raises:
        DnoError: it is not.
    """
    numbers = {"cpu": (1,), "gpu": (1, 2), "tpu": (2,) if name in _FLAT else (3,)}[platform]
    uneven = platform == "gpu" and len(sizes) == 1 and sizes[0] > _GPUS_OF_HOST and sizes[0] % _GPUS_OF_HOST > 0
    if len(sizes) not in numbers or (platform != "tpu" and slices > 1) or uneven:
        wanted = {
            "cpu": "a number, as in cpu:8",
            "gpu": f"GPUs of one host, as in {name}:8 (more of them in eights), or hosts x GPUs, as in {name}:2x8",
            "tpu": f"{numbers[0]} sizes, as in {name}:{'x'.join('4' * numbers[0])}, and *2 after them for two slices",
        }[platform]
        raise DnoError(f"--topology is {topology!r}; expected {wanted}")


def _leave_accelerators_alone() -> None:
    """Have this process compile for others without taking the accelerators that are here, if it has not yet."""
    with suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")


def _cpus(name: str, count: int, capacity: Capacity | None) -> Target:
    """Virtual devices of this processor; their number is set before jax has looked."""
    _leave_accelerators_alone()
    with suppress(RuntimeError):  # it has
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")[:count]
    if len(devices) < count:
        raise DnoError(f"--topology {name}: this process has {len(devices)} CPU devices already")
    return Target(name, count, devices, None, capacity or device_capacity(devices))


def _tpus(topology: str, chip: str, shape: str, slices: int) -> Sequence[Any]:
    if find_spec("libtpu") is None:
        raise DnoError(
            f"--topology {topology}: libtpu, the TPU's compiler, is not installed; pip install 'dno_jax[plan]' (no "
            "TPU is needed), or add --no-compile for an estimate"
        )
    _leave_accelerators_alone()
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{shape}", **options).devices
    except Exception as error:  # jax raises what libtpu says, in several types
        said = str(error).strip().split("\n")[0][:200]
        raise DnoError(
            f"--topology {topology}: libtpu knows no such shape ({said}); known: {known_topologies()}"
        ) from None


def _gpus(chip: str, sizes: list[int]) -> tuple[Sequence[Any] | None, str]:
    """Return GPUs to compile for; None, and why, where their compiler is not installed."""
    hosts, own = sizes if len(sizes) == 2 else (max(1, sizes[0] // _GPUS_OF_HOST), min(sizes[0], _GPUS_OF_HOST))
    try:
        import jax_plugins.xla_cuda13 as plugin  # pyright: ignore[reportMissingImports]

        card = _card(Path(plugin.__file__ or "").parent / "xla_cuda_plugin.so", _CARDS[chip])
    except (ImportError, OSError):
        card = None
    if card is None:
        return None, "estimated: CUDA's compiler is not here; pip install 'dno_jax[plan-gpu]' with Python 3.12 or newer"
    _leave_accelerators_alone()
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=card, topology=f"1x{hosts}x{own}"
    ).devices, ""


def _card(library: Path, name: bytes) -> str | None:
    """Return XLA's description of a card, which lies as text in the plugin; None where it does not."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = data.find(b'device_description_str: "' + name + b'"')
        if found < 0:
            return None
        start, end = data.rfind(b"\0", 0, found) + 1, data.find(b"\0", found)
        return data[start:end].decode()
