"""The bookkeeping of limits, by a clock that the test turns."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from dno_jax.annotation.transport.limits import AdaptiveConcurrency, Breaker, Bucket
from dno_jax.faults import Fault, parse_duration, parse_reset, parse_retry_after


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limit_headers(kind: str, limit: object, remaining: object, reset: str) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(limit),
        f"x-ratelimit-remaining-{kind}": str(remaining),
        f"x-ratelimit-reset-{kind}": reset,
    }


def sent(bucket: Bucket, clock: Clock, *, seconds: float, amount: int = 1) -> int:
    """Send whenever the bucket lets us, for so long, and count."""
    end, count = clock.now + seconds, 0
    while True:
        delay = bucket.delay(amount)
        if clock.now + delay >= end:
            clock.now = end
            return count
        clock.now += delay
        bucket.take(amount)
        count += 1


def test_concurrency_starts_at_the_maximum_and_never_passes_it():
    slots = AdaptiveConcurrency(4)
    for _ in range(4):
        assert slots.has_room
        slots.start()
    assert not slots.has_room
    slots.succeed()
    assert slots.has_room
    for _ in range(100):
        slots.start()
        slots.succeed()
    assert (slots.limit, slots.in_flight) == (4, 3)


def test_failures_of_one_round_halve_the_limit_once():
    slots = AdaptiveConcurrency(32)
    tickets = [slots.start() for _ in range(32)]
    assert [slots.fail(ticket) for ticket in tickets[:20]] == [True] + [False] * 19
    assert slots.limit == 16
    assert slots.in_flight == 12
    assert slots.has_room
    for _ in range(4):
        slots.start()
    assert not slots.has_room
    slots.fail(slots.start())  # sent after the first halving: news
    assert slots.limit == 8


def test_the_limit_never_falls_below_one_and_climbs_by_one_a_round():
    slots = AdaptiveConcurrency(32)
    for _ in range(20):
        slots.fail(slots.start())
    assert slots.limit == 1
    assert slots.has_room
    climbed = []
    for _ in range(40):
        for _ in range(slots.limit):
            slots.start()
            slots.succeed()
        climbed.append(slots.limit)
    # n successes at 1/n each and a little less, since the limit grows meanwhile
    assert climbed[:3] == [2, 2, 3]
    assert all(0 <= after - before <= 1 for before, after in pairwise(climbed))
    assert climbed[-1] > 20


def test_an_abandoned_request_is_no_news():
    slots = AdaptiveConcurrency(8)
    slots.start()
    slots.abandon()
    assert (slots.limit, slots.in_flight) == (8, 0)


@pytest.mark.parametrize("per_minute", [3, 60, 600, 6000])
def test_a_configured_rate_is_kept_in_every_minute(clock, per_minute):
    bucket = Bucket(per_minute, kind="requests", clock=clock)
    a_second = max(1.0, per_minute / 60.0)
    for _ in range(3):
        count = sent(bucket, clock, seconds=60.0)
        assert per_minute - 1 <= count <= per_minute + a_second


def test_without_a_rate_nothing_is_bounded_until_headers_say_so(clock):
    bucket = Bucket(None, kind="requests", clock=clock)
    for _ in range(1000):
        assert bucket.delay(1) == 0.0
        bucket.take(1)
    bucket.learn({})
    assert bucket.delay(10**9) == 0.0
    bucket.learn(limit_headers("requests", 60, 2, "58s"))
    assert sent(bucket, clock, seconds=0.5) == 2
    assert 0.4 <= bucket.delay(1) <= 1.0


def test_remaining_is_believed_where_it_is_less_and_not_where_it_is_more(clock):
    bucket = Bucket(None, kind="requests", clock=clock)
    bucket.learn(limit_headers("requests", 60, 10, "50s"))
    for _ in range(10):
        bucket.take(1)
    bucket.learn(limit_headers("requests", 60, 9, "51s"))  # an old answer, overtaken by ours
    assert bucket.delay(1) > 0.9
    clock.now += 60.0
    assert bucket.delay(50) == 0.0
    bucket.learn(limit_headers("requests", 60, 0, "1m0s"))  # somebody else uses the account too
    assert bucket.delay(1) == pytest.approx(1.0)


def test_a_limit_that_is_a_days_is_known_by_how_slowly_it_comes_back(clock):
    bucket = Bucket(None, kind="requests", clock=clock)
    bucket.learn(limit_headers("requests", 10_000, 9_999, "8.64s"))
    assert bucket.delay(1) == 0.0
    bucket.learn(limit_headers("requests", 10_000, 0, "24h0m0s"))
    assert bucket.delay(1) == pytest.approx(8.64)


def test_headers_may_lower_a_configured_rate_and_not_raise_it(clock):
    bucket = Bucket(600, kind="requests", clock=clock)
    bucket.learn(limit_headers("requests", 60_000, 59_999, "1ms"))
    assert sent(bucket, clock, seconds=60.0) <= 610
    bucket.learn(limit_headers("requests", 60, 59, "1s"))
    sent(bucket, clock, seconds=60.0)
    assert 59 <= sent(bucket, clock, seconds=60.0) <= 61


def test_more_than_a_bucket_holds_goes_when_it_is_full_and_is_owed(clock):
    bucket = Bucket(600, kind="tokens", clock=clock)  # 10 a second
    assert bucket.delay(300) == 0.0
    bucket.take(300)
    assert bucket.delay(300) == pytest.approx(30.0)
    assert bucket.delay(1) == pytest.approx(29.1)
    clock.now += 30.0
    assert bucket.delay(300) == 0.0


def test_an_estimate_is_corrected_by_usage(clock):
    bucket = Bucket(600, kind="tokens", clock=clock)
    bucket.take(10)
    assert bucket.delay(10) == pytest.approx(1.0)
    bucket.take(4 - 10)  # it used 4
    assert bucket.delay(10) == pytest.approx(0.4)
    bucket.take(-1000)
    assert bucket.delay(10) == 0.0
    bucket.take(20)  # never fuller than full
    assert bucket.delay(1) == pytest.approx(1.1)


@pytest.mark.parametrize(
    "headers",
    [
        limit_headers("requests", "many", 0, "1s"),
        limit_headers("requests", 0, 0, "1s"),
        limit_headers("requests", -5, 0, "1s"),
        limit_headers("requests", "nan", 0, "1s"),
        limit_headers("requests", "1e9", 0, "1s"),
        limit_headers("tokens", 10, 0, "1s"),
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60s"},
    ],
)
def test_senseless_headers_teach_nothing(clock, headers):
    bucket = Bucket(None, kind="requests", clock=clock)
    bucket.learn(headers)
    assert bucket.delay(100) == 0.0


@pytest.mark.parametrize("reset", ["soon", "", "-3s", "1s2", "nan", "1e5s", "9" * 40])
def test_a_senseless_reset_leaves_the_limit_a_minutes(clock, reset):
    bucket = Bucket(None, kind="requests", clock=clock)
    bucket.learn(limit_headers("requests", 120, 0, reset))
    assert bucket.delay(1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0), ("20ms", 0.02), ("6m0s", 360.0), ("1h2m3.5s", 3723.5), ("2m59.56s", 179.56), ("1d2h", 93600.0),
        ("12", 12.0), ("0.25", 0.25), (" 3s ", 3.0), ("0s", 0.0),
        (None, None), ("", None), ("s", None), ("1 s", None), ("-1s", None), ("1s!", None), ("1us", None),
    ],
)  # fmt: skip
def test_durations(text, seconds):
    assert parse_duration(text) == (None if seconds is None else pytest.approx(seconds))


def breaker(clock: Clock) -> Breaker:
    return Breaker(failures=3, pause=1.0, max_pause=4.0, clock=clock)


def opened(clock: Clock) -> Breaker:
    it = breaker(clock)
    assert [it.fail(trial=it.start()) for _ in range(3)] == [False, False, True]
    return it


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not(clock):
    it = breaker(clock)
    for _ in range(5):
        assert [it.fail(trial=it.start()) for _ in range(2)] == [False, False]
        assert it.succeed() is False
    assert not it.is_open
    it = opened(clock)
    assert it.is_open
    assert it.delay() == pytest.approx(1.0)
    assert it.fail(trial=False) is False  # it says so once; those that were in flight only confirm it
    assert it.delay() == pytest.approx(1.0)


def test_one_trial_goes_at_a_time_and_the_pause_doubles_up_to_its_bound(clock):
    it = opened(clock)
    for pause in (1.0, 2.0, 4.0, 4.0):
        assert it.delay() == pytest.approx(pause)
        clock.now += pause
        assert it.delay() == 0.0
        trial = it.start()
        assert trial
        assert it.delay() == math.inf
        assert it.fail(trial=trial) is False
    clock.now += 4.0
    it.start()
    assert it.succeed() is True
    assert it.delay() == 0.0
    assert it.succeed() is False  # once
    assert [it.fail(trial=it.start()) for _ in range(3)] == [False, False, True]
    assert it.delay() == pytest.approx(1.0)  # and it begins anew


def test_a_trial_that_is_given_up_makes_room_for_another(clock):
    it = opened(clock)
    clock.now += 1.0
    it.abandon(trial=it.start())
    assert it.is_open
    assert it.delay() == 0.0


def test_a_late_success_closes_it_and_the_trials_failure_is_then_one_of_many(clock):
    it = opened(clock)
    clock.now += 1.0
    trial = it.start()
    assert it.succeed() is True  # of a request sent before
    assert it.fail(trial=trial) is False
    assert not it.is_open


def test_a_pause_that_is_asked_for_opens_at_once_and_is_kept_in_full(clock):
    it = breaker(clock)
    assert it.fail(trial=it.start(), pause=600.0) is True
    clock.now += 599.0
    assert it.delay() == pytest.approx(1.0)
    clock.now += 1.0
    assert it.delay() == 0.0


def test_an_outage_begins_when_it_opens_however_old_the_failures_before_are(clock):
    it = breaker(clock)
    for _ in range(2):
        it.fail(trial=it.start())
    clock.now += 900.0  # in which nobody asked
    assert it.fail(trial=it.start()) is True
    assert it.since == clock.now


def test_time_in_which_nobody_asks_is_no_outage(clock):
    it = opened(clock)
    clock.now += 1.0  # the pause
    clock.now += 900.0  # in which nobody asked
    it.fail(trial=it.start())
    assert clock.now - it.since == pytest.approx(1.0)
    clock.now += 2.0
    it.start()
    assert it.delay() == math.inf
    clock.now += 30.0  # the trial's own
    it.fail(trial=True)
    assert clock.now - it.since == pytest.approx(33.0)


NOW = 1_790_000_000.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30.0),
        ("6m0s", 360.0),
        ("1790000030", 30.0),  # Unix times: of seconds, milliseconds, microseconds
        ("1790000030.5", 30.5),
        ("1790000030000", 30.0),
        ("1790000030000000", 30.0),
        ("1789999000", 0.0),
        ("2026-09-21T14:13:50Z", 30.0),
        ("2026-09-21T16:13:50+02:00", 30.0),
        ("89798972", None),  # nearly three years: no limit of requests
        ("99999999999999999999", None),
        ("2026-99-99T00:00:00Z", None),
        ("soon", None),
        (None, None),
    ],
)
def test_a_reset_is_a_duration_or_a_time(text, seconds):
    found = parse_reset(text, now=NOW)
    assert found == (None if seconds is None else pytest.approx(seconds, abs=1e-3))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1790000007"}, 7.0),
        ({"retry-after": "1790000007000"}, 7.0),
        ({"retry-after-ms": "70"}, 0.07),
        ({"retry-after": "Mon, 21 Sep 2026 14:13:27 GMT"}, 7.0),
        ({"retry-after": "later"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_every_spelling(headers, seconds):
    found = parse_retry_after(headers, now=NOW)
    assert found == (None if seconds is None else pytest.approx(seconds, abs=1e-3))


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ({"error": {"details": [{"@type": "RetryInfo", "retryDelay": "3s"}]}}, 3.0),
        ([{"error": {"details": [{"retryDelay": "3.5s"}]}}], 3.5),
        ({"error": {"message": "Rate limit reached. Please try again in 6m0s."}}, 360.0),
        ({"error": {"message": "Please try again in 200ms. Visit ..."}}, 0.2),
        ({"error": {"message": "Please retry after 20 seconds."}}, 20.0),
        ({"error": {"message": "Try 3 models in 5 seconds or less"}}, None),
        ({"error": {"message": "slow down"}}, None),
        ("<html>", None),
    ],
)
def test_a_pause_is_read_where_only_the_body_names_it(body, seconds):
    assert Fault(body).pause == (None if seconds is None else pytest.approx(seconds))


def test_a_reset_that_is_a_unix_time_holds_back_for_as_long_as_it_is_away():
    bucket = Bucket(None, kind="requests", clock=lambda: 0.0, wall=lambda: NOW)
    told = {"limit": "20", "remaining": "0", "reset": "1790000030"}
    bucket.learn({f"x-ratelimit-{name}-requests": value for name, value in told.items()})
    assert bucket.delay(1) == pytest.approx(3.0)  # twenty in a minute
