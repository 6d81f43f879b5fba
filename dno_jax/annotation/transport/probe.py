"""What an endpoint takes and offers, found out by small requests with the real ones' parameters."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dno_jax.annotation.question import Reply
from dno_jax.annotation.transport.completion import read_response, with_schema
from dno_jax.config import ChatSection, OpenAISection
from dno_jax.endpoint import Endpoint, EndpointError, GaveUp, Trouble, retried

_LOG = logging.getLogger(__name__)

MESSAGES = [{"role": "user", "content": "Reply with the one word: ready"}]
_SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string"}},
    "required": ["word"],
    "additionalProperties": False,
}
_REMEDIES = {
    "temperature": "set {place}.temperature=null",
    "top_p": "set {place}.top_p=null",
    "max_tokens": "set {place}.max_tokens_field=max_completion_tokens, or a smaller {place}.max_tokens",
    "max_completion_tokens": "set {place}.max_tokens_field=max_tokens, or a smaller {place}.max_tokens",
    "logprobs": "choose a model that gives log-probabilities, or set {place}.form=pairwise",
    "response_format": "set {place}.structured=none",
}


Sending = Callable[[], Awaitable[Reply | Trouble]]
Pay = Callable[[Mapping[str, Any], Sending], Awaitable[Reply | Trouble]]
"""Sends a request, whose body it is given, within somebody's budget."""


async def nobody_pays(body: Mapping[str, Any], send: Sending) -> Reply | Trouble:
    """Send a request that costs nothing."""
    return await send()


@dataclass(frozen=True)
class Capabilities:
    """What an endpoint offers for a model.

    Attributes:
        seed: it takes one; where it does not, none is sent.
        json_schema: schemas are sent: it takes them, and the configuration has nothing against it.
    """

    seed: bool = True
    json_schema: bool = False


async def probe(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    *,
    section: ChatSection,
    place: str,
    schema: Mapping[str, Any] | None = None,
    pay: Pay = nobody_pays,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Capabilities | Trouble:
    """Find out what an endpoint offers; a `Trouble` says that it does not answer now.

    Args:
        body: of a real request; its messages are replaced by a few words.
        place: the section of the configuration that remedies name.
        schema: that the real request would be sent with: some take schemas, and not every one.
        pay: sends each request, or raises what it likes where there is no money for it.
        pause: waits between tries, or raises what it likes where none is to follow.

    Raises:
        EndpointError: the endpoint does not take a parameter of the real requests, or does not give what they need.
    """
    body = {**body, "messages": MESSAGES}
    asked = _Asked(endpoint, section, pay=pay, pause=pause)
    plain = await asked.once(body)
    takes_seed = not (isinstance(plain, Trouble) and _culprit(plain, body) == "seed")
    if isinstance(plain, Trouble) and not takes_seed:
        _LOG.warning("%s takes no seed and is sent none (%s): its replies are less reproducible, and no less valid",
                     endpoint.who, plain.detail)  # fmt: skip
        del body["seed"]
        plain = await asked.once(body)
    if isinstance(plain, Trouble):
        if plain.then == "give up" and not plain.asks_for_a_pause:
            raise EndpointError(_explained(endpoint, plain, body, place=place), status=plain.status or 0)
        return plain
    if body.get("logprobs") and not plain.first_logprobs:
        remedy = _REMEDIES["logprobs"].format(place=place)
        raise EndpointError(f"{endpoint.who} at {endpoint.url} gives no log-probabilities; {remedy}", status=200)
    structured = section.structured if isinstance(section, OpenAISection) else "none"
    by_schema = with_schema(body, schema or _SCHEMA)
    taken = await asked.again(by_schema) if structured != "none" else None
    if isinstance(taken, Trouble) and taken.asks_for_a_pause:
        return taken
    if structured == "json_schema" and isinstance(taken, Trouble):
        raise EndpointError(_explained(endpoint, taken, by_schema, place=place), status=taken.status or 0)
    offers = Capabilities(seed=takes_seed, json_schema=isinstance(taken, Reply))
    _LOG.info("%s at %s: %s", endpoint.who, endpoint.url, offers)
    return offers


class _Asked:
    """An endpoint, and who pays for asking it."""

    def __init__(
        self, endpoint: Endpoint, section: ChatSection, *, pay: Pay, pause: Callable[[float], Awaitable[None]]
    ):
        self._endpoint = endpoint
        self._section = section
        self._pay = pay
        self._pause = pause

    async def once(self, body: Mapping[str, Any]) -> Reply | Trouble:
        async def send() -> Reply | Trouble:
            response = await self._endpoint.post("/chat/completions", body)
            if isinstance(response, Trouble):
                return response
            return read_response(response, endpoint=self._endpoint)

        return await self._pay(body, send)

    async def again(self, body: Mapping[str, Any]) -> Reply | Trouble:
        """Ask for more than an answered request did, until the answer is no accident of the moment."""

        async def attempt() -> Reply | Trouble:
            try:
                return await self.once(body)
            except EndpointError as error:  # some say 404 for what no model of theirs offers
                return Trouble(str(error), then="give up", status=error.status)

        tries = self._section.max_tries
        found = await retried(
            attempt,
            who=self._endpoint.who,
            max_tries=tries,
            min_tries=tries,
            max_outage=self._section.max_outage,
            pause=self._pause,
        )
        return found.trouble if isinstance(found, GaveUp) else found


def _culprit(trouble: Trouble, body: Mapping[str, Any]) -> str | None:
    """Return the field of a request that an endpoint names in its refusal."""
    if trouble.then != "give up":
        return None
    if trouble.parameter in body:
        return trouble.parameter
    # Endpoints other than OpenAI's have no `param`, but name the field in their message, the culprit first.
    fields = [name for name in body if name in _REMEDIES or name == "seed"]
    found = re.search(rf"\b({'|'.join(fields)})\b", trouble.detail) if fields else None
    return found[1] if found else None


def _explained(endpoint: Endpoint, trouble: Trouble, body: Mapping[str, Any], *, place: str) -> str:
    remedy = _REMEDIES.get(_culprit(trouble, body) or "", "fix {place} (model, temperature, max_tokens, extra_body)")
    return f"{endpoint.who} at {endpoint.url} does not take a request: {trouble.detail}; {remedy.format(place=place)}"
