"""Pages of the site that are made from the program itself, so that they cannot be out of date; a hook of mkdocs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]*)\)")


def configuration() -> str:
    """Every field that a configuration may set, by section."""
    from dno_jax.config import RewardConfig, RunConfig, SftConfig
    from dno_jax.config.fields import described

    parts = [
        "# Configuration",
        "Of each field: its default as YAML has it, what a change means for a run directory that is there already "
        "([run_directory.md](run_directory.md#changing-the-configuration-of-a-run)), and what it is. `dno config` "
        "lists the same.",
    ]
    kinds = ((RunConfig, "A run", ""), (SftConfig, "`dno sft`", " (sft)"), (RewardConfig, "`dno reward`", " (reward)"))
    for kind, title, of in kinds:
        parts.append(f"## {title}")
        sections: dict[str, list[str]] = {}
        for field in described(kind):
            section, _, name = field.name.rpartition(".")
            value = "has to be given" if field.default is None else f"`{_cell(field.default)}`" if field.default else ""
            means = f"{field.kind} {', '.join(field.stages)}".strip() if field.kind else "a section"
            words = f"one of {', '.join(field.choices)}; " if field.choices else ""
            row = f"| `{name}` | {value} | {means} | {_cell(words + field.description)} |"
            sections.setdefault(section, []).append(row)
        for section, rows in sections.items():
            if section:
                parts.append(f"### `{section}`{of}")
            parts.append("\n".join(["| field | default | a change | what it is |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    import typer

    from dno_jax.cli.main import app

    parts = ["# Command line", "Every command takes `--help`; [commands.md](commands.md) says what they are for."]
    for path, command in commands(typer.main.get_command(app), ("dno",)):
        parts.append(f"## `{' '.join(path)}`\n\n{(command.help or '').strip()}")
        rows = [_option(option) for option in command.params if not getattr(option, "hidden", False)]
        if rows:
            parts.append("\n".join(["| | |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command below a group, with the words that call it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, found in inner.items():
        yield from commands(found, (*path, name))


def _option(option: Any) -> str:
    names = option.opts + option.secondary_opts if option.param_type_name == "option" else [option.name.upper()]
    return f"| {', '.join(f'`{name}`' for name in names)} | {_cell(getattr(option, 'help', None) or '')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the pages that are made."""
    from mkdocs.structure.files import File

    for name, text in (("configuration.md", configuration()), ("command_line.md", command_line())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: what lies outside docs/ is in the repository, not on the site; its name stays."""
    return _LINK.sub(lambda found: found[1] if "`" in found[1] else f"`{found[1]}`", markdown)
