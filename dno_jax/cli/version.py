"""`dno --version`."""

from __future__ import annotations

import sys

import typer

from dno_jax.display import printable


def show_version(asked: bool) -> bool:
    """Print the versions of this package, of jax and of Python, and end, if that is asked."""
    if asked:
        from importlib.metadata import version

        found = f"dno_jax {version('dno_jax')}, jax {version('jax')}, Python {sys.version.split()[0]}"
        typer.echo(printable(found))
        raise typer.Exit
    return asked
