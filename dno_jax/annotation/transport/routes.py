"""Whom to ask, and when: the endpoints of one model in order of preference, and a queue for their turns.

A request waits for a slot (fewer while an endpoint fails), for the requests and tokens per minute, and for the end of a
pause that the endpoint asked for, which all requests keep. An endpoint that fails again and again is passed over until
a trial request succeeds; if all do, everybody waits, up to `max_outage`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from dno_jax.annotation.question import Reply
from dno_jax.annotation.transport.limits import AdaptiveConcurrency, Breaker, Bucket
from dno_jax.annotation.transport.probe import Capabilities
from dno_jax.annotation.transport.stop import Stop
from dno_jax.config import ChatSection
from dno_jax.endpoint import Endpoint, EndpointError, Trouble, wait_seconds
from dno_jax.errors import DnoError

_LOG = logging.getLogger(__name__)

FAILURES_OPEN = 8  # in a row; with a third of all requests failing by chance, one in 10,000 sees so many
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 30.0
# Different requests in a row that are turned away (403, 404) until an endpoint that has answered others is taken to
# refuse all. One that has answered none is believed at once, or at the second where others are under way.
REFUSALS_STOP = 5
# An endpoint that wants a longer pause is as good as dead, and the next one is asked.
LONG_PAUSE_SECONDS = 60.0
LONG_WAIT_SECONDS = 10.0  # that people are told of: the first, and what is twice as long


class Unreachable(DnoError):
    """No endpoint answers: true of every request, not of one."""


class Route:
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
        """Rounds of requests in a row that were answered by asking for a pause."""
        self.answered = 0
        """Real requests, so far."""
        self.turned_away: set[str] = set()
        """Requests that were turned away since it last answered one."""
        self.limited_since: float | None = None
        """When it began to answer nothing but that it is asked too much; put off while nobody had anything to ask."""
        self.last_trouble = ""
        self.refusal: EndpointError | None = None
        """Why it is asked no more: its key, its account, or what it offers will not do."""
        self.introduction: asyncio.Task[None] | None = None
        """Its first use: small requests, during which the other endpoints keep serving."""

    @property
    def away_since(self) -> float | None:
        """Since when it has answered nothing of use; None where it has."""
        return self.breaker.since if self.breaker.is_open else self.limited_since

    @property
    def is_busy(self) -> bool:
        """Whether it is worth waiting for while others could be asked."""
        limited = self.limited_since is not None and time.monotonic() - self.limited_since > LONG_PAUSE_SECONDS
        return not (self.breaker.is_open or limited)

    def delay(self, tokens: int) -> float:
        """Return the seconds until a request may go, infinity for until something happens."""
        if not self.slots.has_room:
            return math.inf
        return max(
            self.breaker.delay(),
            self.paused_until - time.monotonic(),
            self.requests.delay(1),
            self.tokens.delay(tokens),
        )


@dataclass(frozen=True)
class Turn:
    """Leave to send one request, already counted."""

    route: Route
    slot: int
    trial: bool
    tokens: int


class Routes:
    """The endpoints of one model, the preferred one first.

    Args:
        who, place: as messages name them.
    """

    def __init__(self, endpoints: Sequence[Endpoint], section: ChatSection, *, who: str, place: str):
        self.all = [Route(endpoint, section) for endpoint in endpoints]
        self._max_outage = section.max_outage
        self._who = who
        self._place = place
        self.queue = asyncio.Lock()
        self._news = asyncio.Event()
        self.stopped = Stop()
        self._jitter = random.Random()  # spreads requests over time; decides no result
        self._longest_told = 0.0

    @property
    def in_service(self) -> list[Route]:
        """Those that no answer has ruled out; there is always one."""
        return [route for route in self.all if route.refusal is None]

    async def turn(
        self,
        tokens: int,
        *,
        introduce: Callable[[Route], Awaitable[Trouble | None]],
        but: Collection[Route] = (),
    ) -> Turn | None:
        """Wait for leave to send a request; what comes of it is to be told to `settle`.

        Args:
            tokens: what it is expected to use.
            introduce: probes an endpoint at its first use, and says where it does not answer.
            but: endpoints that have turned this request away.

        Returns:
            The turn; None where all endpoints that answer have turned the request away.

        Raises:
            Unreachable: no endpoint has answered for `max_outage` seconds.
            DnoError: the last one that is left refuses, or what `stop` was told.
        """
        async with self.queue:  # fair; only the first in the queue looks at anything
            while True:
                self.stopped.check()
                self._news.clear()
                wait = math.inf
                introduced = False
                others = [route for route in self.in_service if route not in but]
                if but and all(route.breaker.is_open for route in others):
                    return None
                for route in others:
                    introduced = introduced or self._is_being_introduced(route)
                    if introduced and route.offers is None:
                        continue  # those that are known serve meanwhile; one after the other is got to know
                    delay = route.delay(tokens)
                    if delay <= 0.0:
                        turn = self._take(route, tokens)
                        if route.offers is not None:
                            return turn
                        route.introduction = asyncio.create_task(self._introduce(turn, introduce))
                        route.introduction.add_done_callback(lambda _: self._news.set())
                        introduced = True
                        continue
                    wait = min(wait, delay)
                    if route.is_busy:
                        break  # not dead
                await self._wait(wait, patience=self._patience())

    def stop(self, error: DnoError) -> None:
        """Give no turn any more: whoever waits for one, or for an endpoint to come back, gets the error."""
        self.stopped.say(error)
        self._news.set()

    async def drain(self) -> None:
        """Wait for the small requests that are under way: they are paid for, too."""
        await asyncio.gather(*self._introductions(), return_exceptions=True)

    async def close(self) -> None:
        for task in self._introductions():
            task.cancel()
        await self.drain()
        for route in self.all:
            await route.endpoint.close()

    def settle(self, turn: Turn, result: Reply | Trouble | None) -> None:
        """Make of an outcome what follows for the requests to come; None is a request that was given up."""
        route = turn.route
        if isinstance(result, Reply):
            route.told_to_wait = 0
            route.answered += 1
            route.limited_since = None
            route.turned_away.clear()
            if used := result.tokens_in + result.tokens_out:
                route.tokens.take(used - turn.tokens)
            route.slots.succeed()
            self._answered(route)
        elif result is None:
            route.slots.abandon()
            route.breaker.abandon(trial=turn.trial)
        elif result.unreachable:
            route.tokens.take(-turn.tokens)
            route.slots.abandon()
            self._failed(turn, result)
        elif result.asks_for_a_pause:
            route.told_to_wait = max(1, route.told_to_wait + route.slots.fail(turn.slot))
            pause = wait_seconds(route.told_to_wait, retry_after=result.retry_after, jitter=self._jitter.random())
            route.paused_until = max(route.paused_until, time.monotonic() + pause)
            if (result.retry_after or 0.0) > LONG_PAUSE_SECONDS:
                self._failed(turn, result, pause=pause)
            elif result.status == 429:
                self._answered(route)
                route.last_trouble = result.detail
                if route.limited_since is None:
                    route.limited_since = time.monotonic()
            else:
                self._failed(turn, result)
        elif result.status is None or result.status >= 500:
            route.slots.fail(turn.slot)
            self._failed(turn, result)
        else:
            route.slots.abandon()
            self._answered(route)
        self._news.set()

    def refused(self, route: Route, refusal: EndpointError, *, request: str) -> None:
        """Make of a refusal what follows: it may be meant for one request, as a firewall's, or for all.

        Args:
            request: tells the one that was refused from others.

        Raises:
            EndpointError: the refusal, where it is of all requests and there is no other endpoint.
        """
        route.turned_away.add(request)
        enough = REFUSALS_STOP if route.answered else min(2, 1 + route.slots.in_flight)
        if not refusal.is_doubtful or len(route.turned_away) >= enough:
            self.dismiss(route, refusal)

    def dismiss(self, route: Route, refusal: EndpointError) -> None:
        """Ask an endpoint no more, and say so; the others may have another account, model or server.

        Raises:
            EndpointError: the refusal, where there is no other.
        """
        others = [other for other in self.in_service if other is not route]
        if not others:
            raise refusal
        if route.refusal is None:
            route.refusal, route.last_trouble = refusal, str(refusal)
            _LOG.warning("%s; %s is asked no more in this run, but %s",
                         refusal, route.endpoint.url, " and ".join(other.endpoint.url for other in others))  # fmt: skip
            self._news.set()

    def no_answer(self, how_long: str) -> str:
        """Say that nobody answers, and what to do about it."""
        tried = ", ".join(f"{route.endpoint.url} ({route.last_trouble})" for route in self.all)
        if all(route.limited_since is not None for route in self.in_service):
            return (
                f"{self._who}: its limits let nothing through {how_long}: {tried}; wait until they are reset, raise "
                f"them, or name another endpoint in {self._place}.more_endpoints, then start again: what is already "
                "paid for is kept"
            )
        return (
            f"{self._who}: no endpoint answered {how_long}: {tried}; start it, or fix {self._place}.base_url, or name "
            f"another in {self._place}.more_endpoints, then start again: what is already paid for is kept"
        )

    def _take(self, route: Route, tokens: int) -> Turn:
        if route.limited_since is not None and not route.slots.in_flight:
            route.limited_since += max(0.0, time.monotonic() - route.paused_until)
        route.requests.take(1)
        route.tokens.take(tokens)
        return Turn(route, slot=route.slots.start(), trial=route.breaker.start(), tokens=tokens)

    def _introductions(self) -> list[asyncio.Task[None]]:
        return [route.introduction for route in self.all if route.introduction is not None]

    def _is_being_introduced(self, route: Route) -> bool:
        """Whether it must not be asked yet; raises what the introduction did."""
        if route.introduction is None:
            return False
        if not route.introduction.done():
            return True
        ended, route.introduction = route.introduction, None
        ended.result()
        return False

    async def _introduce(self, turn: Turn, introduce: Callable[[Route], Awaitable[Trouble | None]]) -> None:
        route = turn.route
        try:
            trouble = await introduce(route)
        except BaseException as error:
            self.settle(turn, None)
            if not isinstance(error, EndpointError):
                raise
            self.dismiss(route, error)
            return
        route.slots.abandon()
        route.tokens.take(-turn.tokens)
        if trouble is None:
            self._answered(route)
        else:
            self._failed(turn, trouble, pause=max(FIRST_PAUSE_SECONDS, trouble.retry_after or 0.0))

    def _answered(self, route: Route) -> None:
        since = route.breaker.since
        if route.breaker.succeed():
            _LOG.warning(
                "%s at %s answers again, after %.0f s", self._who, route.endpoint.url, time.monotonic() - since
            )

    def _failed(self, turn: Turn, trouble: Trouble, *, pause: float | None = None) -> None:
        route = turn.route
        route.last_trouble = trouble.detail
        if not route.breaker.fail(trial=turn.trial, pause=pause):
            return
        others = [other.endpoint.url for other in self.in_service if not other.breaker.is_open]
        meanwhile = f"{others[0]} is asked" if others else f"waiting up to max_outage={self._max_outage:g} s"
        _LOG.warning("%s at %s does not answer (%s): %s until it does",
                     self._who, route.endpoint.url, trouble.detail, meanwhile)  # fmt: skip

    def _patience(self) -> float:
        """Return how long to wait for an endpoint, seconds; infinity while there is one.

        Raises:
            Unreachable: long enough.
        """
        away = [route.away_since for route in self.in_service]
        since = [at for at in away if at is not None]
        if len(since) < len(away):
            return math.inf
        waited = time.monotonic() - max(since)
        if waited >= self._max_outage:
            raise Unreachable(self.no_answer(f"for {waited:.0f} s, max_outage={self._max_outage:g} s"))
        return self._max_outage - waited

    async def _wait(self, seconds: float, *, patience: float) -> None:
        """Wait until something happens, or so long."""
        is_told = all(route.breaker.is_open for route in self.in_service)  # that nobody answers
        if not is_told and LONG_WAIT_SECONDS < seconds <= patience and 2.0 * self._longest_told < seconds < math.inf:
            self._longest_told = seconds
            limited = [route.last_trouble for route in self.in_service if route.limited_since is not None]
            _LOG.warning("%s: waiting %.0f s, as its limits (requests or tokens per minute, Retry-After) demand%s",
                         self._who, seconds, f": {limited[0]}" if limited else "")  # fmt: skip
        seconds = min(seconds, patience)
        if math.isinf(seconds):
            await self._news.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
