"""One model, by its endpoints in order of preference: when to ask, whom, and what came of it.

A request waits for its turn: for a slot (fewer while an endpoint fails), for the requests and tokens a minute, for the
end of a pause that the endpoint asked for, which all requests keep. Turns come in the order of asking. An endpoint that
fails again and again is passed over until a trial request succeeds; if all do, requests wait, up to `max_outage`.

Retries are the caller's, who counts them: nothing here sends a request twice that an endpoint may have charged for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dno_jax.annotation.completion import read_completion, with_schema
from dno_jax.annotation.limits import AdaptiveConcurrency, Breaker, Bucket
from dno_jax.annotation.probe import Capabilities, probe
from dno_jax.annotation.question import Reply
from dno_jax.config import ChatSection
from dno_jax.endpoint import Endpoint, Trouble, wait_seconds
from dno_jax.errors import DnoError

_LOG = logging.getLogger(__name__)

DEFAULT_URL = "https://api.openai.com/v1"
FAILURES_OPEN = 8  # in a row; with a third of all requests failing by chance, one in 10,000 sees so many
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 30.0
# An endpoint that wants a longer pause is as good as dead, and the next one is asked.
LONG_PAUSE_SECONDS = 60.0
LONG_WAIT_SECONDS = 10.0  # that people are told of


class Unreachable(DnoError):
    """No endpoint answers: true of every request, not of one."""


class _Route:
    """An endpoint, and what is known of how much it takes."""

    def __init__(self, endpoint: Endpoint, section: ChatSection):
        clock = time.monotonic
        self.endpoint = endpoint
        self.offers: Capabilities | None = None
        self.slots = AdaptiveConcurrency(section.max_concurrency)
        self.requests = Bucket(section.requests_per_minute, kind="requests", clock=clock)
        self.tokens = Bucket(section.tokens_per_minute, kind="tokens", clock=clock)
        self.breaker = Breaker(
            failures=FAILURES_OPEN, pause=FIRST_PAUSE_SECONDS, max_pause=MAX_PAUSE_SECONDS, clock=clock
        )
        self.paused_until = 0.0
        self.told_to_wait = 0
        """Answers in a row that asked for a pause."""
        self.last_trouble = ""

    def delay(self, tokens: int) -> float:
        """Return the seconds until a request may go, infinity for until something happens."""
        if not self.slots.has_room:
            return math.inf
        return max(
            self.breaker.delay(),
            self.paused_until - time.monotonic(),
            self.requests.delay(1.0),
            self.tokens.delay(tokens),
        )


@dataclass(frozen=True)
class _Turn:
    """Leave to send one request, already counted."""

    route: _Route
    slot: int
    trial: bool
    tokens: int


class Client:
    """Sends requests to one model. One client serves one event loop.

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
        addresses = [(place, url, section.api_key_env)]
        for number, more in enumerate(section.more_endpoints):
            addresses.append((f"{place}.more_endpoints.{number}", more.base_url, more.api_key_env))
        self._routes = [
            _Route(
                Endpoint(who=who, place=place, address=address, url=url, api_key_env=key, timeout=section.timeout),
                section,
            )
            for address, url, key in addresses
        ]
        self._turnstile = asyncio.Lock()
        self._news = asyncio.Event()
        self._jitter = random.Random()  # spreads requests over time; decides no result

    @property
    def endpoint(self) -> Endpoint:
        """The preferred one."""
        return self._routes[0].endpoint

    async def probe(self, body: Mapping[str, Any]) -> Capabilities:
        """Send small requests with the very parameters of the real ones, and note what the endpoint offers.

        Args:
            body: of a real request; its messages are replaced by a few words.

        Returns:
            What the first endpoint that answers offers. The others are probed when they are first used.

        Raises:
            Unreachable: no endpoint answers, in `max_tries` rounds.
            DnoError: an endpoint refuses the key, the model or a parameter, or lacks what the configuration needs.
        """
        async with self._turnstile:
            for tries in range(1, self.section.max_tries + 1):
                for route in self._routes:
                    if (trouble := await self._introduce(route, body)) is None:
                        assert route.offers is not None
                        return route.offers
                    _LOG.info("%s at %s: try %d: %s", self.who, route.endpoint.url, tries, trouble.detail)
                if tries < self.section.max_tries:
                    await _pause(wait_seconds(tries, retry_after=trouble.retry_after, jitter=self._jitter.random()))
        raise Unreachable(self._no_answer(f"in {tries} tries"))

    async def send(
        self, body: Mapping[str, Any], *, schema: Mapping[str, Any] | None = None, tokens: int = 0
    ) -> Reply | Trouble:
        """Send one request when its turn has come: one try, which may end in a `Trouble`.

        An attempt that did not reach an endpoint is no try, and is made again. Where a reply contains a key of ours, it
        is taken out.

        Args:
            body: the chat.completions request. A seed is left out where the endpoint takes none.
            schema: of the reply; sent where the endpoint takes one.
            tokens: what the request is expected to use, prompt and reply, for tokens a minute.

        Raises:
            Unreachable: no endpoint has answered for `max_outage` seconds.
            DnoError: no request of this configuration can succeed.
        """
        while True:
            turn = await self._turn(body, tokens)
            try:
                result = await self._request(turn.route, self.composed(body, schema, offers=turn.route.offers))
            except BaseException:
                self._settle(turn, None)
                raise
            self._settle(turn, result)
            if isinstance(result, Reply):
                return result
            if not result.unreachable:
                # A pause, however long, is kept before the next turn; it says nothing about this request.
                return replace(result, then="retry") if _asks_for_a_pause(result) else result

    def composed(
        self, body: Mapping[str, Any], schema: Mapping[str, Any] | None, *, offers: Capabilities | None
    ) -> Mapping[str, Any]:
        """Return a request as an endpoint takes it that offers this."""
        offers = offers or Capabilities()
        if not offers.seed and "seed" in body:
            body = {name: value for name, value in body.items() if name != "seed"}
        return with_schema(body, schema) if schema is not None and offers.json_schema else body

    def without_keys(self, reply: Reply) -> Reply:
        """Take our keys out of what a model said."""
        text, refusal, model = (self._without_keys(said) for said in (reply.text, reply.refusal, reply.model))
        if (text, refusal, model) == (reply.text, reply.refusal, reply.model):
            return reply
        return replace(reply, text=text, refusal=refusal, model=model or "")

    def scrub(self, text: str) -> str:
        """Take our keys, and what looks like one, out of a text that others wrote."""
        for route in self._routes:
            text = route.endpoint.scrub(text)
        return text

    def words(self, text: str) -> str:
        """Make others' words fit for one line of at most 300 characters, free of keys."""
        return self.endpoint.words(self.scrub(text))

    async def close(self) -> None:
        for route in self._routes:
            await route.endpoint.close()

    async def _turn(self, body: Mapping[str, Any], tokens: int) -> _Turn:
        async with self._turnstile:  # fair; only the first in the queue looks at anything
            while True:
                self._news.clear()
                wait = math.inf
                for route in self._routes:
                    delay = route.delay(tokens)
                    if delay <= 0.0:
                        turn = self._take(route, tokens)
                        if route.offers is not None or await self._introduced(turn, body):
                            return turn
                        delay = route.delay(tokens)
                    wait = min(wait, delay)
                    if not route.breaker.is_open:
                        break  # busy, not dead
                await self._wait(min(wait, self._patience()))

    def _take(self, route: _Route, tokens: int) -> _Turn:
        route.requests.take(1.0)
        route.tokens.take(tokens)
        return _Turn(route, slot=route.slots.start(), trial=route.breaker.start(), tokens=tokens)

    async def _introduced(self, turn: _Turn, body: Mapping[str, Any]) -> bool:
        """Probe an endpoint at its first use; where it does not answer it is passed over for now."""
        try:
            trouble = await self._introduce(turn.route, body)
        except BaseException:
            self._settle(turn, None)
            raise
        if trouble is not None:
            turn.route.slots.abandon(turn.slot)
            self._failed(turn, trouble, pause=max(FIRST_PAUSE_SECONDS, trouble.retry_after or 0.0))
        return trouble is None

    async def _introduce(self, route: _Route, body: Mapping[str, Any]) -> Trouble | None:
        found = await probe(route.endpoint, body, section=self.section, place=self.place)
        if isinstance(found, Trouble):
            route.last_trouble = found.detail
            return found
        route.offers = found
        return None

    async def _request(self, route: _Route, body: Mapping[str, Any]) -> Reply | Trouble:
        response = await route.endpoint.post("/chat/completions", body)
        route.requests.learn(response.headers)
        route.tokens.learn(response.headers)
        if isinstance(response, Trouble):
            return response
        reply = read_completion(response.text)
        if reply is None:
            return Trouble(f"HTTP 200 without a chat completion: {self.words(response.text)}")
        return self.without_keys(reply)

    def _settle(self, turn: _Turn, result: Reply | Trouble | None) -> None:
        """Make of an outcome what follows for the requests to come; None is a request that was given up."""
        route = turn.route
        if isinstance(result, Reply):
            route.told_to_wait = 0
            if used := result.tokens_in + result.tokens_out:
                route.tokens.take(used - turn.tokens)
            route.slots.succeed(turn.slot)
            self._answered(route)
        elif result is None:
            route.slots.abandon(turn.slot)
            route.breaker.abandon(trial=turn.trial)
        elif result.unreachable:
            route.tokens.take(-turn.tokens)
            route.slots.abandon(turn.slot)
            self._failed(turn, result)
        elif _asks_for_a_pause(result):
            route.slots.fail(turn.slot)
            route.told_to_wait += 1
            pause = wait_seconds(route.told_to_wait, retry_after=result.retry_after, jitter=self._jitter.random())
            route.paused_until = max(route.paused_until, time.monotonic() + pause)
            if pause > LONG_PAUSE_SECONDS:
                self._failed(turn, result, pause=pause)
            elif result.status == 429:
                self._answered(route)
            else:
                self._failed(turn, result)
        elif result.status is None or result.status >= 500:
            route.slots.fail(turn.slot)
            self._failed(turn, result)
        else:
            route.slots.abandon(turn.slot)
            self._answered(route)
        self._news.set()

    def _answered(self, route: _Route) -> None:
        since = route.breaker.since
        if route.breaker.succeed():
            _LOG.warning("%s at %s answers again, after %.0f s", self.who, route.endpoint.url, time.monotonic() - since)

    def _failed(self, turn: _Turn, trouble: Trouble, *, pause: float | None = None) -> None:
        route = turn.route
        route.last_trouble = trouble.detail
        if not route.breaker.fail(trial=turn.trial, pause=pause):
            return
        others = [other.endpoint.url for other in self._routes if not other.breaker.is_open]
        meanwhile = f"{others[0]} is asked" if others else f"waiting up to max_outage={self.section.max_outage:g} s"
        _LOG.warning("%s at %s does not answer (%s): %s until it does",
                     self.who, route.endpoint.url, trouble.detail, meanwhile)  # fmt: skip

    def _patience(self) -> float:
        """Return how long to wait for an endpoint, seconds; infinity while there is one.

        Raises:
            Unreachable: long enough.
        """
        if not all(route.breaker.is_open for route in self._routes):
            return math.inf
        waited = time.monotonic() - max(route.breaker.since for route in self._routes)
        if waited >= self.section.max_outage:
            raise Unreachable(self._no_answer(f"for {waited:.0f} s, max_outage={self.section.max_outage:g} s"))
        return self.section.max_outage - waited

    def _no_answer(self, how_long: str) -> str:
        tried = ", ".join(f"{route.endpoint.url} ({route.last_trouble})" for route in self._routes)
        return (
            f"{self.who}: no endpoint answered {how_long}: {tried}; start it, or mend {self.place}.base_url, or name "
            f"another in {self.place}.more_endpoints, then start again: what is already paid for is kept"
        )

    async def _wait(self, seconds: float) -> None:
        """Wait until something happens, or so long."""
        if math.isinf(seconds):
            await self._news.wait()
            return
        if seconds > LONG_WAIT_SECONDS:
            _LOG.info("%s: waiting %.0f s, as its limits demand", self.who, seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    def _without_keys(self, text: str | None) -> str | None:
        if text:
            for route in self._routes:
                text = route.endpoint.without_key(text)
        return text


def _asks_for_a_pause(trouble: Trouble) -> bool:
    return trouble.status == 429 or (trouble.retry_after is not None and (trouble.status or 0) >= 500)


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)
