"""How much may be asked of an endpoint, and when: pure bookkeeping; the clock is given, and nobody waits in here.

Three things bound the requests in flight: what the endpoint can bear at once (learnt from its failures), what it sells
per minute (configured, or learnt from its headers), and whether it is there at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from dno_jax.faults import amount, parse_reset

Clock = Callable[[], float]
"""Seconds, from any origin, never going back."""


class AdaptiveConcurrency:
    """Requests in flight: one more for each round of successes, half as many after a failure (AIMD, as TCP does).

    Args:
        maximum: never more than this; it is where it starts, for whoever configured it meant it.
    """

    def __init__(self, maximum: int):
        self._maximum = maximum
        self._limit = float(maximum)
        self._round = 0
        self.in_flight = 0

    @property
    def limit(self) -> int:
        """Requests that may be in flight, between 1 and the maximum."""
        return int(self._limit)

    @property
    def has_room(self) -> bool:
        return self.in_flight < self.limit

    def start(self) -> int:
        """Count a request in, and return the ticket that its failure would be told with."""
        self.in_flight += 1
        return self._round

    def succeed(self) -> None:
        self.in_flight -= 1
        self._limit = min(float(self._maximum), self._limit + 1.0 / self._limit)

    def fail(self, ticket: int) -> bool:
        """Halve the limit, once for all requests that were in flight together: return whether this is their news."""
        self.in_flight -= 1
        if ticket != self._round:
            return False
        self._limit = max(1.0, self._limit / 2.0)
        self._round += 1
        return True

    def abandon(self) -> None:
        """Count a request out that says nothing about the endpoint."""
        self.in_flight -= 1


class Bucket:
    """What may be used per minute, of requests or of tokens.

    A configured rate is kept evenly: a second's worth may be used at once. Without one, there is no bound until the
    endpoint's headers name one. A larger amount than the bucket holds is let through when it is full, and owed.

    Args:
        per_minute: the configured rate, None for what the headers say.
        kind: "requests" or "tokens": whose headers are read.
        wall: seconds since 1970, in which some headers name the time of their reset.
    """

    def __init__(self, per_minute: int | None, *, kind: str, clock: Clock, wall: Clock = time.time):
        self._configured = None if per_minute is None else per_minute / 60.0
        self._kind = kind
        self._clock = clock
        self._wall = wall
        self._at = clock()
        self._rate = self._configured or math.inf
        self._capacity = max(1.0, self._rate)
        self._level = self._capacity

    def delay(self, amount: int) -> float:
        """Return the seconds until `amount` may be used."""
        self._refill()
        missing = min(amount, self._capacity) - self._level
        return missing / self._rate if missing > 0.0 else 0.0

    def take(self, amount: int) -> None:
        """Use up an amount; a negative one gives back what was taken too much."""
        self._refill()
        self._level = min(self._capacity, self._level - amount)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Read x-ratelimit-{limit,remaining,reset}-{kind}; whatever is absent or senseless is passed over."""
        name = headers.get(f"x-ratelimit-limit-{self._kind}")
        if name is None:  # most servers of one's own
            return
        limit = amount(name)
        remaining = amount(headers.get(f"x-ratelimit-remaining-{self._kind}"))
        if limit is None or limit <= 0.0:
            return
        self._refill()
        rate = limit / 60.0
        reset = parse_reset(headers.get(f"x-ratelimit-reset-{self._kind}"), now=self._wall())
        if remaining is not None and reset and remaining < limit / 2.0:
            # Some limits that stand there are a day's. How fast they come back shows once much of them is used.
            rate = min(rate, (limit - remaining) / reset)
        if self._configured is None:
            self._rate, self._capacity = rate, limit
        else:
            self._rate = min(self._configured, rate)
        self._level = min(self._level, self._capacity, math.inf if remaining is None else remaining)

    def _refill(self) -> None:
        now = self._clock()
        if self._rate < math.inf:
            self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
        self._at = now


class Breaker:
    """Whether an endpoint is there: open (nobody asks) after failures in a row, until one trial request succeeds.

    Args:
        failures: in a row, without any success, that open it.
        pause: seconds until the first trial; each failed trial doubles it, up to `max_pause`.
    """

    def __init__(self, *, failures: int, pause: float, max_pause: float, clock: Clock):
        self._failures = failures
        self._first_pause = self._pause = pause
        self._max_pause = max_pause
        self._clock = clock
        self._in_a_row = 0
        self._trial = False
        self._until = 0.0
        self.is_open = False
        self.since = 0.0
        """When it opened, put off by the time in which a trial might have been sent and nobody had anything to ask."""

    def delay(self) -> float:
        """Return the seconds until a request may be sent; infinity while a trial is under way."""
        if not self.is_open:
            return 0.0
        return math.inf if self._trial else max(0.0, self._until - self._clock())

    def start(self) -> bool:
        """Let a request go; return whether it is the trial, which its end is told with."""
        if self.is_open and not self._trial:
            self._trial = True
            self.since += max(0.0, self._clock() - self._until)
        return self.is_open

    def succeed(self) -> bool:
        """Note that the endpoint answers; return whether that closes it."""
        closes, self.is_open, self._trial = self.is_open, False, False
        self._in_a_row = 0
        self._pause = self._first_pause
        return closes

    def fail(self, *, trial: bool, pause: float | None = None) -> bool:
        """Note a failure; return whether it opens.

        Args:
            trial: what `start` returned.
            pause: seconds the endpoint itself asks to be left alone: opens at once, for so long.
        """
        self._in_a_row += 1
        trial = trial and self._trial  # another request's success has closed it since
        opens = not self.is_open and (pause is not None or self._in_a_row >= self._failures)
        if trial:
            self._trial = False
            self._pause = min(self._max_pause, self._pause * 2.0)
        if opens:
            self.since = self._clock()
        if opens or trial:
            self.is_open = True
            self._until = self._clock() + self._pause
        if pause is not None:
            self._until = max(self._until, self._clock() + pause)
        return opens

    def abandon(self, *, trial: bool) -> None:
        """Note that a request ended without news of the endpoint: the next is the trial."""
        if trial:
            self._trial = False
