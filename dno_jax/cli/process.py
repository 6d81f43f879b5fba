"""What the command line's process owes its terminal: no raw characters, no lost Ctrl-C, no advice of libraries."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import typer

from dno_jax import stopping
from dno_jax.cli.flags import accelerator_flags
from dno_jax.display import printable

# Advice of libraries to their own users, such as that PyTorch is absent. What is set already stays as it is.
_QUIET = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def run(app: Callable[..., Any]) -> int:
    """Run a typer application; return its exit status.

    Status 2 and one message for a DnoError or a wrong command, 75 after SIGTERM, 130 after a Ctrl-C. All else keeps its
    traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: what a terminal lacks, it spells out
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.update(accelerator_flags(os.environ))
    try:
        from dno_jax.errors import DnoError

        with stopping.listening(), _no_interrupt_is_lost(), _printable_tracebacks(), _printable_logs():
            try:
                status = app(standalone_mode=False)
            except DnoError as error:
                typer.echo(printable(f"dno: {error}"), err=True)
                return 2
            except typer.Abort:
                return 1
            except Exception as error:
                if hasattr(error, "show"):
                    return _show_usage(error)
                from dno_jax.files import refused_by_disk

                if (told := refused_by_disk(error)) is None:
                    raise
                typer.echo(printable(f"dno: {told}"), err=True)
                return 2
    except KeyboardInterrupt:  # before the command has begun, or after it
        status = stopping.INTERRUPTED
    if status == stopping.INTERRUPTED and stopping.exit_status() == stopping.STOPPED:
        typer.echo(printable("dno: stopped by SIGTERM; the same command goes on from what is saved"), err=True)
        return stopping.STOPPED
    return status if isinstance(status, int) else 0


def _show_usage(error: Any) -> int:
    """Print what the parser says of a command that is none; it quotes arguments as they came."""
    text = io.StringIO()
    error.show(file=text)
    typer.echo(printable(text.getvalue()), err=True, nl=False)
    return error.exit_code


@contextmanager
def _printable_tracebacks() -> Iterator[None]:
    before = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(printable("".join(traceback.format_exception(kind, value, trace))))

    sys.excepthook = hook  # it stays where an exception leaves: that is printed when all is unwound
    yield
    sys.excepthook = before


@contextmanager
def _printable_logs() -> Iterator[None]:
    """Print warnings of our modules and of libraries as lines of the console; others' handlers are left alone."""
    logger = logging.getLogger()
    if logger.handlers:
        yield
        return
    handler = _LazyLines(logging.WARNING)
    logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logger.removeHandler(handler)


class _LazyLines(logging.Handler):
    """Imports the console when there is something to say."""

    def emit(self, record: logging.LogRecord) -> None:
        from dno_jax.console import say

        try:
            say(f"{record.levelname.lower()}: {record.getMessage()}")
        except Exception:  # as every handler: what cannot be told stops nobody
            self.handleError(record)


@contextmanager
def _no_interrupt_is_lost() -> Iterator[None]:
    """Interrupt again where Python drops it: in a callback of the garbage collector, of which jax has one."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            before(dropped)
            return
        again = threading.Timer(0.05, stopping.repeat)  # at once, it would end up in this hook
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
