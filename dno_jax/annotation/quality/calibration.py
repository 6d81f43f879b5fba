"""Labelled pairs that a judge is compared with: JSONL of {prompt, first, second, preference}."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dno_jax.addresses import Purpose, rng
from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.errors import DnoError
from dno_jax.files import read_lines
from dno_jax.records import Message, Prompt, explain


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | tuple[Message, ...]
    first: str
    second: str
    preference: float = Field(ge=0.0, le=1.0, strict=True)


def read_calibration(path: str | os.PathLike[str], *, limit: int, seed: int) -> list[tuple[Pool, float]]:
    """Read labelled pairs, and draw `limit` of them where there are more: the same for the same seed and file.

    Args:
        path: JSONL; `prompt` is the user's message or a list of messages, `preference` people's P(first beats second).

    Returns:
        pools of two, {"calibration/<line>/first", "calibration/<line>/second"}, with their labels, in the file's order.

    Raises:
        DnoError: no such file, no rows, or a row that is malformed (file and line named).
    """
    try:
        lines = read_lines(path)
        rows = [_labelled(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DnoError(
            f"annotation.quality.calibration: {path}: cannot be read ({error}); expected a JSONL file of "
            "{prompt, first, second, preference}"
        ) from None
    if not rows:
        raise DnoError(f"{path}: holds no labelled pairs; expected one {{prompt, first, second, preference}} per line")
    drawn = rng(Purpose.CALIBRATION, seed).permutation(len(rows))[:limit]
    return [rows[index] for index in sorted(drawn)]


def _labelled(line: str, number: int, path: str | os.PathLike[str]) -> tuple[Pool, float]:
    name = f"calibration/{number}"
    try:
        row = _Row.model_validate_json(line)
        messages = (Message(role="user", content=row.prompt),) if isinstance(row.prompt, str) else row.prompt
        prompt = Prompt(prompt_id=name, messages=messages)
    except ValidationError as error:
        raise DnoError(
            f"{path}:{number}: not a valid labelled pair: {explain(error)}; expected prompt (a text or messages), "
            "first, second (texts) and preference (P(first beats second), a number from 0 to 1)"
        ) from None
    candidates = (Candidate(f"{name}/first", row.first), Candidate(f"{name}/second", row.second))
    return Pool(prompt, candidates), row.preference
