"""Requests and tokens per minute: buckets that fill steadily, and the headers that tell of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dno_jax.fake_judge.behaviour import Behaviour


class Bucket:
    """Holds what may still be spent.

    Args:
        a_minute: how fast it fills.
        burst_seconds: of filling that it holds at most, but never less than one.
        now: seconds on a clock that only goes forward.
    """

    def __init__(self, a_minute: int, *, burst_seconds: float, now: float):
        self.a_minute = a_minute
        self.capacity = max(1.0, a_minute * burst_seconds / 60.0)
        self.level = self.capacity
        self._updated = now

    def wait(self, amount: int, *, now: float) -> float:
        """Seconds until this much may be taken; inf for more than it ever holds."""
        self.level = min(self.capacity, self.level + (now - self._updated) * self.a_minute / 60.0)
        self._updated = now
        if amount > self.capacity:
            return math.inf
        return max(0.0, (amount - self.level) * 60.0 / self.a_minute)

    def take(self, amount: int) -> None:
        self.level -= amount

    @property
    def seconds_to_full(self) -> float:
        return (self.capacity - self.level) * 60.0 / self.a_minute


@dataclass(frozen=True)
class Turn:
    """Whether a request may pass: None, or the seconds to wait; and the headers either way."""

    wait: float | None
    headers: dict[str, str]


class Limits:
    """The limits of one endpoint; those that are not set do not hold and are not told."""

    def __init__(self, behaviour: Behaviour, *, now: float):
        rates = {"requests": behaviour.requests_per_minute, "tokens": behaviour.tokens_per_minute}
        self._buckets = {
            name: Bucket(rate, burst_seconds=behaviour.burst_seconds, now=now) for name, rate in rates.items() if rate
        }

    def admit(self, *, tokens: int, now: float) -> Turn:
        """Let a request pass and pay for it, or send it away unpaid."""
        if not self._buckets:
            return Turn(None, {})
        amounts = {"requests": 1, "tokens": tokens}
        wait = max(bucket.wait(amounts[name], now=now) for name, bucket in self._buckets.items())
        headers = {}
        for name, bucket in self._buckets.items():
            if not wait:
                bucket.take(amounts[name])
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.a_minute)
            headers[f"x-ratelimit-remaining-{name}"] = str(int(bucket.level))
            headers[f"x-ratelimit-reset-{name}"] = _as_duration(bucket.seconds_to_full)
        if not wait:
            return Turn(None, headers)
        if wait < math.inf:
            headers["retry-after"] = str(math.ceil(wait))
            headers["retry-after-ms"] = str(math.ceil(wait * 1000))
        return Turn(wait, headers)


def _as_duration(seconds: float) -> str:
    """As the API writes it: 120ms, 1.5s, 6m0s."""
    if seconds < 1.0:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60.0:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{int(seconds // 60)}m{int(seconds % 60)}s"
