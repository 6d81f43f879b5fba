"""How a command that uses devices joins the other processes of its run, and how it leaves them."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from dno_jax import stopping

if TYPE_CHECKING:
    from dno_jax.config import AnyConfig

Coordinator = Annotated[str | None, typer.Option(help="host:port of process 0, for several processes")]
NumProcesses = Annotated[int | None, typer.Option(help="how many processes there are")]
ProcessId = Annotated[int | None, typer.Option(help="index of this process, from 0")]


def join(settings: AnyConfig, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the processes of the run, by these flags or by what their launcher has left in the environment."""
    from dno_jax.parallel.cluster import initialize

    initialize(
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        heartbeat_seconds=settings.heartbeat_seconds,
    )


def leave(status: int, failure: BaseException | None = None) -> None:
    """Come to the end of the process: together with the others, or at once where it has failed.

    Args:
        failure: that is no fault of the user's; its traceback is printed, unless it is another process's death.
    """
    joined = "dno_jax.parallel.cluster" in sys.modules
    if failure is not None:
        if joined:
            from dno_jax.parallel.cluster import await_verdict

            await_verdict(failure)
        with suppress(OSError):  # nobody reads it any more, as after a terminal's end: the others still wait
            sys.excepthook(type(failure), failure, failure.__traceback__)
    if joined:
        from dno_jax.parallel.cluster import end_at_once, part

        if status in (0, stopping.STOPPED, stopping.INTERRUPTED):
            part()
        else:
            end_at_once(status)
