"""`dno prompts`: what files of prompts, gold responses or examples are taken for."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dno_jax.display import printable

if TYPE_CHECKING:
    from dno_jax.data.check import Checked
    from dno_jax.model.text.tokenizer import ChatTokenizer

prompts = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_FAULTS = 5  # that are shown


@prompts.callback()
def _group() -> None:
    """Keep the group a group though it has one command."""


@prompts.command()
def check(
    files: Annotated[
        list[str], typer.Argument(help="files, patterns or ids of datasets (docs/data.md)", show_default=False)
    ],
    held_out: Annotated[
        list[str] | None, typer.Option(help="prompts that must not be among these", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="a recipe, whose tokenizer and limits are asked", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="a checkpoint, whose tokenizer is asked", show_default=False)
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of the longest prompt", show_default=False)] = None,
) -> None:
    """Show what files are taken for: form, counts, repetitions, lengths, and what a run would leave out."""
    from dno_jax.config.base import data_place
    from dno_jax.data import check as checking

    tokenizer, longest = _tokenizer(config, model)
    found = checking.check(
        [data_place(file) for file in files],
        held_out=[data_place(file) for file in held_out or ()],
        tokenizer=tokenizer,
        max_length=max_length or longest,
    )
    for line in _lines(found):
        typer.echo(printable(line))
    if found.faults or found.leaked:
        raise typer.Exit(2)


def _tokenizer(config: Path | None, model: Path | None) -> tuple[ChatTokenizer | None, int | None]:
    from dno_jax.errors import DnoError

    if config is not None and model is not None:
        raise DnoError("--config and --model are both given: choose one")
    if config is not None:
        from dno_jax.config import RunConfig, load_config
        from dno_jax.runtime.runtime import load_tokenizer

        settings = load_config(RunConfig, config)
        return load_tokenizer(settings.model), settings.prompts.max_length
    if model is not None:
        from dno_jax.model.text.tokenizer import ChatTokenizer

        return ChatTokenizer.load(model), None
    return None, None


def _lines(found: Checked) -> Iterator[str]:
    counts, reading = found.counts, found.prompts
    forms = ", ".join(f"{count:,} x {form}" for form, count in reading.forms.items())
    yield _row("rows", f"{reading.rows:,}" + f": {forms}" * bool(forms))
    if reading.ignored:
        yield _row("ignored", ", ".join(name if name.isprintable() else repr(name) for name in reading.ignored))
    given = f"{counts.get('candidates', 0):,} candidates, {counts.get('scored', 0):,} with points"
    yield _row("prompts", f"{counts.get('prompts', 0):,}, {counts.get('gold', 0):,} with gold; {given}")
    yield _row("examples", f"{counts.get('examples', 0):,} for dno sft")
    left_out = reading.left_out + found.dropped
    for why, count in left_out.most_common():
        yield _row("left out" if why in reading.left_out else "dropped", f"{count:,} x {why}")
    if reading.repeated:
        yield _row("repeated", f"{reading.repeated:,} in the words of another; kept, as they have ids of their own")
    for name, (least, median, most_of, most) in found.lengths.items():
        unit = "" if name.endswith("tokens") else " words"
        yield _row(f"{name}{unit}", f"{least:,} to {most:,}, median {median:,}, 95 % up to {most_of:,}")
    if found.first is not None:
        for message in found.first.messages:
            yield _row(message.role, _shown(message.content))
        if found.first.gold is not None:
            yield _row("gold", _shown(found.first.gold))
    for held_out, trained in found.leaked[:_FAULTS]:
        names = f"{held_out.prompt_id!r} is also {trained.prompt_id!r}"
        yield _row("LEAK", f"held-out {names}: {_shown(held_out.messages[-1].content)}")
    if more := found.leaked[_FAULTS:]:
        yield _row("LEAK", f"and {len(more):,} more")
    for fault in found.faults[:_FAULTS]:
        yield _row("WRONG", fault)
    if more := found.faults[_FAULTS:]:
        yield _row("WRONG", f"and {len(more):,} more")


def _row(name: str, text: str) -> str:
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return textwrap.fill(f"{name:<14}  {text}", 120, subsequent_indent=" " * 16, break_on_hyphens=False)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:197] + "...")
