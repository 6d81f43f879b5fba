"""`dno annotations`: inspect a file of verdicts, export verdicts or delete them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dno_jax.annotation.ledger.store import VerdictStore

annotations = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Place = Annotated[str, typer.Argument(help="a file of verdicts, or a run directory", show_default=False)]
Judge = Annotated[
    str | None, typer.Option(help="only of judges whose identity contains this text, such as a model's name")
]
State = Annotated[str | None, typer.Option(help="only ok, tie, refused, unparsable or failed ones")]


@annotations.command("list")
def list_(place: Place, judge: Judge = None, state: State = None) -> None:
    """Count verdicts by judge and state, with what they took, and what each run paid."""
    from contextlib import closing

    from dno_jax.console import results
    from dno_jax.report.verdicts import receipt_table, verdict_table

    with closing(_store(place)) as store:
        results.print(verdict_table(store.tallies(judge=judge, state=_state(state))))
        if receipts := store.receipts():
            results.print(receipt_table(receipts))


@annotations.command()
def export(
    place: Place,
    out: Annotated[Path, typer.Argument(help="a JSONL file, one verdict per line", show_default=False)],
    judge: Judge = None,
    state: State = None,
) -> None:
    """Write verdicts to a JSONL file, which is there whole or not at all."""
    import json
    from contextlib import closing

    from dno_jax.console import say
    from dno_jax.errors import DnoError
    from dno_jax.files import write_lines_atomically

    if out.exists():
        raise DnoError(f"{out} exists: give another name, or remove it first")
    with closing(_store(place)) as store:
        rows = store.rows(judge=judge, state=_state(state))
        count = write_lines_atomically(out, (json.dumps(row, ensure_ascii=False) for row in rows))
    say(f"{count:,} verdicts exported to {out}")


@annotations.command()
def purge(
    place: Place,
    judge: Judge = None,
    state: State = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete them; without it they are only counted")] = False,
) -> None:
    """Delete verdicts, which are then asked for and paid for again; receipts stay."""
    from contextlib import closing

    from dno_jax.console import results, say
    from dno_jax.errors import DnoError
    from dno_jax.report.verdicts import verdict_table

    if judge is None and state is None:
        raise DnoError("say which: --judge, --state or both; to delete all verdicts, delete the file")
    with _written(place), closing(_store(place)) as store:
        found = store.tallies(judge=judge, state=_state(state))
        results.print(verdict_table(found))
        if yes:
            say(f"{store.purge(judge=judge, state=state):,} verdicts deleted")
        else:
            say(f"{sum(tally.verdicts for tally in found):,} verdicts would be deleted; add --yes to do it")


def _written(place: str) -> AbstractContextManager[None]:
    """Keep a bucket's run directory to this command, and have what it changes uploaded."""
    from dno_jax.run_dir import RunDir

    return RunDir(place).written() if "://" in place else nullcontext()


def _store(place: str) -> VerdictStore:
    """Open a store that is one: to open another database would put tables into it."""
    import sqlite3
    from contextlib import closing

    from dno_jax.annotation.ledger.store import VerdictStore
    from dno_jax.errors import DnoError

    file = _file(place)
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        try:
            is_store = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'verdicts'").fetchone() is not None
        except sqlite3.Error:
            is_store = True  # a damaged one, for all we know: the store says what is wrong with it
    if not is_store:
        raise DnoError(f"{file}: no store of verdicts; give a run directory, or its annotations.sqlite")
    return VerdictStore(file)


def _file(place: str) -> Path:
    """The file of verdicts itself: to open what is not there would make it."""
    from dno_jax.errors import DnoError
    from dno_jax.run_dir import RunDir

    file = Path(place)
    if "://" in place or file.is_dir():
        run_dir = RunDir(place)
        section = run_dir.load_config().annotation
        file = Path(section.store or str(run_dir.annotations_path))
    if not file.is_file():
        raise DnoError(f"{file}: no such file; give a file of verdicts, or a run directory whose judge is paid for")
    return file


def _state(state: str | None) -> str | None:
    from typing import get_args

    from dno_jax.errors import DnoError
    from dno_jax.records import VerdictState

    known = [name for name in get_args(VerdictState) if name != "over budget"]  # of which nothing is kept
    if state is not None and state not in known:
        raise DnoError(f"--state is {state!r}; expected one of {', '.join(known)}")
    return state
