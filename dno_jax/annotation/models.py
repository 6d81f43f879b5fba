"""Whether the model that a server names is the one that was asked for."""

from __future__ import annotations

import re

# What may follow a name without making it another model's: a date or a version, a precision, a price.
_SUFFIX = re.compile(
    r"(?:[-@:._ ](?:\d{4}-\d{2}-\d{2}|\d{2,8}|v\d[\d.]*|latest|preview|exp|stable|free|instruct|chat"
    r"|b?fp?\d{1,2}|int\d|q\d\w*|awq|gptq|gguf|mlx|turbo))+"
)


def is_another(asked: str, answered: str) -> bool:
    """Return whether a reply comes from another model; a server that names none is believed.

    Paths before a name and dates, versions and precisions after it are passed over.
    """
    first, second = (_bare(name) for name in (asked, answered))
    if not second or first == second:
        return False
    short, long = sorted((first, second), key=len)
    return not (long.startswith(short) and _SUFFIX.fullmatch(long[len(short) :]))


def _bare(name: str) -> str:
    return name.strip().lower().rstrip("/").rsplit("/", 1)[-1].removesuffix("-latest").removesuffix(":latest")
