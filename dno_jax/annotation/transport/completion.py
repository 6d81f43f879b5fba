"""Chat completions as they are asked for and as they come: one reading, whether live or from a batch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from dno_jax.annotation.question import Reply
from dno_jax.endpoint import Endpoint, Response
from dno_jax.faults import Fault, Trouble

_LONGEST_NAME = 200  # characters of what names a model or an end
_MAX_TOKENS = 2**31  # a count above it is none
# How servers spell the ends of a reply that are not OpenAI's words.
_LENGTH = {"max_tokens", "max_output_tokens", "max_length", "model_length", "token_limit", "incomplete"}
_FILTERED = {"safety", "prohibited_content", "recitation", "blocklist", "spii", "sensitive", "refusal",
             "guardrail_intervened", "image_safety"}  # fmt: skip
_BROKEN = {"error", "abort", "aborted", "cancelled", "canceled", "failed", "timeout", "network_error",
           "insufficient_system_resource", "other"}  # fmt: skip
BROKEN = "error"
"""The finish of a reply that the server, or one behind it, broke off."""
BROKEN_OFF = "the reply was broken off by the server or one behind it"


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


def read_response(response: Response, *, endpoint: Endpoint) -> Reply | Trouble:
    """Read the answer to a request for a completion: gateways put the errors of those behind them into a 200.

    Raises:
        EndpointError: the error in it is one of every request.
    """
    reply = read_completion(response.text)
    if reply is not None:
        return reply
    try:
        body = json.loads(response.text)
    except (ValueError, RecursionError):
        body = None
    fault = Fault(body)
    if not isinstance(body, dict) or "error" not in body or "choices" in body or fault.status is None:
        return Trouble(f"HTTP 200 without a chat completion: {endpoint.words(response.text)}")
    return endpoint.raised(endpoint.trouble(fault.status, body, headers=response.headers))


def completion_reply(body: Any) -> Reply | None:
    """Read a chat completion's JSON; None if it is none."""
    try:
        chosen = body["choices"][0]
        message = chosen["message"]
        content, refusal = _joined(message.get("content")), message.get("refusal")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(chosen.get("error"), dict):
            chosen = {**chosen, "finish_reason": BROKEN}
        finish, (tokens_in, tokens_out) = chosen.get("finish_reason"), _usage(body.get("usage"))
        if not (isinstance(content, str | None) and isinstance(refusal, str | None) and isinstance(finish, str | None)):
            return None
        return Reply(
            text=None if content is None else _encodable(content),
            finish=None if finish is None else _finish(_encodable(finish)),
            refusal=_encodable(refusal) if refusal else None,
            model=_encodable(str(body.get("model") or "")[:_LONGEST_NAME]),
            first_logprobs=_first_logprobs(chosen.get("logprobs")),
            reasoning=_encodable(reasoning) if isinstance(reasoning, str) else None,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
        )
    except (LookupError, TypeError, AttributeError):
        return None


def _joined(content: Any) -> Any:
    """Join the texts of a content that comes in parts; what the model thought is no part of it."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    kinds = [str(part.get("type", "text")) for part in content]
    if not set(kinds) <= {"text", "output_text", "thinking", "reasoning", "redacted_thinking"}:
        return content
    texts = [part["text"] for part, kind in zip(content, kinds, strict=True) if kind in ("text", "output_text")]
    return "".join(texts)


def _finish(said: str) -> str:
    """Return how a reply ended, in OpenAI's words where it has one."""
    name = said.strip().lower()
    if name in _LENGTH:
        return "length"
    if name in _FILTERED or name.startswith(("content_filter", "content filter")):
        return "content_filter"
    return BROKEN if name in _BROKEN else name[:_LONGEST_NAME]


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
