"""The one JSON object that a reply is: where it stands, and how it may be spelt.

What is allowed around it and in it leaves one way to read it: a thought before it, one fence with words before the
fence, an end token after it; raw line breaks and tabs in strings, unescaped backslashes, a comma too many.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from dno_jax.annotation.question import Unparsable
from dno_jax.reasoning import split_thought

_TICKS = "```"
_INFO = re.compile(r"[ \t]*[\w+.-]*\s*")  # what follows a fence's ticks: json, JSON, nothing; glued to the object, too
_OPENS_OBJECT = re.compile(r"\{\s*\"")
_END_TOKEN = re.compile(r"(?:<\|[\w.-]{1,30}\|>|</s>|<eos>|<end_of_turn>)\Z")
_ESCAPE = re.compile(r"\\([\"\\/bfnrt]|u[0-9a-fA-F]{4})|\\")
_COMMA_TOO_MANY = re.compile(r",(?=\s*[}\]])")


def read_object(reply: str) -> tuple[dict[str, Any], str]:
    """Read the one JSON object of a reply.

    Returns:
        The object, its keys in lower case and without blanks around them, and the text that it was read from.

    Raises:
        Unparsable: there is none, or more than one way to find one.
    """
    reason = ""
    for text in _places(reply):
        try:
            found = _parsed(text)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
            reason = reason or str(error)
            continue
        if not isinstance(found, dict):
            raise Unparsable(f"expected a JSON object, got {type(found).__name__}")
        return found, text
    raise Unparsable(f"not one JSON object: {'it ends inside a thought' if _is_cut(reply) else reason}")


def _places(reply: str) -> Iterator[str]:
    """Where the object may stand: a reply that is one as it is holds no thought, whatever its strings say."""
    for text in dict.fromkeys((reply, split_thought(reply).answer)):
        text = text.strip(" \t\r\n\ufeff")
        while end := _END_TOKEN.search(text, max(0, len(text) - 40)):
            text = text[: end.start()].rstrip()
        yield text
        before, ticks, rest = text.partition(_TICKS)
        if ticks and rest.endswith(_TICKS) and not _OPENS_OBJECT.search(before):
            inside = rest.strip("`")
            yield inside[_INFO.match(inside).end() :].rstrip()  # pyright: ignore[reportOptionalMemberAccess]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, strict=False, object_pairs_hook=_no_key_twice)
    except ValueError:
        escaped = _ESCAPE.sub(lambda found: found[0] if found[1] else r"\\", text)
        mended = _COMMA_TOO_MANY.sub("", escaped)  # of strings it changes justifications only, which nobody reads
        if mended == text:
            raise
        return json.loads(mended, strict=False, object_pairs_hook=_no_key_twice)


def _is_cut(reply: str) -> bool:
    return not split_thought(reply).whole


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {key.strip().lower(): value for key, value in pairs}
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
