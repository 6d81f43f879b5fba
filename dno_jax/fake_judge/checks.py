"""What an endpoint refuses before a model sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from aiohttp import web

from dno_jax.display import is_text
from dno_jax.fake_judge.behaviour import Behaviour


class ApiError(Exception):
    """An error in the API's words: its HTTP status, the body that says so, and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}
        self.headers = headers

    def response(self) -> web.Response:
        return web.json_response(self.body, status=self.status, headers=self.headers)


def check(body: Any, *, behaviour: Behaviour) -> None:
    """Check a chat.completions request as the API does.

    Raises:
        ApiError: if it may not pass.
    """
    if not isinstance(body, dict) or not _is_text(body):
        raise ApiError(400, "We could not parse the JSON body of your request.")
    model, messages = body.get("model"), body.get("messages")
    if not isinstance(model, str) or not model:
        raise ApiError(400, "you must provide a model parameter", param="model")
    if behaviour.models and model not in behaviour.models:
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise ApiError(404, message, "model_not_found", "model")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ApiError(400, "Invalid 'messages': expected objects with content.", "invalid_type", "messages")
    for name in (*behaviour.refused_fields, "stream"):
        if body.get(name):
            raise ApiError(400, f"Unsupported parameter: '{name}'.", "unsupported_parameter", name)
    for name, low, high in (("n", 1, 128), ("top_logprobs", 0, 20), ("max_tokens", 1, 10**9)):
        value = body.get(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise ApiError(400, f"Invalid '{name}': expected an integer from {low} to {high}.", "invalid_value", name)
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise ApiError(400, "'top_logprobs' is only allowed when 'logprobs' is enabled.", None, "top_logprobs")
    _check_format(body.get("response_format"))


def _is_text(body: dict[str, Any]) -> bool:
    """Whether UTF-8 can say all of it: JSON may spell halves of surrogate pairs."""
    try:
        return is_text(json.dumps(body, ensure_ascii=False))
    except RecursionError:
        return False


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(isinstance(part, dict) for part in content))


def _check_format(response_format: Any) -> None:
    if response_format in (None, {"type": "text"}, {"type": "json_object"}):
        return
    place = "response_format"
    given = response_format if isinstance(response_format, dict) else {}
    asked = given.get("json_schema")
    if given.get("type") != "json_schema" or not isinstance(asked, dict):
        raise ApiError(400, f"Invalid value: '{place}'.", "invalid_value", place)
    if not isinstance(asked.get("name"), str) or not isinstance(asked.get("schema"), dict):
        raise ApiError(400, f"Missing required parameter: '{place}.json_schema'.", "missing_required_parameter", place)
    for problem in _strict_problems(asked["schema"]) if asked.get("strict") else ():
        raise ApiError(400, f"Invalid schema for {place} '{asked['name']}': {problem}", "invalid_json_schema", place)


def _strict_problems(schema: Any) -> Iterator[str]:
    """What strict mode does not take: an object whose fields are not all required, or that may have others."""
    if not isinstance(schema, Mapping):
        return
    if schema.get("type") == "object":
        if schema.get("additionalProperties") is not False:
            yield "'additionalProperties' is required to be supplied and to be false."
        if set(schema.get("required", ())) != set(schema.get("properties", {})):
            yield "'required' is required to be supplied and to be an array including every key in properties."
    below = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values(), *schema.get("anyOf", ())]
    for part in [*below, schema.get("items")]:
        yield from _strict_problems(part)
