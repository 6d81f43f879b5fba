"""How processes meet, and what they do together: one program on every process."""

from __future__ import annotations

import atexit
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed, hardware_utils
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dno_jax import stopping
from dno_jax.errors import DnoError
from dno_jax.parallel.heartbeat import STOP, Heartbeat, Others, unless
from dno_jax.parallel.launchers import Meeting, meeting_of
from dno_jax.parallel.metadata import metadata_of
from dno_jax.parallel.relay import Relay

_HOSTS = "dno_jax/hosts/"
_STOPS = "dno_jax/stops"  # of the steps at which trainings stop
_AHEAD = 3  # steps
_MEET_SECONDS = 300
_JAX_LATER_SECONDS = 20  # its own heartbeat aborts
# What errors say that a peer's death may explain; of gloo's jax makes a ValueError.
_CONNECTION = re.compile(r"(?i)gloo|nccl|unavailable|deadline_exceeded|connection (reset|closed|refused)|coordination")


@dataclass(frozen=True)
class _Joined:
    """The run that this process has joined."""

    others: Others
    heartbeat: Heartbeat


_joined: _Joined | None = None


def initialize(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: float = stopping.HEARTBEAT_SECONDS,
) -> None:
    """Join the processes of one run; call before anything touches a device.

    With explicit values any machines work; what they leave out is found in the environment (launchers.py). A lone
    process joins nothing.

    Args:
        heartbeat_seconds: without a sign of life, after which a process is taken for dead, and the others end.

    Raises:
        DnoError: the environment does not say enough, the processes do not meet, or jax sees fewer devices or processes
            than it names.
    """
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    meeting = meeting_of(
        os.environ,
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        metadata=metadata_of(os.environ, tpu_chips=chips),
    )
    if meeting is None:
        return
    if meeting.num_processes != 1:
        _join(meeting, heartbeat_seconds)
    _check_devices(meeting)


def _join(meeting: Meeting, heartbeat_seconds: float) -> None:
    global _joined
    assert meeting.coordinator is not None
    assert meeting.num_processes is not None
    assert meeting.process_id is not None
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
    if meeting.process_id == 0:
        _check_port(meeting.coordinator)
    # jax would abort; and whoever comes late, as after a preemption, may be met by the next start.
    alone = (
        f"process {meeting.process_id} of {meeting.num_processes} (by {meeting.told_by}) has not met the others at "
        f"{meeting.coordinator} within {_MEET_SECONDS} s; see that all were started, that this address is process 0's "
        "(pods have one by a headless service), and that its port is open between hosts"
    )
    limit = threading.Timer(_MEET_SECONDS, stopping.end_now, (alone, stopping.STOPPED))
    limit.daemon = True
    limit.start()
    address, gone = meeting.coordinator, threading.Event()
    if meeting.process_id:
        _wait_for_name(meeting.coordinator)
        relay = Relay(meeting.coordinator)
        address, gone = relay.address, relay.gone
    jax.distributed.initialize(
        address,
        meeting.num_processes,
        meeting.process_id,
        local_device_ids=meeting.local_device_ids,
        cluster_detection_method="deactivate",  # it would give this process one GPU of several
        initialization_timeout=_MEET_SECONDS + _JAX_LATER_SECONDS,
        # jax gives a sign every half of it, so that it may miss one as early as after the other half.
        heartbeat_timeout_seconds=2 * math.ceil(heartbeat_seconds) + _JAX_LATER_SECONDS,
    )
    client = _client()
    client.key_value_set(f"{_HOSTS}{meeting.process_id}", socket.gethostname())
    client.wait_at_barrier("dno_jax/met", (_MEET_SECONDS + _JAX_LATER_SECONDS) * 1000)
    limit.cancel()
    hosts = {int(key.rsplit("/", 1)[1]): host for key, host in client.key_value_dir_get(_HOSTS)}
    others = Others(
        client,
        gone,
        meeting.process_id,
        [hosts[index] for index in range(meeting.num_processes)],
        heartbeat_seconds,
    )
    _joined = _Joined(others, Heartbeat(others))
    atexit.register(_joined.heartbeat.rest)  # before jax's own, as it comes later
    stopping.when_asked(partial(_leave_word, STOP, "asked"))
    _meet_on_devices()


def _meet_on_devices() -> None:
    """Add up a number of every device.

    Gloo gives the processes of a group of devices 30 seconds to meet for the first time: here all have just come, later
    one may be reading.
    """
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    ones = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.ones(mesh.size, np.int32)[index])
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)
    assert int(total) == mesh.size


