"""`dno run --smoke`: figures of this machine before a run is paid for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dno_jax.config import RunConfig


def run_smoke(settings: RunConfig, price_per_hour: float | None) -> None:
    """Print what was measured as a table, and as one line of JSON on standard output."""
    from dno_jax import smoke
    from dno_jax.console import console
    from dno_jax.parallel.cluster import is_primary

    found = smoke.run(settings, price_per_hour=price_per_hour)
    if is_primary():
        console.print(smoke.smoke_table(found))
        smoke.tell(found)
        typer.echo(json.dumps(found.as_dict()))
