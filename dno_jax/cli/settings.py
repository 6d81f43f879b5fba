"""`dno config`: what can be set."""

from __future__ import annotations

from typing import Annotated

import typer


def config(
    section: Annotated[
        str | None, typer.Argument(help="such as sampling, annotation.openai or loss.beta; all by default")
    ] = None,
    sft: Annotated[bool, typer.Option("--sft", help="of `dno sft`, not of a run")] = False,
    reward: Annotated[bool, typer.Option("--reward", help="of `dno reward`, not of a run")] = False,
) -> None:
    """List what a configuration may set: name and default, what a change means for a run directory, description."""
    from rich.text import Text

    from dno_jax.config import RewardConfig, RunConfig, SftConfig
    from dno_jax.config.fields import described
    from dno_jax.console import results
    from dno_jax.errors import DnoError

    if sft and reward:
        raise DnoError("--sft and --reward are of two commands; give one of them")
    kind = SftConfig if sft else RewardConfig if reward else RunConfig
    fields = list(described(kind))
    asked = None if section is None else f"{section.replace('[]', '')}."
    found = [field for field in fields if asked is None or f"{field.name.replace('[]', '')}.".startswith(asked)]
    if not found:
        known = ", ".join(dict.fromkeys(field.name.partition(".")[0] for field in fields))
        raise DnoError(f"no section or field {section!r}; known: {known}; their fields by dots, as annotation.openai")
    for field in found:
        value = " (has to be given)" if field.default is None else f" = {field.default}" if field.default else ""
        what = f"{field.kind} {', '.join(field.stages)}".strip() if field.kind else ""
        words = [f"one of {', '.join(field.choices)}"] if field.choices else []
        said = "; ".join([*words, *([field.description] if field.description else [])])
        line = Text(f"{field.name}{value}", style="bold")
        line.append(f"\n    {': '.join(part for part in (what, said) if part)}", style="not bold")
        results.print(line, soft_wrap=True)
