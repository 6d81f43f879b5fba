"""`dno launch`: what clusters want before they run anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

launch = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@launch.callback()
def _group() -> None:
    """Keep the group a group though it has one command."""


@launch.command()
def manifest(
    values: Annotated[
        Path,
        typer.Argument(
            help="a YAML file of values (launch/jobset_gpu.yaml, launch/jobset_tpu.yaml)", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="values to set, such as name=dno-2", show_default=False)
    ] = None,
) -> None:
    """Print a JobSet for `kubectl apply -f -`, and a Job that annotates beside it where `annotate` is given."""
    from dno_jax.config import load_config
    from dno_jax.display import printable
    from dno_jax.launch.manifest import manifest as made
    from dno_jax.launch.values import LaunchValues

    typer.echo(printable(made(load_config(LaunchValues, values, overrides or []))), nl=False)
