"""What the judge says: chat completions, verdicts in each form, and the ways to spoil them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dno_jax.fake_judge.behaviour import Behaviour
from dno_jax.fake_judge.preference import Scorer, first_probability, first_wins, given_points, true_points
from dno_jax.fake_judge.reading import Asked, message_text
from dno_jax.fake_judge.teacher import teach

REFUSAL = "I cannot help with that."
_CHARACTERS_A_TOKEN = 4
_CLEAR = 2.0  # points apart, from which one is "much better"
_UNLIKELY = -9999.0  # the API's word for a probability of nothing
_OTHER_WORDS = 'The Both I Model Output ** # It - Neither ( " ` As Answer ='
_OTHER_TOKENS = ("\n", " ", *_OTHER_WORDS.split())

_UNANSWERED: dict[str, dict[str, Any]] = {
    "refusal": {"content": None, "refusal": REFUSAL},
    "filter": {"content": ""},
    "null": {"content": None},
    "empty": {"content": ""},
}
"""What a message says by outcome, where that is no answer."""


def count_tokens(text: str) -> int:
    return -(-len(text) // _CHARACTERS_A_TOKEN)


def count_prompt_tokens(body: Mapping[str, Any]) -> int:
    """Estimate from lengths; a message costs four more, as chat templates do."""
    return sum(4 + count_tokens(message_text(message)) for message in body["messages"])


def opinion_name(body: Mapping[str, Any]) -> str:
    """What an opinion is drawn by: all that the model is shown."""
    return "\x1f".join(message_text(message) for message in body["messages"])


def token_limit(body: Mapping[str, Any]) -> int | None:
    return body.get("max_completion_tokens") or body.get("max_tokens")


def complete(
    body: Mapping[str, Any],
    asked: Asked,
    *,
    outcome: str,
    behaviour: Behaviour,
    scorer: Scorer | None,
    completion_id: str,
) -> dict[str, Any]:
    """Answer a request, as the outcome says."""
    # Every draw goes by what is asked, so that another try, or another way to ask it, finds the same opinion.
    name = f"{opinion_name(body)}\x1f{body.get('seed')}"
    choices = []
    spent = 0
    for index in range(body.get("n") or 1):
        text, top = _say(asked, body, outcome=outcome, behaviour=behaviour, scorer=scorer, name=f"{name} {index}")
        cut = token_limit(body)
        finish = "content_filter" if outcome == "filter" else "stop"
        if outcome == "length":
            text, finish = text[:40], "length"
        elif outcome not in _UNANSWERED and cut is not None and count_tokens(text) >= cut:  # its end is a token, too
            text, finish = text[: _CHARACTERS_A_TOKEN * cut], "length"
        message = {"role": "assistant", "content": text, "refusal": None, **_UNANSWERED.get(outcome, {})}
        said = message["content"] or ""
        spent += count_tokens(message["refusal"] or said)
        logprobs = {"content": _logprobs(said, top), "refusal": None} if body.get("logprobs") and top != () else None
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
    prompt_tokens = count_prompt_tokens(body)
    return {
        "id": completion_id,
        "object": "chat.completion",
        "created": 0,
        "model": f"{body['model']}-2000-01-01",
        "choices": [] if outcome == "no_choices" else choices,
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": spent, "total_tokens": prompt_tokens + spent},
        "system_fingerprint": "fp_planted",
    }


_Top = Sequence[tuple[str, float]] | None  # the first token's likeliest ones; () where none are given


def _say(
    asked: Asked, body: Mapping[str, Any], *, outcome: str, behaviour: Behaviour, scorer: Scorer | None, name: str
) -> tuple[str, _Top]:
    if asked.form == "probe":
        return asked.prompt, None
    if asked.form == "chat":
        return teach(asked.prompt, behaviour=behaviour, name=name), None
    if outcome == "garbage" or (outcome, asked.form) == ("malformed", "token"):
        return "The best one is clearly number 1, 6/6.", None
    if outcome == "echo":
        return "I was shown: " + " | ".join(asked.candidates), None
    points = true_points(asked, behaviour=behaviour, scorer=scorer)
    if asked.form == "token":
        first = first_probability(points, behaviour=behaviour, name=name)
        top = _first_tokens(asked.names, first, outcome=outcome, count=body.get("top_logprobs") or 0)
        return top[0][0], () if outcome == "too_few" else top
    if asked.form == "pairwise":
        clearly = "" if not asked.five_way else " much better" if abs(points[0] - points[1]) >= _CLEAR else " better"
        verdict = _pair_verdict(first_wins(points, behaviour=behaviour, name=name), outcome, clearly=clearly)
    else:
        verdict = _list_verdict(given_points(points, asked, behaviour=behaviour, name=name), asked, outcome)
    text = json.dumps(verdict)
    return text[: len(text) * 2 // 3] if outcome == "malformed" else text, None


def _list_verdict(points: list[int], asked: Asked, outcome: str) -> dict[str, Any]:
    if outcome == "too_few":
        points = points[:-1]
    elif outcome == "too_many":
        points = [*points, asked.high]
    elif outcome == "out_of_range":
        points = [*points[:-1], asked.high + 1]
    first = 0 if outcome == "wrong_ids" else 1
    return {str(n): {"justification": "as planted", "score": one} for n, one in enumerate(points, start=first)}


def _pair_verdict(first_wins: float, outcome: str, *, clearly: str) -> dict[str, Any]:
    verdict = {1.0: f"first{clearly}", 0.0: f"second{clearly}", 0.5: "tie"}[first_wins]
    said = {"justification": "as planted", "verdict": verdict}
    if outcome == "too_few":
        del said["verdict"]
    elif outcome == "too_many":
        said["verdict 2"] = verdict
    elif outcome == "out_of_range":
        said["verdict"] = "both"
    elif outcome == "wrong_ids":
        said["winner"] = said.pop("verdict")
    return said


def _first_tokens(names: Sequence[str], first: float, *, outcome: str, count: int) -> list[tuple[str, float]]:
    """Token and log-probability, the likeliest first; a thousandth is left to the tokens that nobody asked for."""
    named = dict(zip(names, (first, 1.0 - first), strict=True))
    if outcome in ("wrong_ids", "too_many"):
        named = {"".join(names): 1.0} if outcome == "too_many" else {}
    found = {token: math.log(0.999 * p) if p > 0.0 else _UNLIKELY for token, p in named.items()}
    for number, token in enumerate(_OTHER_TOKENS):
        found.setdefault(token, math.log(0.001 * 0.5 ** (number + 1)))
    top = sorted(found.items(), key=lambda item: -item[1])[: max(1, count)]
    return [(token, math.inf if outcome == "out_of_range" else logprob) for token, logprob in top]


def _logprobs(text: str, top: _Top) -> list[dict[str, Any]]:
    """Log-probabilities of a text: of each token its own, of the first the likeliest ones as well."""
    tokens = [text[start : start + _CHARACTERS_A_TOKEN] for start in range(0, len(text), _CHARACTERS_A_TOKEN)]
    entries = [{**_entry(token, -0.01), "top_logprobs": [_entry(token, -0.01)]} for token in tokens]
    if top and entries:
        entries[0] = {**_entry(*top[0]), "top_logprobs": [_entry(*one) for one in top]}
    return entries


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
