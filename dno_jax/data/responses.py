"""Responses from elsewhere to prompts that one has: another model's, a person's, AlpacaEval's model outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dno_jax.data.reading import words_of
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.records import Message, Prompt

_ANSWER = ("response", "output")
_ASKED = ("prompt", "instruction")


def read_responses(path: str, prompts: Sequence[Prompt], *, place: str) -> dict[str, str]:
    """Return responses by prompt id: those of rows that name a prompt by its id, or else by its words.

    Args:
        path: JSON lines, a JSON array or Parquet of {prompt_id, response}, or {prompt or instruction, response or
            output}.
        place: the field of the configuration that names the file.

    Raises:
        DnoError: no such file, a row that is of neither form, two responses to one prompt, or none to any of them.
    """
    ids = {prompt.prompt_id for prompt in prompts}
    by_words = {words_of(prompt): prompt.prompt_id for prompt in prompts}
    last_words = {_words(prompt.messages[-1].content): prompt.prompt_id for prompt in prompts}
    found: dict[str, str] = {}
    rows = 0
    for row, where in read_rows(path):
        rows += 1
        answer = _text(row, _ANSWER, where)
        if "prompt_id" in row:
            name = row["prompt_id"] if row["prompt_id"] in ids else None
        else:
            words = _words(_text(row, _ASKED, where))
            name = by_words.get(words) or last_words.get(words)
        if name is None:
            continue
        if name in found:
            raise DnoError(f"{where}: a second response to prompt {name!r}; leave one of the two")
        found[name] = answer
    if not found:
        raise DnoError(
            f"{place}: {path}: none of its {rows:,} responses is to one of the {len(prompts):,} prompts (by prompt_id, "
            "or by the words of the last message); give responses to the held-out prompts"
        )
    return found


def _words(text: str) -> bytes:
    return words_of(Prompt(prompt_id="words", messages=(Message(role="user", content=text or "."),)))


def _text(row: dict[str, Any], names: Sequence[str], where: str) -> str:
    found = next((row[name] for name in names if name in row), None)
    if not isinstance(found, str) or (names is _ASKED and not found.strip()):
        raise DnoError(f"{where}: expected a text in {' or '.join(names)}; it has {', '.join(map(str, row)) or 'none'}")
    return found
