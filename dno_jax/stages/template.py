"""The chat template at the start of a run: linted, refused where it cannot be trained with, and left to be read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from dno_jax.config import ModelConfigSection, RunConfig
from dno_jax.console import say
from dno_jax.data.reading import Reading, examples_of, prompts_of
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.model.hf import folder, untrained_rows
from dno_jax.model.text.templates import QUESTION, Finding, TemplateStrip, lint, template_strip
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.records import Message
from dno_jax.runtime.runtime import Runtime, load_tokenizer

_STAND_IN = "A response."
_AROUND = 150  # tokens that are shown at each end of a long prompt and of a long response
_TRIED = 100  # rows of the data that are tried for an example
_STYLES = {"error": "bold red", "warning": "yellow", "note": "green"}


@dataclass(frozen=True)
class TemplateReport:
    """What there is to know of a tokenizer and its template.

    Attributes:
        strip: one chat as tokens; None where the template lets none be made.
        findings: of the lint, the worst first.
    """

    strip: TemplateStrip | None
    findings: tuple[Finding, ...]

    def at(self, level: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == level)


def report(
    section: ModelConfigSection, data_path: str | Sequence[str], tokenizer: ChatTokenizer | None = None
) -> TemplateReport:
    """Lay out the first row of the data that has a response (or a stand-in) and lint the template."""
    fetch = tokenizer is not None  # a run needs the weights; to look at a template they are not fetched from the Hub
    tokenizer = tokenizer or load_tokenizer(section)
    return TemplateReport(_strip(tokenizer, data_path), _findings(section, tokenizer, fetch=fetch))


def refuse_template(runtime: Runtime[Any]) -> None:
    """Stop a run whose template cannot be trained with.

    Raises:
        DnoError: the lint's errors.
    """
    refuse(_findings(runtime.config.model, runtime.tokenizer, fetch=True), place=str(runtime.tokenizer.template_place))


def _findings(section: ModelConfigSection, tokenizer: ChatTokenizer, *, fetch: bool) -> tuple[Finding, ...]:
    untrained: frozenset[int] = frozenset()
    if tokenizer.template is not None and getattr(section, "init_config", None) is None:  # else no row is trained yet
        marks = tokenizer.control_ids & tokenizer.written_ids
        untrained = untrained_rows(folder(section.path, weights=fetch), marks, added=tokenizer.added_ids)
    return lint(tokenizer, untrained=untrained)


def refuse(findings: Sequence[Finding], *, place: str) -> None:
    """Raise the errors among the findings as one DnoError."""
    if errors := [f"{finding.name}: {finding.text}" for finding in findings if finding.level == "error"]:
        raise DnoError(f"{place}: chats of this tokenizer and template cannot be trained on:\n  " + "\n  ".join(errors))


def save_template(runtime: Runtime[Any]) -> None:
    """Print the lint's warnings; leave the strip and all findings in the run directory, for a person to check."""
    config = runtime.config
    data_path = config.prompts.path if isinstance(config, RunConfig) else config.data.path
    found = report(config.model, data_path, runtime.tokenizer)
    for finding in found.at("warning"):
        say(f"template: {finding.name}: {finding.text}")
    write_atomically(runtime.run_dir.template_path, render(found).plain)


def render(found: TemplateReport) -> Text:
    """The report for a terminal: one token per line, where the loss starts and ends, then the findings."""
    text = Text()
    if found.strip is not None:
        _render_strip(text, found.strip)
        text.append("\n")
    for finding in found.findings:
        text.append(f"{finding.level:8s}", style=_STYLES[finding.level])
        text.append(f"{finding.name}: {finding.text}\n")
    return text


def _render_strip(text: Text, strip: TemplateStrip) -> None:
    text.append(
        f"{len(strip.ids)} tokens, loss on [{strip.loss_start}, {strip.loss_end}), "
        f"{strip.bos_count} BOS, end token {'trained' if strip.end_trained else 'NOT trained'}\n\n"
    )
    edges, left_out = (0, strip.loss_start, strip.loss_end, len(strip.ids)), 0
    for index, (token_id, token) in enumerate(zip(strip.ids, strip.tokens, strict=True)):
        if min(abs(index - edge) for edge in edges) > _AROUND:
            left_out += 1
            continue
        if left_out:
            text.append(f"  ... {left_out:,} tokens ...\n", style="dim")
            left_out = 0
        trained = strip.loss_start <= index < strip.loss_end
        ends = strip.end_trained and index == strip.loss_end - 1
        mark = "loss" if trained else "    "
        style = "bold white on magenta" if ends else "bold black on green" if trained else "dim"
        text.append(f"{index:5d} {mark} {token_id:7d} ", style="dim")
        text.append(repr(token), style="bold cyan" if strip.control[index] and not ends else style)
        text.append("  end" * ends + "\n", style="magenta")


def _strip(tokenizer: ChatTokenizer, data_path: str | Sequence[str]) -> TemplateStrip | None:
    """The first row with a response that can be laid out; else the lint's own question; else nothing."""
    with suppress(DnoError):  # said where the data are read; here any row will do
        rows = list(itertools.islice(read_rows(data_path), _TRIED))
        answered = [(example, example.response) for example, _ in examples_of(rows, Reading(data_path, errors=[]))]
        asked = [(prompt, _STAND_IN) for prompt, _ in prompts_of(rows, Reading(data_path, errors=[]))]
        for chat, response in (*answered, *asked):
            with suppress(DnoError):
                if not tokenizer.control_tokens(*chat.texts):
                    return template_strip(tokenizer, chat.messages, response, chat.assistant_prefix)
    with suppress(DnoError):
        return template_strip(tokenizer, [Message(role="user", content=QUESTION)], _STAND_IN)
    return None
