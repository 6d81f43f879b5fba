"""Chat completions as they are asked for and as they come: one reading, whether live or from a batch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from dno_jax.annotation.question import Reply

_MAX_TOKENS = 2**31  # a count above it is none


def with_schema(body: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request whose reply has to follow a JSON schema."""
    form = {"name": "verdict", "strict": True, "schema": schema}
    return {**body, "response_format": {"type": "json_schema", "json_schema": form}}


def read_completion(text: str) -> Reply | None:
    """Read the body of a 200; None if it is anything but a chat completion."""
    try:
        return completion_reply(json.loads(text))
    except (ValueError, RecursionError):
        return None


def completion_reply(body: Any) -> Reply | None:
    """Read a chat completion's JSON; None if it is none."""
    try:
        chosen = body["choices"][0]
        content, refusal = chosen["message"].get("content"), chosen["message"].get("refusal")
        reasoning = chosen["message"].get("reasoning_content") or chosen["message"].get("reasoning")
        finish, (tokens_in, tokens_out) = chosen.get("finish_reason"), _usage(body.get("usage"))
        if not (isinstance(content, str | None) and isinstance(refusal, str | None) and isinstance(finish, str | None)):
            return None
        return Reply(
            text=None if content is None else _encodable(content),
            finish=finish,
            refusal=_encodable(refusal) if refusal else None,
            model=_encodable(str(body.get("model") or "")),
            first_logprobs=_first_logprobs(chosen.get("logprobs")),
            reasoning=_encodable(reasoning) if isinstance(reasoning, str) else None,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
        )
    except (LookupError, TypeError, AttributeError):
        return None


def _first_logprobs(logprobs: Any) -> dict[str, float] | None:
    """Return the likeliest first tokens, the one drawn included; None where there are none or one is no number."""
    try:
        first = logprobs["content"][0]
        found: dict[str, float] = {}
        for entry in [*(first.get("top_logprobs") or ()), first]:
            token, value = entry["token"], entry["logprob"]
            if not isinstance(token, str) or isinstance(value, bool) or math.isnan(value):
                return None
            found.setdefault(token, float(value))  # pieces of a character look alike: the likeliest stands first
        return found
    except (LookupError, TypeError, AttributeError, OverflowError):
        return None


def _usage(stated: Any) -> tuple[int, int]:
    """Return tokens in and out, (0, 0) where they are not stated: half of a statement says nothing of the other half.

    Some endpoints leave the tokens of reasoning out of `completion_tokens`, but not out of the total.
    """
    stated = stated if isinstance(stated, Mapping) else {}
    prompt, completion, total = (_count(stated.get(f"{part}_tokens")) for part in ("prompt", "completion", "total"))
    if prompt is None or (completion is None and total is None):
        return 0, 0
    return prompt, max(completion or 0, (total or 0) - prompt)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value <= _MAX_TOKENS else None


def _encodable(text: str) -> str:
    """Replace what JSON may hold and no file: halves of surrogate pairs."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
