"""Tables of what judges gave and what was paid for it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dno_jax.annotation.ledger.store import Receipt, Tally


def verdict_table(tallies: Sequence[Tally]) -> Table:
    """Verdicts by judge and state; tries, tokens and dollars of all runs together."""
    table = _table("judge", "state", numbers=("verdicts", "tries", "tokens in", "tokens out", "dollars"))
    for tally in tallies:
        counts = (tally.verdicts, tally.tries, tally.tokens_in, tally.tokens_out)
        table.add_row(tally.judge, tally.state, *(f"{count:,}" for count in counts), f"{tally.usd:,.4f}")
    return table


def receipt_table(receipts: Sequence[Receipt]) -> Table:
    """What each run paid, by model."""
    numbers = ("requests", "without usage", "tokens in", "tokens out", "dollars")
    table = _table("run", "model", numbers=numbers)
    for receipt in receipts:
        counts = (receipt.requests, receipt.unmetered, receipt.tokens_in, receipt.tokens_out)
        table.add_row(receipt.run, receipt.model, *(f"{count:,}" for count in counts), f"{receipt.usd:,.4f}")
    return table


def _table(*names: str, numbers: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
