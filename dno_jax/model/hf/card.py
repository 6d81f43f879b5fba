"""The model card of an export: README.md with the run's own facts.

Names and paths come from files and people: they are data. YAML is written by its library, and what stands in the
Markdown text stands in code spans, where nothing is markup.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from dno_jax.display import printable
from dno_jax.model.config import Head

LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_MAX_CHARACTERS = 200
_MAX_FRONT_MATTER = 1 << 16
# What the first lines of a licence say -> its name on the Hub.
_LICENCES = {r"Apache License\s+Version 2\.0": "apache-2.0", r"MIT License": "mit"}
_CITATION = """@article{rosset2024direct,
  title = {Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences},
  author = {Rosset, Corby and Cheng, Ching-An and Mitra, Arindam and Santacroce, Michael and Awadallah, Ahmed and
            Xie, Tengyang},
  journal = {arXiv preprint arXiv:2404.03715},
  year = {2024}
}"""


@dataclass(frozen=True)
class HeldOutRate:
    """How often the exported policy is preferred to an opponent, in [0, 1], with its 95 % interval."""

    opponent: str
    rate: float
    low: float
    high: float
    comparisons: int
    prompts: int


@dataclass(frozen=True)
class ExportFacts:
    """What a run knows of the policy it exports. None: does not apply.

    Attributes:
        method: what was done, in words.
        loss: name of the loss.
        scheme: what is done with the sequence of policies (outer.scheme).
        policy: index of the exported policy.
        iterations: how many iterations of training it has behind it.
        annotator: who gave the preferences that were trained on.
        held_out_judge: who gave those behind the win rates.
        num_pairs: training pairs (rows) over all those iterations.
        num_examples: examples of supervised fine-tuning.
        agreement: how often a reward model agrees with held-out preferences, in words.
        win_rates: on held-out prompts.
        template_options: variables that the chat template was given, as apply_chat_template takes them.
        messages: of a held-out prompt, as (role, text).
        answers: to it, as (who, text).
    """

    method: str
    loss: str
    scheme: str | None = None
    policy: int | None = None
    iterations: int | None = None
    annotator: str | None = None
    held_out_judge: str | None = None
    num_pairs: int | None = None
    num_examples: int | None = None
    agreement: str | None = None
    win_rates: tuple[HeldOutRate, ...] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    answers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Base:
    """The checkpoint that training started from: its name, its id and commit on the Hub, its licence."""

    name: str
    hub_id: str | None
    commit: str | None
    licence: dict[str, str]


def model_card(source: Path, *, facts: ExportFacts | None, head: Head = "logits") -> str:
    """Return README.md of a checkpoint made from `source`."""
    base = _read_base(source)
    tags = {"pipeline_tag": "text-generation", "tags": ["dno_jax"]}
    if head == "reward":
        tags = {"pipeline_tag": "text-classification", "tags": ["dno_jax", "reward-model"]}
    front: dict[str, Any] = {"library_name": "transformers"} | tags
    if base.hub_id is not None:
        front["base_model"] = base.hub_id
    front |= base.licence
    licence = base.licence.get("license_name") or base.licence.get("license")
    rows: list[tuple[str, str]] = [
        ("base model", code(base.name)),
        *([("its commit", code(base.commit))] if base.commit else []),
        ("licence", code(licence) if licence else "see the base model"),
    ]
    if facts is not None:
        rows += _fact_rows(facts)
    rows.append(("written by", f"dno_jax {metadata.version('dno_jax')}"))
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=False)}---",
        "# Model card",
        (code(base.name) + (f" after {facts.method}" if facts else ", written anew") + "."),
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]),
    ]
    if facts is not None and facts.win_rates:
        parts += ["## Win rates on held-out prompts", _rate_table(facts.win_rates)]
    if facts is not None and facts.answers:
        parts.append("## A held-out prompt, and the first answers to it")
        for who, text in (*facts.messages, *facts.answers):
            parts += [f"{code(who)}:", _fenced(text)]
    parts += ["## Citation", f"```bibtex\n{_CITATION}\n```"]
    return "\n\n".join(parts) + "\n"


def _fact_rows(facts: ExportFacts) -> list[tuple[str, str]]:
    options = ", ".join(f"{name}={value!r}" for name, value in facts.template_options.items()) or None
    values = [
        ("loss", facts.loss and code(facts.loss)),
        ("scheme", facts.scheme and code(facts.scheme)),
        ("policy", facts.policy),
        ("iterations", facts.iterations),
        ("annotator", facts.annotator and code(facts.annotator)),
        ("judge of held-out prompts", facts.held_out_judge and code(facts.held_out_judge)),
        ("training pairs", facts.num_pairs),
        ("training examples", facts.num_examples),
        ("held-out agreement", facts.agreement),
        ("chats rendered with", options and code(f"apply_chat_template(..., {options})")),
    ]
    return [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in values if value is not None]


def _rate_table(rates: tuple[HeldOutRate, ...]) -> str:
    rows = ["| against | preferred | 95 % interval | comparisons | prompts |", "|---|---:|---:|---:|---:|"]
    rows += [
        f"| {code(rate.opponent)} | {100 * rate.rate:.1f} % | {100 * rate.low:.1f} to {100 * rate.high:.1f} % "
        f"| {rate.comparisons:,} | {rate.prompts:,} |"
        for rate in rates
    ]
    return "\n".join(rows)


def _fenced(text: str) -> str:
    """Return text of several lines as a Markdown code block, which nothing in it can close."""
    plain = printable(text.strip())
    fence = "`" * (1 + max(2, *(len(run) for run in re.findall("`+", plain)), 0))
    return f"{fence}text\n{plain}\n{fence}"


def code(text: str) -> str:
    """Return text as a Markdown code span: one line, nothing in it is markup, fit for a table's cell."""
    plain = _one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    # A table's cell ends at a bar, in a code span too, unless it is escaped.
    inner = plain.replace("|", "\\|")
    pad = " " if not inner or inner[0] == "`" or inner[-1] == "`" else ""
    return f"{fence}{pad}{inner}{pad}{fence}"


