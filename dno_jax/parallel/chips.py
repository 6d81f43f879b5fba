"""What one device of each kind can do, at its best: one table for MFU, for plans and for what is reserved of a GPU.

As the makers give them (docs/training.md says where the peaks were read); a TPU's links are
those of one direction, all of them together. A tpu7x chip is two devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_GIB = 2**30

# Of a GPU's memory, for XLA's arrays; the rest is for the driver, cuDNN and NCCL. XLA's own default is .75.
GPU_FRACTION = 0.92


@dataclass(frozen=True)
class Chip:
    """One device, as jax counts them.

    Attributes:
        name: in `dno plan --topology`.
        kinds: what jax's name of the device begins with.
        flops: dense bfloat16 FLOP/s. MFU is taken against these whatever the dtype.
        memory: bytes that a program may take; of a GPU, the whole card.
        bandwidth: bytes/s of that memory.
        link: bytes/s that it sends to the devices of its slice or host.
        network: bytes/s that it sends to other slices or hosts.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    kinds: tuple[str, ...]
    flops: float
    memory: int
    bandwidth: float
    link: float
    network: float

    @property
    def usable(self) -> int:
        """Bytes that XLA's arrays may take."""
        return self.memory if self.platform == "tpu" else int(self.memory * GPU_FRACTION)


def _tpu(name: str, kinds: tuple[str, ...], flops: float, gib: float, bandwidth: float, link: float) -> Chip:
    return Chip(name, "tpu", kinds, flops, int(gib * _GIB), bandwidth, link, network=6.25e9)


def _gpu(name: str, kind: str, flops: float, gib: float, bandwidth: float, link: float, network: float = 50e9) -> Chip:
    return Chip(name, "gpu", (kind,), flops, int(gib * _GIB), bandwidth, link, network)


CHIPS = (
    _tpu("v4", ("TPU v4",), 275e12, 31.25, 1.2e12, 2.7e11),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75, 8.2e11, 1.8e11),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74, 2.77e12, 5.4e11),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25, 1.64e12, 3.6e11),
    _tpu("tpu7x", ("TPU7x", "TPU v7x"), 1153.5e12, 94.75, 3.69e12, 3.0e11),
    _gpu("a100", "NVIDIA A100", 312e12, 79.2, 2.04e12, 3.0e11, 25e9),
    _gpu("h100-pcie", "NVIDIA H100 PCIe", 756e12, 79.6, 2.0e12, 3.2e10),
    _gpu("h100-nvl", "NVIDIA H100 NVL", 835.5e12, 93.1, 3.9e12, 3.0e11),
    _gpu("h100", "NVIDIA H100", 989.4e12, 79.2, 3.35e12, 4.5e11),  # SXM
    _gpu("h200-nvl", "NVIDIA H200 NVL", 835.5e12, 139.8, 4.8e12, 4.5e11),
    _gpu("h200", "NVIDIA H200", 989.4e12, 139.8, 4.8e12, 4.5e11),
    _gpu("b200", "NVIDIA B200", 2250e12, 178.4, 8.0e12, 9.0e11),
    _gpu("l4", "NVIDIA L4", 121e12, 22.0, 3.0e11, 3.2e10, 3e9),
    _gpu("l40s", "NVIDIA L40S", 362.05e12, 44.4, 8.64e11, 3.2e10, 25e9),
    _gpu("a10", "NVIDIA A10", 125e12, 22.0, 6.0e11, 3.2e10, 3e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip by jax's name for its kind; None where it is not known, as of CPUs and of parts of a GPU."""
    if " MIG " in device_kind:
        return None
    found = [
        (len(kind), chip)
        for chip in CHIPS
        for kind in chip.kinds
        if device_kind == kind or device_kind.startswith((f"{kind} ", f"{kind}-"))
    ]
    return max(found, key=lambda each: each[0])[1] if found else None
