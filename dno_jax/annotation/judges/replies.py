"""The strict reading of replies: a reply has exactly the expected shape, or it is no answer.

In JSON the whole reply is the object. The schema that some endpoints take is the same shape, said more clearly; what
comes back is read no less strictly. Nothing is searched for inside other text: what a candidate wrote and the judge
quoted can never be taken for a verdict.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dno_jax.annotation.question import Reply, Unparsable

_WHOLE_FENCE = re.compile(r"```(?:json)?[ \t]*\r?\n(.*)\n[ \t]*```", re.DOTALL)
# What a model thinks aloud before it replies, as servers without a parser for it hand it on.
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_SCORE = re.compile(r"\bScore:[ \t*]*([^\s*]*)")  # judges write it bold, too
_PREFERENCES = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5)}
# Of all that AlpacaEval recorded of its judge (4,814 verdicts) the least is 0.026, the next 0.57.
_LEAST_MASS = 0.01


def numbers(count: int) -> list[str]:
    """What the candidates of a list are called, by their places."""
    return [str(number) for number in range(1, count + 1)]


def read_points(reply: str, *, count: int, scale: range) -> tuple[int, ...]:
    """Read the points of `count` candidates, in the order of presentation.

    Accepts one JSON object {"1": {"justification": str, "score": int}, ...} with exactly these keys, whitespace around
    it, and one ```json fence around the whole.

    Raises:
        Unparsable: anything else.
    """
    answer = _read_object(reply)
    expected = numbers(count)
    if set(answer) != set(expected):
        raise Unparsable(f"expected the candidates {_few(expected)}, got {_few(sorted(answer))}")
    return tuple(_points(number, answer[number], scale=scale) for number in expected)


def read_score(reply: str, *, scale: range) -> int:
    """Read the score that a reply ends with.

    A judge may repeat its score, and may quote the response: every "Score:" in the reply must give the same one, and
    the last must be the end of it, full stop and asterisks aside.

    Raises:
        Unparsable: anything else; a score out of range is none, never the nearest one within.
    """
    found = list(_SCORE.finditer(reply))
    if not found:
        raise Unparsable("no 'Score: <points>'")
    given = [match[1].removesuffix(".") for match in found]
    for text in given:
        if not re.fullmatch("-?[0-9]{1,9}", text):
            raise Unparsable(f"'Score: {_few([text])}' is no whole number")
    scores = sorted({int(text) for text in given})
    if len(scores) > 1:
        raise Unparsable(f"scores that differ: {_few([str(score) for score in scores])}")
    if reply[found[-1].end() :].strip(" \t\r\n*"):
        raise Unparsable("the reply continues after its score")
    return _within(scores[0], scale)


def read_verdict(reply: str) -> tuple[float, float]:
    """Read a verdict as (p, 1 - p), p the preference for the candidate shown first: 1, 0, or 1/2 for a tie.

    Accepts one JSON object {"justification": str, "verdict": "first" | "second" | "tie"}, whitespace around it, and one
    ```json fence around the whole.

    Raises:
        Unparsable: anything else.
    """
    answer = _read_object(reply)
    if set(answer) != {"justification", "verdict"}:
        raise Unparsable(f"expected justification and verdict, got {_few(sorted(answer))}")
    if not isinstance(answer["justification"], str):
        raise Unparsable("the justification is no string")
    verdict = answer["verdict"]
    if not isinstance(verdict, str) or verdict not in _PREFERENCES:
        raise Unparsable(f"the verdict is {_few([repr(verdict)])}, none of {', '.join(_PREFERENCES)}")
    return _PREFERENCES[verdict]


def read_tokens(first_logprobs: Mapping[str, float] | None, *, tokens: tuple[str, str]) -> tuple[float, float]:
    """Read (p, 1 - p), p = P(first token) / (P(first token) + P(second token)).

    Args:
        first_logprobs: token -> log-probability (nats) of the likeliest first tokens; one that is not among them has
            probability 0.
        tokens: what the first and the second candidate are called.

    Raises:
        Unparsable: there are none, the two have less than 1 % of the probability together, or one's is no
            log-probability. A judge that begins its reply with other words says nothing of the two: what little it
            leaves to their names is no verdict.
    """
    if first_logprobs is None:
        raise Unparsable("no log-probabilities came with the reply; form=logprob needs an endpoint that gives them")
    first, second = (first_logprobs.get(token, -math.inf) for token in tokens)
    if math.isnan(first) or math.isnan(second) or max(first, second) == math.inf:
        raise Unparsable(f"log-probabilities {first} and {second}")
    if max(first, second) == -math.inf:
        found = _few([repr(token) for token in first_logprobs])
        raise Unparsable(f"neither {tokens[0]!r} nor {tokens[1]!r} among the first tokens {found}")
    likelier = max(first, second)
    odds = [math.exp(logprob - likelier) for logprob in (first, second)]
    mass = math.exp(min(likelier, 0.0)) * sum(odds)
    if mass < _LEAST_MASS:
        raise Unparsable(
            f"{tokens[0]!r} and {tokens[1]!r} have a probability of {mass:.2g} together; a verdict needs "
            f"{_LEAST_MASS:g}"
        )
    preference = odds[0] / sum(odds)
    return preference, 1.0 - preference


def whole(parse: Callable[[str, int], Sequence[float]]) -> Callable[[Reply, Sequence[str]], tuple[float, ...]]:
    """Return a reader of replies that ended by themselves and are the judge's own.

    It raises Unparsable where the reply was cut, does not parse, or is copied from what it judges (blanks aside): a
    candidate can be a verdict word for word, and a judge that only repeats it has judged nothing.

    Args:
        parse: (text, number of texts shown) -> one number per text.
    """

    def read(reply: Reply, shown: Sequence[str]) -> tuple[float, ...]:
        if reply.finish == "length":
            raise Unparsable("the reply was cut at its longest: raise max_tokens")
        text = reply.text or ""
        scores = tuple(float(score) for score in parse(text, len(shown)))
        if any(_squeezed(_unfenced(text)) in _squeezed(candidate) for candidate in shown):
            raise Unparsable("the reply stands word for word in a text that it judges")
        return scores

    return read


def points_schema(count: int, *, scale: range) -> dict[str, Any]:
    """Return the JSON schema of what `read_points` reads."""
    # The justification comes first: a score that is written before its reasons does not follow from them.
    entry = _object_schema({"justification": {"type": "string"}, "score": {"type": "integer", "enum": list(scale)}})
    return _object_schema(dict.fromkeys(numbers(count), entry))


def _object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object of exactly these properties, as strict endpoints demand it."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


VERDICT_SCHEMA = _object_schema(
    {"justification": {"type": "string"}, "verdict": {"type": "string", "enum": list(_PREFERENCES)}}
)
"""JSON schema of what `read_verdict` reads."""


def _read_object(reply: str) -> dict[str, Any]:
    """Read one JSON object; allowed are a <think> block before it, one fence around the rest, and whitespace."""
    try:
        answer = json.loads(_unfenced(reply), object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise Unparsable(f"not one JSON object: {error}") from None
    if not isinstance(answer, dict):
        raise Unparsable(f"expected a JSON object, got {type(answer).__name__}")
    return answer


def _points(number: str, entry: Any, *, scale: range) -> int:
    if not isinstance(entry, dict) or set(entry) != {"justification", "score"}:
        raise Unparsable(f"candidate {number}: expected an object of justification and score")
    score = entry["score"]
    if not isinstance(entry["justification"], str):
        raise Unparsable(f"candidate {number}: the justification is no string")
    if type(score) is not int:  # bool is a subclass of int
        raise Unparsable(f"candidate {number}: the score is of type {type(score).__name__}, not an integer")
    return _within(score, scale, place=f"candidate {number}: ")


def _within(score: int, scale: range, *, place: str = "") -> int:
    if score not in scale:
        raise Unparsable(f"{place}score {score} is outside {scale[0]}..{scale[-1]}")
    return score


def _few(names: Sequence[str]) -> str:
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
