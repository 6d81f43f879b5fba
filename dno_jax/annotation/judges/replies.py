"""The strict reading of replies in JSON: the whole reply is the object, or there is no answer.

The schema that some endpoints take is the same shape, said more clearly; what comes back is read no less strictly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dno_jax.annotation.question import Reply, Unparsable

_WHOLE_FENCE = re.compile(r"```(?:json)?[ \t]*\r?\n(.*)\n[ \t]*```", re.DOTALL)
# What a model thinks aloud before it replies, as servers without a parser for it hand it on.
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


def read_object(reply: str) -> dict[str, Any]:
    """Read one JSON object; allowed are a <think> block before it, one fence around the rest, and whitespace.

    Raises:
        Unparsable: anything else, a key that occurs twice included.
    """
    try:
        answer = json.loads(_unfenced(reply), object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise Unparsable(f"not one JSON object: {error}") from None
    if not isinstance(answer, dict):
        raise Unparsable(f"expected a JSON object, got {type(answer).__name__}")
    return answer


def read_whole(reply: Reply, parse: Callable[[str], Sequence[float]], *, shown: Sequence[str]) -> tuple[float, ...]:
    """Parse a reply that ended by itself and is the judge's own.

    Args:
        parse: reads its text.
        shown: the texts under judgement.

    Raises:
        Unparsable: the reply was cut, does not parse, or is copied from what it judges (blanks aside): a candidate can
            be a verdict word for word, and a judge that only repeats it has judged nothing.
    """
    if reply.finish == "length":
        raise Unparsable("the reply was cut at its longest: raise max_tokens")
    text = reply.text or ""
    scores = tuple(float(score) for score in parse(text))
    if any(_squeezed(_unfenced(text)) in _squeezed(candidate) for candidate in shown):
        raise Unparsable("the reply stands word for word in a text that it judges")
    return scores


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object of exactly these properties, as strict endpoints demand it."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def few(names: Sequence[str]) -> str:
    """List some names, shortened."""
    shown = [name if len(name) <= 16 else name[:13] + "..." for name in names[:8]]
    return ", ".join(shown) + (", ..." if len(names) > 8 else "") if names else "none"


def _unfenced(reply: str) -> str:
    if thought := _THOUGHT.match(reply):
        reply = reply[thought.end() :]
    fenced = _WHOLE_FENCE.fullmatch(reply.strip())
    return fenced[1] if fenced else reply


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
