"""The command line in processes of its own, all of one server that has imported it: a start costs no import."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.end_to_end.preloaded"])


@dataclasses.dataclass(frozen=True)
class Done:
    """A process that has ended: its exit status, -signal where one killed it, and what it wrote."""

    returncode: int
    stderr: str
    stdout: str = ""


def begin(
    *arguments: Any,
    point: str | None = None,
    stderr: str | Path = os.devnull,
    stdout: str | Path = os.devnull,
    environment: Mapping[str, str] | None = None,
    devices: int | None = None,
) -> BaseProcess:
    """Start `dno ARGUMENTS`, to be killed at the point if one is named (see crash.py).

    Args:
        environment: variables beside those of this process.
        devices: of CPU that it sees; None: one.
    """
    words = [str(argument) for argument in arguments]
    process = _SERVER.Process(
        target=_main, args=(words, point, (str(stdout), str(stderr)), dict(environment or {}), devices)
    )
    process.start()
    return process


def start(*arguments: Any, point: str | None = None, timeout: float = 600.0) -> Done:
    """Run `dno ARGUMENTS` to its end.

    Raises:
        TimeoutError: it has not ended in time; it is killed.
    """
    with (
        tempfile.NamedTemporaryFile(mode="r", errors="replace") as stderr,
        tempfile.NamedTemporaryFile(mode="r", errors="replace") as stdout,
    ):
        process = begin(*arguments, point=point, stderr=stderr.name, stdout=stdout.name)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"dno {arguments} has not ended in {timeout} s:\n{stderr.read()[-3000:]}")
        return Done(process.exitcode, stderr.read(), stdout.read())


def patience(seconds: float) -> float:
    """Return a heartbeat for a machine as busy as this one: processes that wait for a core give no signs."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _main(
    arguments: list[str], point: str | None, said: tuple[str, str], environment: dict[str, str], devices: int | None
) -> None:
    import jax

    from dno_jax.cli.main import main
    from tests.end_to_end.crash import arm

    os.environ.update(environment)
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)

    for stream, path in zip((sys.stdout, sys.stderr), said, strict=True):
        stream.flush()
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream.fileno())
        os.close(file)
    if programs := os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # a run's own folder, made for the tests
        os.environ["XDG_CACHE_HOME"] = os.path.dirname(programs)
    logging.getLogger().handlers.clear()  # what libraries set up in the server: a process of its own has none yet
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    if point:
        arm(point)
    sys.argv = ["dno", *arguments]
    main()
