"""Tables of what judges and teachers will cost."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dno_jax.plan.annotation import AnnotationPlan, Estimate


def cost_tables(plan: AnnotationPlan) -> list[RenderableType]:
    """Show what is asked for, and beside it what asking in other ways would take."""
    section = plan.section
    tables: list[RenderableType] = []
    if plan.parts:
        tables.append(_table("annotation, by chat: at most so many tokens and dollars", plan.parts))
    models = ", ".join(dict.fromkeys(chat.model for estimate in plan.others.values() for chat in estimate.demands))
    tables.append(_table(f"the same pools of all iterations, asked of {models} in other ways", plan.others))
    notes = [
        "Tokens are those of the run's tokenizer, or a guess that is noted above. A batch takes up to 24 hours, "
        "whatever the limits."
    ]
    if section.max_usd is not None:
        notes.append(f"annotation.max_usd is {section.max_usd:g} dollars.")
    unpriced = sorted({chat.model for chat in section.chats if chat.model not in section.prices})
    if unpriced:
        notes.append(f"No price of {', '.join(unpriced)}: give annotation.prices its dollars per million tokens.")
    return [*tables, Text("\n".join(notes))]


def _table(title: str, estimates: Mapping[str, Estimate]) -> Table:
    # Names and numbers are shown whole, or misread: what 80 columns hold decides where headings and names break.
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in ("requests", "tokens\nin", "tokens\nout", "dollars", "dollars\nby batch", "hours at\nlimits"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, estimate in estimates.items():
        total = estimate.total
        counts = (total.requests, total.tokens_in, total.tokens_out)
        amounts = (estimate.usd, estimate.batch_usd, estimate.hours)
        shown = ("-" if amount is None else _amount(amount) for amount in amounts)
        table.add_row(name.replace(", ", ",\n"), *(f"{count:,}" for count in counts), *shown)
    return table


def _amount(amount: float) -> str:
    return f"{amount:,.2f}" if amount < 1_000 else f"{amount:,.0f}"