def _one_line(text: str) -> str:
    # Control, format (also those that turn the reading direction) and line separators would break out or mislead.
    plain = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    plain = re.sub(" +", " ", plain).strip()
    return plain if len(plain) <= _MAX_CHARACTERS else plain[: _MAX_CHARACTERS - 3] + "..."


def _read_base(source: Path) -> _Base:
    hub_id = commit = None
    for folder, _, snapshot in zip(source.parts, source.parts[1:], source.parts[2:], strict=False):
        names = folder.removeprefix("models--").split("--")
        if folder.startswith("models--") and len(names) == 2:
            hub_id, commit = "/".join(names), snapshot
    return _Base(name=hub_id or source.resolve().name, hub_id=hub_id, commit=commit, licence=_licence(source))


def _licence(source: Path) -> dict[str, str]:
    """Return the base's own entries on its licence: of its card, or else of a licence's text that we know."""
    said = _front_matter(source / "README.md")
    keys = ("license", "license_name", "license_link")
    found = {key: _one_line(said[key]) for key in keys if isinstance(said.get(key), str)}
    if "license" in found:
        return found
    for name in LICENCE_FILES[:-1]:
        if (source / name).is_file():
            beginning = _beginning(source / name)
            known = next((hub for text, hub in _LICENCES.items() if re.search(text, beginning)), None)
            return {"license": known or "other", **({} if known else {"license_link": name})}
    return {}


def _front_matter(file: Path) -> dict[str, Any]:
    text = _beginning(file) if file.is_file() else ""
    found = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    try:
        tree = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # a base whose card cannot be read says nothing
    return tree if isinstance(tree, dict) else {}


def _beginning(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(_MAX_FRONT_MATTER).decode("utf-8", errors="replace")