def _check_port(coordinator: str) -> None:
    """See that process 0 can listen: jax would end it without a word of ours."""
    port = int(coordinator.rsplit(":", 1)[1])
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:  # which says where it listens instead
        return
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6):
            pass
    except OSError as error:
        raise DnoError(
            f"port {port}, at which the processes should meet, cannot be listened at ({error.strerror or error}); set "
            "JAX_COORDINATOR_PORT to a free one on all hosts, or end what has it"
        ) from None


def _wait_for_name(coordinator: str) -> None:
    """Wait until the coordinator's name is known: a pod's is when it has started."""
    while True:
        with suppress(OSError):
            socket.getaddrinfo(coordinator.rsplit(":", 1)[0].strip("[]"), None)
            return
        time.sleep(1.0)


def _check_devices(meeting: Meeting) -> None:
    """See that jax has found what the environment names: a run on a part of it would only be slower, without a word."""
    if meeting.num_processes != 1 and jax.process_count() != meeting.num_processes:
        raise DnoError(
            f"{meeting.told_by} names {meeting.num_processes} processes, and jax sees {jax.process_count()}: each is "
            "alone; see that every host runs the same jax, and the accelerators' own plugin (pip install "
            "'dno_jax[gpu]' or 'dno_jax[tpu]')"
        )
    if meeting.devices is not None and (seen := jax.local_device_count()) < meeting.devices:
        kind = jax.local_devices()[0].platform
        raise DnoError(
            f"{meeting.told_by} names {meeting.devices} accelerators for this process, and jax sees {seen} {kind} "
            f"device{'s' if seen > 1 else ''}; install the accelerators' plugin (pip install 'dno_jax[gpu]' or "
            "'dno_jax[tpu]'), see that the driver works (nvidia-smi), or set CUDA_VISIBLE_DEVICES to what is meant "
            "(empty: none)"
        )


def described(mesh: Mesh | AbstractMesh) -> str:
    """Say in one line what a run computes on: "16 devices on 2 hosts, mesh data 1 x fsdp 16"."""
    hosts = 1 if _joined is None else len(set(_joined.others.hosts))
    shown = [name for name, size in mesh.shape.items() if size > 1 or name in ("data", "fsdp")]
    axes = " x ".join(f"{name} {mesh.shape[name]}" for name in shown)
    processes = jax.process_count()
    of = f" of {processes} processes" if processes > hosts else ""
    return f"{_counted(mesh.size, 'device')}{of} on {_counted(hosts, 'host')}, mesh {axes}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def await_verdict(error: BaseException) -> None:
    """Wait, where an error may come of a peer's death, until that is noticed and said: it ends this process."""
    if _joined is not None and _CONNECTION.search(str(error)):
        _joined.heartbeat.await_verdict()


def end_at_once(status: int) -> None:
    """End this process now, if there are others: at its exit jax would wait for them, and they wait for it."""
    if distributed.global_state.num_processes > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # its reader is gone
                stream.flush()
        if _joined is not None:
            _joined.heartbeat.fail(status)
        os._exit(status)


def part() -> None:
    """Wait at the end until all have come to theirs; a peer that dies meanwhile is noticed."""
    if _joined is not None:
        _joined.heartbeat.part()


def _client() -> Any:
    """The process's line to the coordinator, to which jax has no public way."""
    return distributed.global_state.client


def _leave_word(key: str, word: str) -> None:
    """Leave a word with the coordinator, where nobody has left one before."""
    with unless("ALREADY_EXISTS"):
        _client().key_value_set(key, word)


def _word(key: str) -> str | None:
    with unless("NOT_FOUND"):
        return _client().key_value_try_get(key)
    return None


class CommonStop:
    """The step before which all processes of a training stop, once one of them has been asked to.

    No collective is needed: who is asked names a step that is far enough ahead, and all look for such a name before
    every step, a call of half a millisecond to the coordinator. A process is never 2 steps ahead of another, as it
    reads the figures of the step before, which all compute.
    """

    def __init__(self, name: str):
        self._key = f"{_STOPS}/{name}"
        self._step: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether to stop before this step. Every process asks, once before each step."""
        if jax.process_count() == 1:
            return stopping.asked()
        if self._step is None and stopping.asked():
            _leave_word(self._key, str(step + _AHEAD))
        if self._step is None and (word := _word(self._key)) is not None:
            self._step = int(word)
        return self._step is not None and step >= self._step


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
    """Poll for something that another process writes; no collective that could time out is held meanwhile.

    Every stage ends here, whole: a stop that was asked for goes no further.
    """
    while not ready():
        time.sleep(seconds)
    stopping.heed()
