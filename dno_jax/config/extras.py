"""What a request to an endpoint holds besides its question: fields, headers and a query that a provider wants."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from dno_jax.config.base import COSTS, JUDGED, Section
from dno_jax.keys import may_be_secret, split_query

# Fields of a request that this program writes itself, with the field of the configuration that decides them.
_OWN = {
    "model": "model",
    "messages": None,
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens_field",
    "temperature": "temperature",
    "top_p": None,
    "seed": "send_seed",
    "response_format": "structured",
    "logprobs": "form",
    "top_logprobs": "form",
    "n": None,
    "stream": None,
    "stream_options": None,
}
# What names the asker, and changes no answer.
_NEUTRAL_FIELDS = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
                   "service_tier", "trace", "session_id"}  # fmt: skip
_NEUTRAL_HEADERS = {"user-agent", "referer", "http-referer", "x-title", "x-request-id", "traceparent", "tracestate",
                    "openai-organization", "openai-project", "accept", "accept-language", "cookie"}  # fmt: skip


class JsonObject(dict[str, Any]):
    """A mapping of JSON that can be a part of a section, which is compared and hashed."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(json.dumps(self, sort_keys=True))


def _body(fields: dict[str, Any]) -> JsonObject:
    for name in fields:
        if name in _OWN:
            remedy = f"set {_OWN[name]} instead" if _OWN[name] else "leave it out"
            raise ValueError(f"{name!r} is written by this program; {remedy}")
    try:
        json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"not JSON ({error}); quote dates, and give numbers that are finite") from None
    return JsonObject(fields)


def _without_secrets(fields: dict[str, str]) -> JsonObject:
    for name, value in fields.items():
        if may_be_secret(name, value):  # and is not shown
            raise ValueError(
                f"{name!r} may hold a key, which would be written into files; put it into an environment variable, "
                f"and write its name here: {name}: $NAME"
            )
        if not (name.isascii() and value.isascii() and (name + value).isprintable() and name.strip() == name != ""):
            raise ValueError(f"{name!r}: a name or value with characters that no header or query takes")
    return JsonObject(fields)


ExtraBody = Annotated[dict[str, Any], AfterValidator(_body)]
ExtraStrings = Annotated[dict[str, str], AfterValidator(_without_secrets)]


class AddressExtras(Section):
    """Headers and a query of one address."""

    extra_headers: ExtraStrings = Field(
        default=JsonObject(), description="$NAME in a value is read from the environment", json_schema_extra=COSTS
    )
    extra_query: ExtraStrings = Field(
        default=JsonObject(), description="further fields of each URL", json_schema_extra=COSTS
    )


class Extras(Section):
    """What is sent with every request to a model."""

    extra_body: ExtraBody = Field(
        default=JsonObject(),
        description="further fields of each request, as a provider wants them ({reasoning_effort: low}, "
        "{chat_template_kwargs: {enable_thinking: false}}); part of what a verdict is stored under",
        json_schema_extra=JUDGED,
    )
    extra_headers: ExtraStrings = Field(
        default=JsonObject(),
        description="further headers; $NAME in a value is read from the environment and kept secret",
        json_schema_extra=JUDGED,
    )
    extra_query: ExtraStrings = Field(
        default=JsonObject(), description="further fields of each URL ({api-version: ...})", json_schema_extra=JUDGED
    )

    def told(self, base_url: str | None) -> dict[str, Any]:
        """What of this can change an answer, and is part of what it is stored under; empty where nothing is."""
        headers = {name.lower(): value for name, value in self.extra_headers.items() if "$" not in value}
        found = {
            "body": {name: value for name, value in self.extra_body.items() if name not in _NEUTRAL_FIELDS},
            "headers": {name: value for name, value in headers.items() if name not in _NEUTRAL_HEADERS},
            "query": {**split_query(base_url or "")[1], **self.extra_query},
        }
        return {name: fields for name, fields in found.items() if fields}
