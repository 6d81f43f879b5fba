"""`dno status` and `dno report`: how a run stands."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def status(
    run_dir: Annotated[
        str, typer.Argument(help="a run directory, or one of `dno sft`, `dno reward`", show_default=False)
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="read everything and hold it to its digests; say which stage to redo")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output, for programs")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="show it again and again until the run is finished")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two looks of --watch")] = 5.0,
) -> None:
    """Show which stages are done, with rows and seconds, what comes next, and how trainings went."""
    from dno_jax.console import results
    from dno_jax.errors import DnoError
    from dno_jax.report import status as report
    from dno_jax.run_dir import RunDir

    folder = RunDir(run_dir)
    if verify and (as_json or watch):
        raise DnoError("--verify reads everything once; give it without --json and --watch")
    if watch:
        report.watch(folder, every=every, as_json=as_json)
    elif as_json:
        typer.echo(json.dumps(report.facts(folder)))
    else:
        for table in report.tables(folder, verify=verify):
            results.print(table)


def report(
    run_dir: Annotated[str, typer.Argument(help="a run directory", show_default=False)],
) -> None:
    """Write report.html, a page of its own with figures, tables and samples, and every figure as CSV and SVG.

    The run may be unfinished; what it lacks is said. Plots need the extra `report`.
    """
    from dno_jax.config import RunConfig
    from dno_jax.errors import DnoError
    from dno_jax.report.page import write_report
    from dno_jax.run_dir import RunDir

    folder = RunDir(run_dir)
    if folder.kind() is not RunConfig:
        raise DnoError(f"{folder.path}: a single training has no report; `dno status` shows how it went")
    from dno_jax.display import printable

    typer.echo(printable(str(write_report(folder, folder.load_config()))))
