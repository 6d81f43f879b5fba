"""The client of one model: it sends its requests, one try at a time.

Retries are the caller's, who counts them: nothing here sends a request twice that an endpoint may have charged for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dno_jax.annotation.question import Reply
from dno_jax.annotation.transport.completion import read_response, with_schema
from dno_jax.annotation.transport.probe import MESSAGES, Capabilities, Pay, nobody_pays, probe
from dno_jax.annotation.transport.routes import Route, Routes, Unreachable
from dno_jax.config import ChatSection, OpenAISection
from dno_jax.endpoint import Endpoint, EndpointError, GaveUp, Trouble, retried
from dno_jax.errors import DnoError

_LOG = logging.getLogger(__name__)

DEFAULT_URL = "https://api.openai.com/v1"


class EndpointClient:
    """Sends requests to one model, at whichever of its endpoints answers. One client serves one event loop.

    Args:
        who: as in "the judge 'gpt' at http://... answered HTTP 500".
        place: the section of the configuration that remedies name.

    Raises:
        DnoError: a missing key, an unusable URL. Nothing is sent yet.
    """

    def __init__(self, section: ChatSection, *, who: str, place: str):
        self.section = section
        self.who = who
        self.place = place
        url = section.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
        more = {f"{place}.more_endpoints.{number}": own for number, own in enumerate(section.more_endpoints)}
        endpoints = [
            Endpoint(
                who=who,
                place=place,
                address=address,
                url=own.base_url or url,
                api_key_env=own.api_key_env,
                timeout=section.timeout,
                headers=own.extra_headers,
                query=own.extra_query,
            )
            for address, own in {place: section, **more}.items()
        ]
        self._routes = Routes(endpoints, section, who=who, place=place)

    @property
    def endpoint(self) -> Endpoint:
        """The preferred one of those that have answered; before any has, of those in service."""
        return self._best.endpoint

    @property
    def offers(self) -> Capabilities | None:
        """What that endpoint offers; None until it has answered."""
        return self._best.offers

    @property
    def _best(self) -> Route:
        in_service = self._routes.in_service
        return next((route for route in in_service if route.offers is not None), in_service[0])

    def at(self, url: str) -> Endpoint | None:
        """The endpoint of an address, in service or not; None where the configuration has none such."""
        return next((route.endpoint for route in self._routes.all if route.endpoint.url == url), None)

    @property
    def answered(self) -> int:
        """How many requests have been answered, by whichever endpoint."""
        return sum(route.answered for route in self._routes.all)

    async def probe(
        self,
        body: Mapping[str, Any],
        *,
        schema: Mapping[str, Any] | None = None,
        pay: Pay = nobody_pays,
        patient: bool = True,
    ) -> Capabilities:
        """Send small requests with the very parameters of the real ones, and note what the endpoint offers.

        Args:
            body: of a real request; its messages are replaced by a few words.
            schema: of the real request's reply.
            pay: sends each of them.
            patient: wait up to `max_outage` for endpoints that say that they are busy or have failed.

        Returns:
            What the first endpoint that answers offers. The others are probed when they are first used.

        Raises:
            Unreachable: no endpoint answers, in `max_tries` rounds or for `max_outage` seconds.
            DnoError: each endpoint refuses the key, the model or a parameter, or lacks what the configuration needs; or
                what `stop` was told.
        """
        async with self._routes.queue:
            section, pause = self.section, self._routes.stopped.pause
            found = await retried(
                lambda: self._introduce_one(body, schema, pay),
                who=self.who,
                max_tries=section.max_tries,
                max_outage=section.max_outage,
                pause=pause,
                is_free=lambda trouble: patient and (trouble.asks_for_a_pause or trouble.is_the_servers),
            )
        if isinstance(found, GaveUp):
            raise Unreachable(self._routes.no_answer(f"in {found.tries} tries"))
        return found

    async def send(
        self,
        body: Mapping[str, Any],
        *,
        schema: Mapping[str, Any] | None = None,
        tokens: int = 0,
        pay: Pay = nobody_pays,
    ) -> Reply | Trouble:
        """Send one request when its turn has come: one try, which may end in a `Trouble`.

        An attempt that did not reach an endpoint is no try, and is made again. Where a reply contains a key of ours, it
        is taken out.

        Args:
            body: the chat.completions request. A seed is left out where the endpoint takes none.
            schema: of the reply; sent where the endpoint takes one.
            tokens: what the request is expected to use, prompt and reply, for limits of tokens per minute.
            pay: sends the small requests by which an endpoint is got to know that is used for the first time.

        Raises:
            Unreachable: no endpoint has answered for `max_outage` seconds.
            DnoError: no request of this configuration can succeed, at any endpoint; or what `stop` was told.
        """
        refusals: dict[Route, EndpointError] = {}  # that may be meant for this request alone
        while True:
            turn = await self._routes.turn(
                tokens, introduce=lambda route: self._introduce(route, body, schema, pay), but=refusals
            )
            if turn is None:
                (refusal,) = list(refusals.values())[-1:]
                return Trouble(refusal.said, then="give up", status=refusal.status)
            try:
                result = await self._exchange(turn.route, body, schema)
            except BaseException as error:
                self._routes.settle(turn, None)
                if not isinstance(error, EndpointError):
                    raise
                self._routes.refused(turn.route, error, request=_digest(body))
                refusals[turn.route] = error
                continue
            self._routes.settle(turn, result)
            if isinstance(result, Reply):
                return result
            if not result.unreachable:
                # A pause, however long, is kept before the next turn; it says nothing about this request.
                return replace(result, then="retry") if result.asks_for_a_pause else result

    async def is_there(self, body: Mapping[str, Any], *, pay: Pay = nobody_pays) -> bool:
        """Ask for a sign of life: whether what failed may be a request's fault, and not the endpoint's.

        Args:
            body: of a real request; its messages are replaced by a few words.
            pay: sends the small request.
        """
        route = self._best
        small = self.composed({**body, "messages": MESSAGES}, None, offers=route.offers)
        try:
            return isinstance(await pay(small, lambda: self._request(route, small)), Reply)
        except EndpointError:
            return False

    def composed(
        self, body: Mapping[str, Any], schema: Mapping[str, Any] | None, *, offers: Capabilities | None
    ) -> Mapping[str, Any]:
        """Return a request as an endpoint takes it that offers this."""
        offers = offers or Capabilities()
        body = {**body, **self.section.extra_body}
        if not offers.seed and "seed" in body:
            body = {name: value for name, value in body.items() if name != "seed"}
        return with_schema(body, schema) if schema is not None and offers.json_schema else body

    def without_keys(self, reply: Reply) -> Reply:
        """Take our keys out of what a model said."""
        names = ("text", "refusal", "model", "reasoning")
        return replace(reply, **{name: self._without_keys(getattr(reply, name)) for name in names})

    def scrub(self, text: str) -> str:
        """Take our keys, and what looks like one, out of a text that others wrote."""
        for route in self._routes.all:
            text = route.endpoint.scrub(text)
        return text

    def words(self, text: str) -> str:
        """Make others' words fit for one line of at most 300 characters, free of keys."""
        return self.endpoint.words(self.scrub(text))

    def stop(self, error: DnoError) -> None:
        """Send nothing more: whoever waits for a turn gets the error."""
        self._routes.stop(error)

    async def drain(self) -> None:
        """Wait for the small requests that no caller waits for."""
        await self._routes.drain()

    async def close(self) -> None:
        await self._routes.close()

    async def _introduce_one(
        self, body: Mapping[str, Any], schema: Mapping[str, Any] | None, pay: Pay
    ) -> Capabilities | Trouble:
        """Probe the endpoints in turn until one answers; else it is worth another try when the first may be back."""
        troubles: list[Trouble] = []
        for route in self._routes.in_service:
            try:
                trouble = await self._introduce(route, body, schema, pay)
            except EndpointError as error:
                self._routes.dismiss(route, error)
                continue
            if trouble is None:
                assert route.offers is not None
                return route.offers
            troubles.append(replace(trouble, detail=f"{route.endpoint.url}: {trouble.detail}"))
        waits = [trouble.retry_after or 0.0 for trouble in troubles]
        alive = [trouble.status for trouble in troubles if trouble.asks_for_a_pause or trouble.is_the_servers]
        return Trouble(
            "; ".join(trouble.detail for trouble in troubles),
            retry_after=min(waits, default=0.0) or None,
            status=alive[0] if alive else None,
        )

    async def _introduce(
        self, route: Route, body: Mapping[str, Any], schema: Mapping[str, Any] | None, pay: Pay
    ) -> Trouble | None:
        found = await probe(
            route.endpoint,
            {**body, **self.section.extra_body},
            section=self.section,
            place=self.place,
            schema=schema,
            pay=pay,
            pause=self._routes.stopped.pause,
        )
        if isinstance(found, Trouble):
            route.last_trouble = found.detail
            if found.status == 429:
                route.limited_since = route.limited_since or time.monotonic()
            return found
        route.offers, route.limited_since = found, None
        return None

    async def _exchange(
        self, route: Route, body: Mapping[str, Any], schema: Mapping[str, Any] | None
    ) -> Reply | Trouble:
        """Send a request; where a schema may be what is refused, send it once more without one."""
        result = await self._request(route, self.composed(body, schema, offers=route.offers))
        is_sent = schema is not None and route.offers is not None and route.offers.json_schema
        may_do_without = isinstance(self.section, OpenAISection) and self.section.structured == "auto"
        if not (is_sent and may_do_without and isinstance(result, Trouble) and _may_be_the_schema(result)):
            return result
        again = await self._request(route, self.composed(body, None, offers=route.offers))
        if isinstance(again, Reply) and route.offers is not None and route.offers.json_schema:
            route.offers = replace(route.offers, json_schema=False)
            _LOG.warning("%s at %s refuses a JSON schema that it took before (%s): from now on it is sent none",
                         self.who, route.endpoint.url, result.detail)  # fmt: skip
        return result if isinstance(again, Trouble) and _may_be_the_schema(again) else again

    async def _request(self, route: Route, body: Mapping[str, Any]) -> Reply | Trouble:
        response = await route.endpoint.post("/chat/completions", body)
        route.requests.learn(response.headers)
        route.tokens.learn(response.headers)
        if isinstance(response, Trouble):
            return response
        reply = read_response(response, endpoint=route.endpoint)
        return self.without_keys(reply) if isinstance(reply, Reply) else reply

    def _without_keys(self, text: str | None) -> str | None:
        if text:
            for route in self._routes.all:
                text = route.endpoint.without_key(text)
        return text


def _may_be_the_schema(trouble: Trouble) -> bool:
    return trouble.then == "give up" and trouble.status in (400, 422, 501)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
