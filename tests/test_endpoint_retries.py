"""One loop for all that is tried again: how often, how long, and what ends it."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from dno_jax.endpoint import GaveUp, Trouble, retried
from dno_jax.errors import DnoError

BUSY = Trouble("busy")


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self, monkeypatch):
        self.now, self.waits = 1000.0, []
        monkeypatch.setattr("dno_jax.endpoint.time", SimpleNamespace(monotonic=lambda: self.now, time=time.time))

    async def pause(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def run(clock, results, **bounds):
    """What becomes of tries that end so, and how many of them were made."""
    left = list(results)

    async def attempt():
        return left.pop(0)

    found = asyncio.run(retried(attempt, who="the server", pause=clock.pause, **bounds))
    return found, len(results) - len(left)


def test_the_first_success_is_returned_and_pauses_grow(clock):
    assert run(clock, [BUSY] * 4 + ["fine", "not asked"]) == ("fine", 5)
    for wait, most in zip(clock.waits, (0.5, 1.0, 2.0, 4.0), strict=True):
        assert most / 2 <= wait <= most


@pytest.mark.parametrize("then", ["give up", "refused", "raise"])
def test_what_another_try_would_not_mend_ends_at_once(clock, then):
    final = Trouble("no", then=then)
    found, made = run(clock, [BUSY, final, "not asked"])
    assert (found.trouble, found.tries, made) == (final, 2, 2)
    assert len(clock.waits) == 1


def test_tries_are_counted_and_none_is_followed_by_a_pause_that_nothing_follows(clock):
    found, made = run(clock, [BUSY] * 9, max_tries=3)
    assert isinstance(found, GaveUp)
    assert (found.tries, made, len(clock.waits)) == (3, 3, 2)
    assert found.seconds == pytest.approx(sum(clock.waits))
    found, made = run(clock, [BUSY], max_tries=1)
    assert (found.tries, made) == (1, 1)


def test_a_pause_that_is_asked_for_is_kept_but_ends_with_the_outage(clock):
    slow = Trouble("slow down", retry_after=400.0, status=429)
    found, made = run(clock, [slow] * 9, max_tries=5, max_outage=600.0)
    assert 400.0 <= clock.waits[0] <= 400.5
    assert clock.now == pytest.approx(1600.0)
    assert (found.tries, made) == (3, 3)


def test_so_many_tries_as_must_be_are_made_whatever_the_time_with_short_pauses(clock):
    slow = Trouble("slow down", retry_after=400.0, status=429)
    found, made = run(clock, [slow] * 9, min_tries=4, max_outage=0.0)
    assert (found.tries, made) == (4, 4)
    assert all(0.0 <= wait < 0.5 for wait in clock.waits)


def test_a_pause_that_raises_ends_it_before_another_try():
    tries = []

    async def attempt():
        tries.append(1)
        return BUSY

    async def stopped(seconds):
        raise DnoError("the run is stopping")

    with pytest.raises(DnoError, match="stopping"):
        asyncio.run(retried(attempt, who="the server", pause=stopped))
    assert len(tries) == 1
