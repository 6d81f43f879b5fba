"""How much memory the devices of this process have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax

from dno_jax.errors import DnoError
from dno_jax.sampling.memory import Capacity

_MEMINFO = Path("/proc/meminfo")


def device_capacity(devices: Sequence[jax.Device]) -> Capacity:
    """Return the memory of the smallest of this process's devices.

    An accelerator's is what its allocator may take. Processors share their host's memory, what is free of it now.

    Args:
        devices: addressable ones, such as `mesh.local_devices`.

    Raises:
        DnoError: an accelerator does not say how much memory it has.
    """
    platform = devices[0].platform
    if platform == "cpu":
        free, source = _host_memory()
        shared = f", shared by {len(devices)} devices" if len(devices) > 1 else ""
        return Capacity(free // len(devices), source + shared)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        raise DnoError(
            f"the {platform} {devices[0].device_kind} does not say how much memory it has (it may run with another "
            "allocator than XLA's own); unset XLA_PYTHON_CLIENT_ALLOCATOR"
        )
    return Capacity(min(known), f"what the {platform}'s allocator may take")


def known_capacity(devices: Sequence[jax.Device]) -> Capacity | None:
    """Return `device_capacity`, or None where an accelerator does not say: training asks for no number of it."""
    try:
        return device_capacity(devices)
    except DnoError:
        return None


def _host_memory() -> tuple[int, str]:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            name, _, amount = line.partition(":")
            if name == "MemAvailable":
                return int(amount.split()[0]) * 1024, "the host's free memory"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the host's memory"
