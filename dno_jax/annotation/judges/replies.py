"""The strict reading of replies: a reply that can be read in one way only, or it is no answer.

In JSON the reply is the object, after a thought and inside one fence at most (`objects`). The schema that some
endpoints take is the same shape, said more clearly; what comes back is read no less strictly. Nothing is searched for
inside other text: what a candidate wrote and the judge quoted can never be taken for a verdict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dno_jax.annotation.judges.objects import read_object
from dno_jax.annotation.question import Reply, Unparsable
from dno_jax.reasoning import split_thought

TOP_LOGPROBS = 5  # AlpacaEval's: as many of the likeliest first tokens are asked for
_CANDIDATE = re.compile(r"^candidate[ _-]?")
_SCORE = re.compile(r"\bScore:[ \t*]*([^\s*]*)")  # judges write it bold, too
_PREFERENCES = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5)}
FIVE = {  # Arena-Hard's
    "first much better": (1.0, 0.0),
    "first better": (0.75, 0.25),
    "tie": (0.5, 0.5),
    "second better": (0.25, 0.75),
    "second much better": (0.0, 1.0),
}
# Of all that AlpacaEval recorded of its judge (4,814 verdicts) the least is 0.026, the next 0.57.
_LEAST_MASS = 0.01
# AlpacaEval added no blank-led names, which weighed 2.3e-7 of the rest at most: its figures stay its figures.
_TRACE = math.log(1e-6)
_WHOLE = re.compile(r"-?[0-9]{1,9}(\.0{1,9})?")  # 5 and 5.0
_LED_BY = "\u0120\u010a\u2581"  # a blank and a line end as byte-level vocabularies spell them, sentencepiece's blank
_SHOWN = 80  # characters of a reply that could not be read


def numbers(count: int) -> list[str]:
    """What the candidates of a list are called, by their places."""
    return [str(number) for number in range(1, count + 1)]


def read_points(reply: str, *, count: int, scale: range) -> tuple[int, ...]:
    """Read the points of `count` candidates, in the order of presentation.

    Accepts one JSON object {"1": {"justification": str, "score": int}, ...} with exactly these keys, which may be
    led by "candidate"; a score may be spelt 5.0 or "5".

    Raises:
        Unparsable: anything else.
    """
    answer, _ = read_object(reply)
    named = {_CANDIDATE.sub("", key): entry for key, entry in answer.items()}
    expected = numbers(count)
    if set(named) != set(expected) or len(named) < len(answer):
        raise Unparsable(f"expected the candidates {_few(expected)}, got {_few(sorted(answer))}")
    return tuple(_points(number, named[number], scale=scale) for number in expected)


def read_score(reply: str, *, scale: range) -> int:
    """Read the score that a reply ends with.

    A judge may think first. It may repeat its score, and may quote the response: every "Score:" after the thought must
    give the same one, and the last must be the end of the reply, full stop and asterisks aside.

    Raises:
        Unparsable: anything else; a score out of range is none, never the nearest one within.
    """
    reply = split_thought(reply).answer
    found = list(_SCORE.finditer(reply))
    if not found:
        raise Unparsable("no 'Score: <points>'")
    given = [match[1].removesuffix(".") for match in found]
    for text in given:
        if not _WHOLE.fullmatch(text):
            raise Unparsable(f"'Score: {_few([text])}' is no whole number")
    scores = sorted({int(float(text)) for text in given})
    if len(scores) > 1:
        raise Unparsable(f"scores that differ: {_few([str(score) for score in scores])}")
    if reply[found[-1].end() :].strip(" \t\r\n*"):
        raise Unparsable("the reply continues after its score")
    return _within(scores[0], scale)


def read_verdict(reply: str, verdicts: Mapping[str, tuple[float, float]] = _PREFERENCES) -> tuple[float, float]:
    """Read a verdict as (p, 1 - p), p the preference for the candidate shown first: 1, 0, or 1/2 for a tie.

    Accepts one JSON object {"justification": str, "verdict": "first" | "second" | "tie"}, the verdict in any case.

    Args:
        verdicts: the words that there are, and what they say.

    Raises:
        Unparsable: anything else.
    """
    answer, _ = read_object(reply)
    if set(answer) != {"justification", "verdict"}:
        raise Unparsable(f"expected justification and verdict, got {_few(sorted(answer))}")
    if not isinstance(answer["justification"], str):
        raise Unparsable("the justification is no string")
    verdict = answer["verdict"]
    said = verdict.strip(" \t\r\n.*'\"").lower() if isinstance(verdict, str) else None
    if said is None or said not in verdicts:
        raise Unparsable(f"the verdict is {_few([repr(verdict)])}, none of {', '.join(verdicts)}")
    return verdicts[said]


def read_tokens(first_logprobs: Mapping[str, float] | None, *, tokens: tuple[str, str]) -> tuple[float, float]:
    """Read (p, 1 - p), p = P(first token) / (P(first token) + P(second token)).

    A name that blanks lead (" m") is the name. What is not among the likeliest tokens has probability 0, unless it
    could weigh as much as what is: a piece of either name that is not listed may be as likely as the last one listed,
    and a listed piece that only begins a name (a blank alone) may lead to either.

    Args:
        first_logprobs: token -> log-probability (nats) of the likeliest first tokens.
        tokens: what the first and the second candidate are called.

    Raises:
        Unparsable: there are none, one's is no log-probability, what is missing could weigh as much as what is seen, or
            the two have less than 1 % of the probability together. A judge that begins its reply with other words says
            nothing of the two: what little it leaves to their names is no verdict.
    """
    if first_logprobs is None:
        raise Unparsable("no log-probabilities came with the reply; form=logprob needs an endpoint that gives them")
    pieces = {token: _bare(token) for token in first_logprobs}
    named = [{piece: first_logprobs[piece] for piece, bare in pieces.items() if bare == token} for token in tokens]
    values = [value for own in named for value in own.values()]
    if any(math.isnan(value) or value == math.inf for value in values):
        raise Unparsable(f"log-probabilities {' and '.join(map(str, values))}")
    if (likelier := max(values, default=-math.inf)) == -math.inf:
        found = _few([repr(token) for token in first_logprobs])
        raise Unparsable(f"neither {tokens[0]!r} nor {tokens[1]!r} among the first tokens {found}")
    odds = [
        math.fsum(math.exp(own[piece] - likelier) for piece in own if piece == token or own[piece] > likelier + _TRACE)
        for token, own in zip(tokens, named, strict=True)
    ]
    mass = math.exp(min(likelier, 0.0)) * sum(odds)
    if mass < _LEAST_MASS:
        raise Unparsable(
            f"{tokens[0]!r} and {tokens[1]!r} have a probability of {mass:.2g} together; a verdict needs "
            f"{_LEAST_MASS:g}"
        )
    if (missing := _missing(first_logprobs, pieces, tokens=tokens)) >= mass:
        raise Unparsable(
            f"{tokens[0]!r} and {tokens[1]!r} have a probability of {mass:.2g} together, and pieces of them that are "
            f"not among the first tokens may have {missing:.2g}: each name must be one token to the judge"
        )
    preference = odds[0] / sum(odds)
    return preference, 1.0 - preference


def _missing(first_logprobs: Mapping[str, float], pieces: Mapping[str, str], *, tokens: tuple[str, str]) -> float:
    """The most that unlisted tokens of the names, bare and led by a blank, and listed beginnings of them may weigh."""
    chances = sorted((math.exp(min(value, 0.0)) for value in first_logprobs.values()), reverse=True)
    unlisted = 2 * len(tokens) - sum(bare in tokens for bare in pieces.values())
    # A token that was drawn may stand among the likeliest without being one: it bounds nothing.
    rest = min(max(unlisted, 0) * chances[:TOP_LOGPROBS][-1], max(0.0, 1.0 - math.fsum(chances)))
    begun = [token for token, bare in pieces.items() if any(name != bare and name.startswith(bare) for name in tokens)]
    return rest + math.fsum(math.exp(min(first_logprobs[token], 0.0)) for token in begun)


def _bare(token: str) -> str:
    """A token without the blanks that lead it, as text or as vocabularies spell them."""
    return token.lstrip().lstrip(_LED_BY).lstrip()


def whole(parse: Callable[[str, int], Sequence[float]]) -> Callable[[Reply, Sequence[str]], tuple[float, ...]]:
    """Return a reader of replies that ended by themselves and are the judge's own.

    It raises Unparsable, with the reply's beginning, where the reply was cut, does not parse, or is copied from what it
    judges (blanks aside): a candidate can be a verdict word for word, and a judge that only repeats it has judged
    nothing. Where a server has put the whole reply among the reasoning, it is read there.

    Args:
        parse: (text, number of texts shown) -> one number per text.
    """

    def read(reply: Reply, shown: Sequence[str]) -> tuple[float, ...]:
        if reply.finish == "length":
            raise Unparsable("the reply was cut at its longest: raise max_tokens")
        try:
            scores = tuple(float(score) for score in parse(reply.said, len(shown)))
        except Unparsable as error:
            raise Unparsable(f"{error}{_beginning(reply)}") from None
        core = _squeezed(read_object(reply.said)[1])
        if any(core in _squeezed(candidate) for candidate in shown):
            raise Unparsable("the reply stands word for word in a text that it judges")
        return scores

    return read


def read_whole_score(reply: Reply, *, scale: range) -> int:
    """Read the score of a point-wise reply; where it is none, the error shows how the reply begins."""
    try:
        return read_score(reply.text or "", scale=scale)
    except Unparsable as error:
        raise Unparsable(f"{error}{_beginning(reply)}") from None


def _beginning(reply: Reply) -> str:
    if not reply.said.strip():
        return " (the reply is empty)"
    where = " (the reply's content is empty: this stands in reasoning_content)" if reply.is_in_reasoning else ""
    return f"{where}{Unparsable.BEGINS}{reply.said[:_SHOWN]!r}"


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

FIVE_SCHEMA = _object_schema({"justification": {"type": "string"}, "verdict": {"type": "string", "enum": list(FIVE)}})


def _points(number: str, entry: Any, *, scale: range) -> int:
    if not isinstance(entry, dict) or set(entry) != {"justification", "score"}:
        raise Unparsable(f"candidate {number}: expected an object of justification and score")
    score = entry["score"]
    if not isinstance(entry["justification"], str):
        raise Unparsable(f"candidate {number}: the justification is no string")
    if (isinstance(score, str) and _WHOLE.fullmatch(score.strip())) or (type(score) is float and score.is_integer()):
        score = int(float(score))
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


def _squeezed(text: str) -> str:
    return "".join(text.split())
