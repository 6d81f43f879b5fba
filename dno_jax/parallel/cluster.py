"""How processes meet, and what they do together: one program on every process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from dno_jax import stopping
from dno_jax.errors import DnoError

_STOP = "dno_jax/stop"  # of the words that processes leave with their coordinator
_WATCH_SECONDS = 0.5
_AHEAD = 3  # steps


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
            _join()
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise DnoError("--coordinator, --num-processes and --process-id go together: give all three, or none")
    if not 0 <= process_id < num_processes:
        raise DnoError(f"--process-id is {process_id}; expected 0 to {num_processes - 1}")
    if num_processes > 1:
        _join(coordinator, num_processes, process_id)


def _join(*where: Any) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
    jax.distributed.initialize(*where)
    # Gloo gives processes 30 seconds to meet for the first time: here all have just come, later one may be reading.
    barrier("joined")
    stopping.when_asked(partial(_leave_word, _STOP, "asked"))
    threading.Thread(target=_watch_the_others, name="stops of others", daemon=True).start()


def end_at_once(status: int) -> None:
    """End this process now, if there are others: at its exit jax would wait for them, and they wait for it."""
    if distributed.global_state.num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch_the_others() -> None:
    """Stop as if asked to, when another process has been: what is left of a run can only wait for it."""
    with suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone, and jax ends this process
        while not stopping.asked():
            if _word(_STOP) is not None:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(_WATCH_SECONDS)


def _leave_word(key: str, word: str) -> None:
    """Leave a word with the coordinator, where nobody has left one before."""
    with _unless("ALREADY_EXISTS"):
        _coordinator().key_value_set(key, word)


def _word(key: str) -> str | None:
    with _unless("NOT_FOUND"):
        return _coordinator().key_value_try_get(key)
    return None


def _coordinator() -> Any:
    return distributed.global_state.client  # jax has no public way to it


@contextmanager
def _unless(status: str) -> Iterator[None]:
    """Let a coordinator's answer of this status pass; where it does not answer, processes could disagree."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if status not in str(error):
            raise


class CommonStop:
    """The step before which all processes of a training stop, once one of them has been asked to.

    No collective is needed: who is asked names a step that is far enough ahead, and all look for such a name before
    every step, a call of half a millisecond to the coordinator. A process is never 2 steps ahead of another, as it
    reads the figures of the step before, which all compute.
    """

    def __init__(self, name: str):
        self._key = f"{_STOP}/{name}"
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
