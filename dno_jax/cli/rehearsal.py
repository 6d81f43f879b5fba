"""`dno fake-judge`: a judge to rehearse a run with."""

from __future__ import annotations

from typing import Annotated

import typer


def fake_judge(
    settings: Annotated[
        list[str] | None, typer.Argument(help="such as prefers=longest delay=0.05 fraction=0.2", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 0,
    show: Annotated[bool, typer.Option("--settings", help="list what can be set, and exit")] = False,
) -> None:
    """Serve a judge that prefers, errs and fails as it is told, to rehearse a run without paying one."""
    import signal
    import threading

    from dno_jax.console import console, results
    from dno_jax.display import printable
    from dno_jax.fake_judge import FakeJudge, counts_table, read_settings, settings_table

    behaviour = read_settings(settings or [])
    if show:
        results.print(settings_table(behaviour))
        return
    asked_to_stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked_to_stop.set())
    with FakeJudge(behaviour, host=host, port=port, record=False) as server:
        typer.echo(printable(server.url))  # on standard output, for scripts
        asked_to_stop.wait()
    console.print(counts_table(server.counts))
