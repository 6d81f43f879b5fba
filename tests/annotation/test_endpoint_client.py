"""The client over real HTTP: every fault ends as a `Trouble` or an error, and no key leaves it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import socket
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from contextlib import closing
from itertools import count
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import quote

import pytest

from dno_jax.annotation.question import Reply
from dno_jax.annotation.transport import routes
from dno_jax.annotation.transport.client import EndpointClient, Unreachable
from dno_jax.annotation.transport.completion import read_completion
from dno_jax.annotation.transport.probe import Capabilities
from dno_jax.annotation.transport.stop import Stop
from dno_jax.config import EndpointSection, OpenAISection, TeacherSection
from dno_jax.endpoint import Endpoint, EndpointError, Response, Trouble
from dno_jax.errors import DnoError
from tests.annotation.scripted import Answer, Asked, Scripted, after_probe, completion, fault, free_port, is_probe

T = TypeVar("T")
KEY = "planted.0123456789.do-not-leak"
BODY = {
    "model": "judge-1",
    "messages": [{"role": "user", "content": "Which is better?"}],
    "max_tokens": 16,
    "temperature": 0.0,
    "seed": 5,
}
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(routes, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(routes, "MAX_PAUSE_SECONDS", 0.05)


def section(*servers: Scripted | str, **fields: Any) -> OpenAISection:
    first, *more = [server if isinstance(server, str) else server.url for server in servers]
    fields = {"model": "judge-1", "api_key_env": None, "timeout": 20.0, "max_outage": 20.0, **fields}
    return OpenAISection(base_url=first, more_endpoints=tuple(EndpointSection(base_url=url) for url in more), **fields)


def with_client(config: OpenAISection | TeacherSection, work: Callable[[EndpointClient], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        client = EndpointClient(config, who="the judge 'judge-1'", place="annotation.openai")
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


def send_all(config: OpenAISection, number: int, **arguments: Any) -> list[Reply | Trouble]:
    async def work(client: EndpointClient) -> list[Reply | Trouble]:
        bodies = [{**BODY, "seed": n} for n in range(number)]
        return await asyncio.gather(*(client.send(body, **arguments) for body in bodies))

    return with_client(config, work)


def send_one(config: OpenAISection, **arguments: Any) -> Reply | Trouble:
    return send_all(config, 1, **arguments)[0]


def post_one(config: OpenAISection) -> Response | Trouble:
    return with_client(config, lambda client: client.endpoint.post("/chat/completions", BODY))


def first_then(*first: Answer, then: Answer | None = None) -> Callable[[Asked], Answer]:
    """Answer the first requests so, and all others well."""
    numbers = count()
    return after_probe(lambda _: first[n] if (n := next(numbers)) < len(first) else then or completion("fine"))


# What arrives


def test_a_reply_is_read_and_the_request_is_sent_as_it_is():
    with Scripted(after_probe(lambda _: completion("6/6"))) as server:
        reply = send_one(section(server))
        assert reply == Reply("6/6", finish="stop", model="served-1", tokens_in=7, tokens_out=3)
        (asked,) = server.chats
    assert asked.body == {**BODY, "seed": 0}


def test_the_first_tokens_log_probs_are_read():
    listed = [{"token": "m", "logprob": -0.25, "bytes": [109]}, {"token": "M", "logprob": -1.5}]
    later = {"token": "x", "logprob": -9.0, "top_logprobs": [{"token": "y", "logprob": -8.0}]}
    logprobs = {"content": [{**listed[0], "top_logprobs": listed}, later]}
    reply = read_completion(json.dumps(completion("m", logprobs=logprobs).body))
    assert reply is not None
    assert reply.first_logprobs == {"m": -0.25, "M": -1.5}


HALF = {"token": "?", "logprob": -0.1}  # of a character of several tokens; its other half looks the same


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"token": "z", "logprob": -4.0, "top_logprobs": [{"token": "m", "logprob": -0.1}]}], {"m": -0.1, "z": -4.0}),
        ([{"token": "m", "logprob": -0.1, "top_logprobs": []}], {"m": -0.1}),
        ([{"token": "m", "logprob": -0.1}], {"m": -0.1}),
        ([{**HALF, "top_logprobs": [HALF, {**HALF, "logprob": -7.0}]}], {"?": -0.1}),
        ([{"token": "m", "logprob": float("nan")}], None),
        ([{"token": "m", "logprob": "-0.1"}], None),
        ([{"token": "m", "logprob": True}], None),
        ([{"token": 7, "logprob": -0.1}], None),
        ([{"logprob": -0.1}], None),
        ([], None),
        (None, None),
        ("m", None),
    ],
)  # fmt: skip
def test_odd_log_probs_are_no_log_probs(content, expected):
    reply = read_completion(json.dumps(completion("m", logprobs={"content": content}).body))
    assert reply is not None
    assert reply.first_logprobs == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "7", "{", '{"choices": []}', '{"choices": [null]}', '{"choices": [{"message": null}]}',
        '{"choices": [{"message": {"content": 5}}]}', '{"choices": [{"message": {"content": ["6"]}}]}',
        '{"choices": [{"message": {"content": "x", "refusal": 1}}]}',
        '{"choices": [{"message": {"content": "x"}, "finish_reason": 3}]}',
        "<html>", "[" * 100_000, '{"choices": {"0": {"message": {"content": "x"}}}}',
    ],
)  # fmt: skip
def test_what_is_no_completion_is_none(text):
    assert read_completion(text) is None


def test_counts_that_are_none_are_zero_and_halved_surrogates_are_replaced():
    body = {
        "choices": [{"message": {"content": "a\ud800b é"}}],
        "usage": {"prompt_tokens": -5, "completion_tokens": 10**30},
    }
    reply = read_completion(json.dumps(body))
    assert reply == Reply("a?b é")
    reply.text.encode()


# Faults


@pytest.mark.parametrize(
    ("answer", "said", "then"),
    [
        (fault(500), "HTTP 500: planted", "retry"),
        (fault(429, "slow down", headers={"Retry-After": "0"}), "HTTP 429: slow down", "retry"),
        (fault(400, "too long", code="context_length_exceeded"), "HTTP 400: too long", "give up"),
        (fault(400, "policy", code="content_filter"), "HTTP 400: policy", "refused"),
        (fault(413), "HTTP 413: planted", "give up"),
        (Answer(fault="reset"), "the connection broke (ClientOSError)", "retry"),
        (Answer(body={"choices": [1, 2, 3]}, fault="truncated"), "the connection broke (ClientPayloadError)", "retry"),
        (Answer(body=b'{"choices": [{"message": {"content": "6'), "HTTP 200 without a chat completion", "retry"),
        (Answer(body=b"<html>a proxy's front page</html>"), "HTTP 200 without a chat completion: <html>", "retry"),
        (Answer(fault="hang"), "no answer within 1 s", "retry"),
    ],
    ids=["500", "429", "long", "filter", "413", "reset", "cut", "truncated", "html", "hang"],
)
def test_each_fault_is_one_try_and_says_what_follows(answer, said, then):
    with Scripted(after_probe(lambda _: answer)) as server:
        trouble = send_one(section(server, timeout=1.0 if answer.fault == "hang" else 20.0))
        assert len(server.chats) == 1
    assert isinstance(trouble, Trouble)
    assert trouble.detail.startswith(said)
    assert trouble.then == then
    assert not trouble.unreachable


def test_over_a_connection_that_was_never_made_nothing_was_sent(monkeypatch):
    config = section(f"http://127.0.0.1:{free_port()}/v1", timeout=20.0)
    with Scripted() as server:
        cases = {
            "ClientConnectorError": config,
            "ClientConnectorDNSError": config.model_copy(update={"base_url": "http://nowhere.invalid/v1"}),
            "ClientConnectorSSLError": config.model_copy(update={"base_url": server.url.replace("http", "https")}),
        }
        for name, case in cases.items():
            assert post_one(case) == Trouble(f"no connection ({name})", unreachable=True)
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
        proxied = config.model_copy(update={"base_url": "http://judge.invalid/v1"})
        assert post_one(proxied) == Trouble("no connection (ClientProxyConnectionError)", unreachable=True)
        assert not server.asked
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.port}")
        assert isinstance(post_one(proxied), Response)  # proxies of the environment are used
        assert server.asked[0].headers["host"] == "judge.invalid"


def test_a_connection_that_takes_too_long_was_never_made():
    with contextlib.closing(socket.socket()) as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # whom nobody accepts, until no more are let in
            waiting = stack.enter_context(contextlib.closing(socket.socket()))
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        found = post_one(section(f"http://127.0.0.1:{full.getsockname()[1]}/v1", timeout=1.0))
    assert found == Trouble("no connection (ConnectionTimeoutError)", unreachable=True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (fault(401, "bad key"), "put a key|name the environment variable"),
        (fault(403, "not yours"), "name the environment variable"),
        (fault(404, "no such model"), "fix annotation.openai.model, or base_url"),
        (fault(402, "pay"), "the account is used up"),
        (fault(429, "quota", code="insufficient_quota"), "the account is used up"),
    ],
    ids=["401", "403", "404", "402", "quota"],
)
def test_what_no_request_can_mend_raises_at_once(answer, expected):
    with Scripted(first_then(answer)) as server:
        with pytest.raises(EndpointError, match=expected):
            send_one(section(server))
        assert len(server.chats) == 1


def test_a_429_pauses_every_request_and_not_only_its_own():
    with Scripted(first_then(fault(429, headers={"Retry-After": "0.4"}))) as server:

        async def work(client: EndpointClient) -> None:
            await client.probe(BODY)
            assert isinstance(await client.send(BODY), Trouble)
            replies = await asyncio.gather(*(client.send({**BODY, "seed": n}) for n in range(6)))
            assert all(isinstance(reply, Reply) for reply in replies)

        with_client(section(server), work)
        refused, *later = server.chats
    assert len(later) == 6
    assert min(asked.at for asked in later) - refused.at >= 0.4


def test_remaining_requests_are_read_from_any_answer():
    headers = {
        "x-ratelimit-limit-requests": "600",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "59.7s",
    }
    with Scripted(first_then(Answer(status=400, body={"error": {"message": "odd"}}, headers=headers))) as server:

        async def work(client: EndpointClient) -> None:
            await client.send(BODY)
            await asyncio.gather(*(client.send({**BODY, "seed": n}) for n in range(6)))

        with_client(section(server), work)
        at = [asked.at for asked in server.chats]
    assert at[6] - at[0] >= 0.25  # three were left, and three come at ten a second


def test_tokens_a_minute_hold_requests_back_and_usage_corrects_the_estimate():
    with Scripted(after_probe(lambda _: completion())) as server:  # which uses 10

        async def work(client: EndpointClient) -> None:
            tokens = client._routes.all[0].tokens  # 100 a second
            await client.probe(BODY)
            began = time.monotonic()
            for _ in range(5):
                assert isinstance(await client.send(BODY, tokens=100), Reply)
                assert tokens.delay(100) < 0.11
            assert server.chats[-1].at - began >= 0.39
            server.script = lambda asked: fault(500)
            began = time.monotonic()
            for _ in range(2):
                await client.send(BODY, tokens=100)  # each may have been charged for
            assert server.chats[-1].at - began >= 0.9

        with_client(section(server, tokens_per_minute=6000), work)


def together(number: int, answer: Answer, *, first: bool = False) -> Callable[[Asked], Answer]:
    """Answer only when so many requests are in flight at once; those after the first so many at once."""
    barrier, count = threading.Barrier(number, timeout=30.0), itertools.count()

    def script(_: Asked) -> Answer:
        if next(count) < number or not first:
            barrier.wait()
        return answer

    return after_probe(script)


def test_never_more_in_flight_than_configured_and_fewer_after_failures():
    with Scripted(together(4, completion())) as server:

        async def work(client: EndpointClient) -> None:
            async def send(number: int) -> None:
                server.max_in_flight = 0
                await asyncio.gather(*(client.send({**BODY, "seed": n}) for n in range(number)))

            await send(16)
            assert server.max_in_flight == 4
            server.script = together(4, fault(500))
            await send(4)
            server.script = together(2, completion())
            await send(4)
            assert server.max_in_flight == 2

        with_client(section(server, max_concurrency=4), work)


def test_connections_are_used_again_however_the_requests_ended():
    with Scripted() as server:

        async def work(client: EndpointClient) -> None:
            endpoint = client.endpoint
            numbers = count()
            answers = [completion(), fault(500), Answer(fault="reset"), Answer(body=b"<html>")]
            for _ in range(3):
                server.script = together(20, completion())
                await asyncio.gather(*(endpoint.post("/chat/completions", BODY) for _ in range(20)))
                server.script = lambda asked: answers[next(numbers) % 4]
                for _ in range(8):
                    await endpoint.post("/chat/completions", BODY)
                server.script, before = (lambda asked: Answer(fault="hang")), len(server.asked)
                hanging = asyncio.create_task(endpoint.post("/chat/completions", BODY))
                while len(server.asked) == before:
                    await asyncio.sleep(0.01)
                hanging.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await hanging
            # Each round breaks two, and hangs up on a third.
            assert server.connections <= 20 + 3 * 3

        with_client(section(server), work)


def test_turns_come_in_the_order_of_asking():
    with Scripted(after_probe(lambda _: completion())) as server:
        send_all(section(server, max_concurrency=1), 20)
        assert [asked.body["seed"] for asked in server.chats] == list(range(20))


def test_a_cancelled_request_gives_its_slot_back():
    with Scripted(after_probe(lambda _: Answer(fault="hang"))) as server:

        async def work(client: EndpointClient) -> Reply | Trouble:
            await client.probe(BODY)
            hanging = asyncio.create_task(client.send(BODY))
            waiting = asyncio.create_task(client.send(BODY))
            while not server.chats:
                await asyncio.sleep(0.01)
            for task in (waiting, hanging):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            server.script = lambda asked: completion("fine")
            return await client.send(BODY)

        reply = with_client(section(server, max_concurrency=1), work)
    assert isinstance(reply, Reply)


# Several endpoints, and none


def test_while_the_preferred_endpoint_says_nothing_the_others_serve():
    port = free_port()
    with closing(socket.socket()) as silent, Scripted(after_probe(lambda _: completion("second"))) as second:

        async def work(client: EndpointClient) -> None:
            await client.probe(BODY)
            silent.bind(("127.0.0.1", port))
            silent.listen(8)  # takes connections, and never answers
            async with asyncio.timeout(30.0):  # less than a request may take
                assert [(await client.send(BODY)).text for _ in range(20)] == ["second"] * 20

        with_client(section(f"http://127.0.0.1:{port}/v1", second, timeout=60.0), work)


def test_after_a_stop_nobody_in_the_queue_sends_any_more():
    with Scripted(after_probe(lambda _: completion())) as server:

        async def work(client: EndpointClient) -> None:
            await client.probe(BODY)
            before = len(server.asked)
            waiting = [asyncio.ensure_future(client.send(BODY)) for _ in range(6)]
            while len(server.asked) == before:
                await asyncio.sleep(0.01)
            client.stop(DnoError("enough"))
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert sum(str(outcome) == "enough" for outcome in found) == 6 - (len(server.asked) - before) > 0
            with pytest.raises(DnoError, match="enough"):
                await client.send(BODY)

        with_client(section(server, requests_per_minute=60), work)


def test_a_stop_ends_the_wait_for_an_endpoint_that_wants_to_be_left_alone():
    with Scripted(lambda _: fault(429, headers={"Retry-After": "300"})) as server:

        async def work(client: EndpointClient) -> None:
            probing = asyncio.ensure_future(client.probe(BODY))
            while not server.asked:
                await asyncio.sleep(0.01)
            client.stop(DnoError("enough"))
            async with asyncio.timeout(30.0):
                with pytest.raises(DnoError, match="enough"):
                    await probing

        with_client(section(server, max_outage=600.0), work)
    assert len(server.asked) == 1


def test_a_busy_endpoint_is_waited_for_and_not_passed_over():
    with Scripted(together(2, completion("first"))) as first, Scripted() as second:
        results = send_all(section(first, second, max_concurrency=2), 6)
        assert [result.text for result in results if isinstance(result, Reply)] == ["first"] * 6
        assert not second.asked


def test_a_trial_that_is_cancelled_makes_room_for_the_next():
    with Scripted(after_probe(lambda _: fault(500))) as server:

        async def work(client: EndpointClient) -> Reply | Trouble:
            for _ in range(routes.FAILURES_OPEN):
                await client.send(BODY)
            server.script = lambda asked: Answer(fault="hang")
            trial = asyncio.create_task(client.send(BODY))
            while len(server.chats) <= routes.FAILURES_OPEN:
                await asyncio.sleep(0.01)
            trial.cancel()
            with pytest.raises(asyncio.CancelledError):
                await trial
            server.script = lambda asked: completion("fine")
            return await asyncio.wait_for(client.send(BODY), 20.0)

        assert isinstance(with_client(section(server), work), Reply)


def test_an_endpoint_is_probed_once_however_many_are_waiting():
    with Scripted(after_probe(lambda _: completion())) as server:
        send_all(section(server), 10)
        assert len(server.asked) == 10 + 2


def test_a_dead_endpoint_is_passed_over_and_returned_to(caplog):
    caplog.set_level(logging.WARNING, logger="dno_jax")
    port = free_port()
    with Scripted(after_probe(lambda _: completion("second"))) as second, contextlib.ExitStack() as stack:

        async def work(client: EndpointClient) -> None:
            for _ in range(12):
                assert (await client.send(BODY)).text == "second"
            first = stack.enter_context(Scripted(after_probe(lambda _: completion("first")), port=port))
            async with asyncio.timeout(30.0):  # the second serves until the first is known
                while (await client.send(BODY)).text == "second":
                    await asyncio.sleep(0.02)
            before = len(second.asked)
            assert [(await client.send(BODY)).text for _ in range(5)] == ["first"] * 5
            assert len(second.asked) == before
            assert [asked for asked in first.asked if is_probe(asked)]  # probed when it is first used

        with_client(section(f"http://127.0.0.1:{port}/v1", second), work)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert (
        f"127.0.0.1:{port}/v1 does not answer (no connection (ClientConnectorError)): {second.url} is asked" in said[0]
    )
    assert f"127.0.0.1:{port}/v1 answers again, after" in said[1]


def test_an_endpoint_that_dies_amid_the_run_costs_what_opens_the_breaker_and_no_more(monkeypatch):
    monkeypatch.setattr(routes, "FIRST_PAUSE_SECONDS", 60.0)
    first_dead = threading.Event()

    def script(asked: Asked) -> Answer:
        return fault(503) if first_dead.is_set() else completion("first")

    with Scripted(after_probe(script)) as first, Scripted(after_probe(lambda _: completion("second"))) as second:

        async def work(client: EndpointClient) -> None:
            assert (await client.send(BODY)).text == "first"
            first_dead.set()
            results = [await client.send(BODY) for _ in range(20)]
            assert all(isinstance(result, Trouble) for result in results[: routes.FAILURES_OPEN])
            assert [result.text for result in results[routes.FAILURES_OPEN :]] == ["second"] * 12

        with_client(section(first, second), work)


def test_a_long_retry_after_sends_to_the_next_endpoint():
    with Scripted(first_then(fault(429, headers={"Retry-After": "3600"}))) as first, Scripted() as second:

        async def work(client: EndpointClient) -> None:
            trouble = await client.send(BODY)
            assert isinstance(trouble, Trouble)
            assert trouble.then == "retry"  # elsewhere, or later: the request is not to blame
            assert isinstance(await client.send(BODY), Reply)

        with_client(section(first, second), work)
        assert (len(first.chats), len(second.chats)) == (1, 1)


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        passing = SimpleNamespace(monotonic=lambda: self.now, time=time.time)
        for module in ("endpoint", "annotation.transport.routes"):
            monkeypatch.setattr(f"dno_jax.{module}.time", passing)

    async def pause(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def test_a_probe_waits_no_longer_than_an_outage_may_last(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Stop, "pause", clock.pause)
    with Scripted(lambda _: fault(429, headers={"Retry-After": "400"})) as server:
        with pytest.raises(Unreachable, match="HTTP 429"):
            with_client(section(server, max_outage=600.0), lambda client: client.probe(BODY))
        assert clock.waits == [pytest.approx(400.0, abs=0.1), pytest.approx(200.0, abs=0.1)]
        assert len(server.asked) == 3


@pytest.mark.parametrize(("pauses", "waits"), [([250, 250], [250, 200]), ([400], [400])], ids=["cut", "anew"])
def test_an_endpoint_that_wants_to_be_left_alone_amid_the_probe_is_asked_again(pauses, waits, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Stop, "pause", clock.pause)
    left = iter(pauses)

    def script(asked: Asked) -> Answer:
        if "response_format" in asked.body and (pause := next(left, None)) is not None:
            return fault(429, headers={"Retry-After": str(pause)})
        return completion("{}")

    with Scripted(script) as server:
        found = with_client(section(server, max_outage=450.0), lambda client: client.probe(BODY))
    assert found.json_schema
    assert clock.waits == [pytest.approx(seconds, abs=0.1) for seconds in waits]


def test_a_probe_waits_for_the_endpoint_that_is_back_first(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Stop, "pause", clock.pause)
    numbers = count()
    soon = lambda _: completion() if next(numbers) else fault(503, headers={"Retry-After": "7"})  # noqa: E731
    with Scripted(lambda _: fault(429, headers={"Retry-After": "3600"})) as first, Scripted(soon) as second:
        with_client(section(first, second, max_outage=600.0), lambda client: client.probe(BODY))
    assert clock.waits == [pytest.approx(7.0, abs=0.1)]


@pytest.fixture
def fake_wait(monkeypatch) -> Clock:
    """Routes that wait on a clock of their own, by whom nobody else is held up."""
    clock = Clock(monkeypatch)

    async def wait(self: routes.Routes, seconds: float, *, patience: float) -> None:
        await clock.pause(min(seconds, patience))

    monkeypatch.setattr(routes.Routes, "_wait", wait)
    return clock


def known_routes(**fields: Any) -> routes.Routes:
    config = section("http://a/v1", **fields)
    endpoint = Endpoint(who="the judge", place="p", url="http://a/v1", api_key_env=None, timeout=20.0)
    assert endpoint.words("half \ud83d of a character").encode() == b"half ? of a character"
    found = routes.Routes([endpoint], config, who="the judge", place="annotation.openai")
    found.all[0].offers = Capabilities()
    return found


async def nobody(route: routes.Route) -> None:
    raise AssertionError("all are known")


def test_one_endpoints_retry_after_is_kept_to_within_max_outage_and_beyond_it_ends_the_run(fake_wait):
    async def work() -> None:
        found = known_routes(max_outage=600.0)
        found.settle(await found.turn(0, introduce=nobody), Trouble("slow", status=429, retry_after=400.0))
        began = fake_wait.now
        found.settle(await found.turn(0, introduce=nobody), Reply("fine"))
        assert fake_wait.now - began >= 400.0
        found.settle(await found.turn(0, introduce=nobody), Trouble("slow", status=429, retry_after=3600.0))
        with pytest.raises(Unreachable, match="for 600 s"):
            await found.turn(0, introduce=nobody)

    asyncio.run(work())


def test_a_burst_of_429_is_one_piece_of_news(fake_wait, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.5)

    async def work() -> None:
        found = known_routes(max_concurrency=32)
        (route,) = found.all
        for most in (0.5, 1.0, 2.0):  # a round each
            turns = [await found.turn(0, introduce=nobody) for _ in range(route.slots.limit)]
            for turn in turns:
                found.settle(turn, Trouble("slow down", status=429))
            assert most / 2 <= route.paused_until - fake_wait.now <= most
            fake_wait.now = route.paused_until

    asyncio.run(work())


def test_old_failures_do_not_age_an_outage(fake_wait):
    async def work() -> None:
        found = known_routes(max_outage=600.0)
        for number in range(routes.FAILURES_OPEN):
            if number == 5:
                fake_wait.now += 900.0  # between two shards
            found.settle(await found.turn(0, introduce=nobody), Trouble("HTTP 500", status=500))
        assert (await found.turn(0, introduce=nobody)).trial

    asyncio.run(work())


def test_a_long_wait_is_said_once_and_again_when_it_is_twice_as_long(caplog, monkeypatch):
    monkeypatch.setattr(routes, "LONG_WAIT_SECONDS", 0.01)

    async def work() -> None:
        found = known_routes()
        for seconds in (0.02, 0.02, 0.03, 0.05):
            await found._wait(seconds, patience=math.inf)
        await found._wait(0.2, patience=0.01)  # nobody answers, which was said

    asyncio.run(work())
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2, said
    assert "the judge: waiting" in said[0]


# An endpoint that refuses


REFUSALS = [
    fault(401, "bad key"), fault(403, "not yours"), fault(404, "no such model"), fault(402, "pay"),
    fault(429, "quota", code="insufficient_quota"),
]  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS, ids=["401", "403", "404", "402", "quota"])
def test_an_endpoint_that_refuses_is_asked_no_more_and_the_others_are(refusal, caplog):
    with (
        Scripted(together(4, refusal, first=True)) as first,
        Scripted(after_probe(lambda _: completion("second"))) as second,
    ):
        results = send_all(section(first, second, max_concurrency=4), 8)
        assert [result.text for result in results if isinstance(result, Reply)] == ["second"] * 8
        # A 403 or 404 may be meant for one question: another may be on its way before the second of them is read.
        assert 4 <= len(first.chats) <= (5 if refusal.status in (403, 404) else 4)
    (said,) = [record.getMessage() for record in caplog.records]
    assert refusal.body["error"]["message"] in said
    assert said.endswith(f"; {first.url} is asked no more in this run, but {second.url}")


def test_when_all_endpoints_refuse_the_run_stops_at_once():
    with Scripted(lambda _: fault(401, "bad key")) as first, Scripted(first_then(fault(402, "pay"))) as second:

        async def work(client: EndpointClient) -> None:
            await client.probe(BODY)
            assert client.endpoint.url == second.url
            assert client.offers is not None
            with pytest.raises(EndpointError, match="the account is used up"):
                await client.send(BODY)

        with_client(section(first, second), work)
        assert (len(first.asked), len(second.chats)) == (1, 1)


def no_logprobs(asked: Asked) -> Answer:
    return completion("m")


@pytest.mark.parametrize(
    ("backup", "said"),
    [(lambda _: fault(401, "bad key"), "HTTP 401"), (lambda _: fault(404, "no model"), "HTTP 404"),
     (no_logprobs, "gives no log-probabilities")],
    ids=["401", "404", "logprobs"],
)  # fmt: skip
def test_a_backup_that_will_not_do_leaves_a_run_whose_first_is_briefly_away(backup, said, caplog):
    body = {**BODY, "logprobs": True, "top_logprobs": 1}
    with Scripted(after_probe(lambda _: completion("first"))) as first, Scripted(backup) as second:

        async def work(client: EndpointClient) -> Reply | Trouble:
            await client.probe(body)
            first.script = after_probe(lambda _: fault(503))
            for _ in range(routes.FAILURES_OPEN):
                await client.send(body)
            waiting = asyncio.create_task(client.send(body))
            while not second.asked:
                await asyncio.sleep(0.01)
            first.script = after_probe(lambda _: completion("first"))
            result = await waiting
            await client.drain()  # the first may have answered before the second's words were read
            return result

        result = with_client(section(first, second, form="logprob"), work)
        assert len(second.asked) == 1
    assert isinstance(result, Reply) or result.status == 503  # a trial that came too early
    assert [record for record in caplog.records if said in record.getMessage()]


def test_an_input_that_was_flagged_is_refused_and_stops_nothing():
    flagged = {"reasons": ["violence"], "flagged_input": "Which is", "provider_name": "OpenAI", "model_slug": "o/m"}
    with Scripted(first_then(fault(403, "flagged for violence", code=403, metadata=flagged))) as server:
        first, second = send_all(section(server, max_concurrency=1), 2)
    assert isinstance(first, Trouble)
    assert (first.then, first.status, first.detail) == ("refused", 403, "HTTP 403: flagged for violence")
    assert isinstance(second, Reply)


def test_the_run_goes_on_when_an_endpoint_comes_back(caplog):
    caplog.set_level(logging.WARNING, logger="dno_jax")
    down = threading.Event()

    def script(asked: Asked) -> Answer:
        return Answer(fault="reset") if down.is_set() else completion("back")

    with Scripted(after_probe(script)) as server:

        async def work(client: EndpointClient) -> list[Reply | Trouble]:
            await client.probe(BODY)
            down.set()
            await asyncio.gather(*(client.send({**BODY, "seed": n}) for n in range(routes.FAILURES_OPEN)))
            server.max_in_flight = 0
            waiting = [asyncio.create_task(client.send({**BODY, "seed": 100 + n})) for n in range(20)]
            while len(server.chats) < routes.FAILURES_OPEN + 2:
                await asyncio.sleep(0.01)
            assert server.max_in_flight == 1  # one trial at a time
            down.clear()
            return await asyncio.gather(*waiting)

        results = with_client(section(server), work)
    failed = [result for result in results if isinstance(result, Trouble)]
    assert 2 <= len(failed) < len(results)
    assert isinstance(results[-1], Reply)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert (
        "does not answer (the connection broke (ClientOSError)): waiting up to max_outage=20 s until it does" in said[0]
    )
    assert "answers again" in said[1]


def test_no_endpoint_for_max_outage_ends_the_run_and_names_the_remedy():
    dead = [f"http://127.0.0.1:{free_port()}/v1" for _ in range(2)]
    began = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        send_all(section(*dead, max_outage=0.4), 20)
    assert time.monotonic() - began >= 0.4
    for part in (*dead, "max_outage=0.4 s", "fix annotation.openai.base_url", "ClientConnectorError", "is kept"):
        assert part in str(caught.value)


def test_an_attempt_that_reached_nobody_is_no_try():
    port = free_port()

    async def work(client: EndpointClient) -> Reply | Trouble:
        task = asyncio.create_task(client.send(BODY))
        await asyncio.sleep(0.2)
        with Scripted(after_probe(lambda _: completion("fine")), port=port):
            return await task

    reply = with_client(section(f"http://127.0.0.1:{port}/v1"), work)
    assert isinstance(reply, Reply)


# What the endpoint offers


def offers(script: Callable[[Asked], Answer], **fields: Any) -> tuple[Capabilities, list[Asked]]:
    with Scripted(script) as server:
        body = {**BODY, **fields.pop("body", {})}
        found = with_client(section(server, **fields), lambda client: client.probe(body))
        return found, server.asked


def test_the_probe_uses_the_real_parameters_and_small_messages():
    found, asked = offers(after_probe(lambda _: fault(500)))
    assert found == Capabilities(seed=True, json_schema=True)
    plain, schema = (request.body for request in asked)
    assert {name: value for name, value in plain.items() if name != "messages"} == {
        name: value for name, value in BODY.items() if name != "messages"
    }
    assert schema["response_format"]["type"] == "json_schema"


def test_what_an_endpoint_does_not_take_is_not_sent(caplog):
    caplog.set_level(logging.WARNING, logger="dno_jax")

    def script(asked: Asked) -> Answer:
        if "seed" in asked.body:
            return fault(422, "[{'type': 'extra_forbidden', 'loc': ['body', 'seed']}]")
        if "response_format" in asked.body:
            return fault(404, "nobody offers that")
        return completion("fine")

    with Scripted(script) as server:

        async def work(client: EndpointClient) -> Capabilities:
            found = await client.probe(BODY)
            assert isinstance(await client.send(BODY, schema=SCHEMA), Reply)
            return found

        found = with_client(section(server), work)
        (asked,) = server.chats
    assert (found.seed, found.json_schema) == (False, False)
    assert set(asked.body) == {"model", "messages", "max_tokens", "temperature"}
    assert [record.getMessage() for record in caplog.records if "takes no seed" in record.getMessage()]


@pytest.mark.parametrize(("structured", "sent"), [("auto", True), ("json_schema", True), ("none", False)])
def test_a_schema_is_sent_where_it_is_taken_and_wanted(structured, sent):
    with Scripted(after_probe(lambda _: completion("{}"))) as server:
        send_one(section(server, structured=structured), schema=SCHEMA)
        (asked,) = server.chats
    if not sent:
        assert "response_format" not in asked.body
        return
    form = asked.body["response_format"]["json_schema"]
    assert (form["schema"], form["strict"]) == (SCHEMA, True)


@pytest.mark.parametrize(
    ("refused", "fields", "remedy"),
    [
        ("temperature", {}, "set annotation.openai.temperature=null"),
        ("max_tokens", {}, "set annotation.openai.max_tokens_field=max_completion_tokens"),
        ("logprobs", {"body": {"logprobs": True, "top_logprobs": 5}}, "set annotation.openai.form=pairwise"),
        ("response_format", {"structured": "json_schema"}, "set annotation.openai.structured=none"),
        ("top_p", {"body": {"top_p": 0.9}}, "set annotation.openai.top_p=null"),
    ],
)
@pytest.mark.parametrize("names_it", ["param", "message"])
def test_a_parameter_that_is_refused_is_named_with_its_remedy(refused, fields, remedy, names_it):
    def script(asked: Asked) -> Answer:
        if refused not in asked.body:
            return completion()
        said = f"Unsupported parameter: '{refused}' is not supported with this model. Use 'temperature' or 'seed'."
        return fault(400, "no", param=refused) if names_it == "param" else fault(400, said)

    with pytest.raises(DnoError, match=remedy) as caught:
        offers(script, **fields)
    assert "does not take a request: HTTP 400" in str(caught.value)


def test_log_probs_that_are_needed_and_not_given_end_the_run():
    with pytest.raises(DnoError, match="gives no log-probabilities; choose a model"):
        offers(lambda asked: completion("m"), body={"logprobs": True, "top_logprobs": 5}, form="logprob")


def test_a_probe_outlasts_faults_of_the_moment():
    faults = [fault(500), Answer(fault="reset"), fault(429, headers={"Retry-After": "0"}), Answer(body=b"<html>")]
    numbers = count()
    found, _ = offers(lambda asked: faults[n // 2] if (n := next(numbers)) % 2 == 0 and n < 8 else completion())
    assert found.json_schema


def test_a_probe_does_not_wait_for_an_endpoint_that_is_not_there():
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(Unreachable, match="no endpoint answered in 3 tries"):
        with_client(section(url, max_tries=3, max_outage=600.0), lambda client: client.probe(BODY))


def test_a_teacher_is_not_asked_for_schemas():
    with Scripted(after_probe(lambda _: completion())) as server:
        config = TeacherSection(base_url=server.url, api_key_env=None)
        found = with_client(config, lambda client: client.probe(BODY))
        assert not [asked for asked in server.asked if "response_format" in asked.body]
    assert not found.json_schema


# Keys


def test_the_key_is_sent_and_appears_nowhere_else(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PLANTED_KEY", f"{KEY}\n")
    echoes = [
        fault(500, f"Authorization: Bearer {KEY}"),
        fault(400, f"your key {KEY} is fine", param=KEY),
        Answer(status=503, body=f"<html>{KEY}</html>".encode()),
        Answer(body=f'{{"not a completion": "{KEY}"}}'.encode()),
        completion(f"the key was {KEY}, and a sk-learning model"),
        fault(401, f"Incorrect API key provided: {KEY}"),
    ]
    with Scripted(first_then(*echoes)) as server:

        async def work(client: EndpointClient) -> list[Any]:
            await client.probe(BODY)
            seen: list[Any] = [repr(client)]
            for _ in echoes[:-1]:
                seen.append(await client.send(BODY))
            with pytest.raises(DnoError) as caught:
                await client.send(BODY)
            seen.append("".join(traceback.format_exception(caught.value)))
            assert caught.value.__context__ is None
            assert client.scrub(f"a {KEY} b") == "a [key] b"
            assert KEY not in client.words(f"{'x' * 280} {KEY}")
            return seen

        seen = with_client(section(server, api_key_env="PLANTED_KEY"), work)
        assert all(asked.headers["authorization"] == f"Bearer {KEY}" for asked in server.asked)
    assert KEY not in "\n".join(map(repr, seen))
    assert KEY not in caplog.text
    assert "[key]" in repr(seen[1])
    # A reply is kept as it is but for the key itself.
    assert seen[5].text == "the key was [key], and a sk-learning model"


def test_each_endpoint_gets_its_own_key_and_no_other(monkeypatch):
    monkeypatch.setenv("SECOND_KEY", KEY)
    monkeypatch.setenv("FIRST_KEY", f"{KEY}.of-the-first")
    port = free_port()
    with Scripted() as second:
        config = OpenAISection(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key_env="FIRST_KEY",
            more_endpoints=(EndpointSection(base_url=second.url, api_key_env="SECOND_KEY"),),
        )
        assert isinstance(send_one(config), Reply)
        assert {asked.headers["authorization"] for asked in second.asked} == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (EndpointSection(base_url="ftp://x"), "annotation.openai.more_endpoints.0.base_url"),
        (
            EndpointSection(base_url="http://x/v1", api_key_env="NO_SUCH_KEY"),
            "more_endpoints.0: the environment variable",
        ),
    ],
)
def test_another_endpoint_that_is_wrong_is_named_before_anything_is_sent(more, expected):
    config = OpenAISection(base_url="http://127.0.0.1:1/v1", api_key_env=None, more_endpoints=(more,))
    with pytest.raises(DnoError, match=expected):
        EndpointClient(config, who="the judge", place="annotation.openai")


@pytest.mark.parametrize("key", ["sk-1234", "1234", "a/b+c=d e", KEY])
def test_a_key_of_any_length_is_scrubbed_in_headers_and_urls_too(key, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PLANTED_KEY", key)
    headers = {"X-Your-Key": key, "X-Ratelimit-Limit-Requests": key}
    said = f"GET http://u:{key}@judge/v1?key={quote(key, safe='')} failed"
    answers = [Answer(body=completion(f"it was {key}").body, headers=headers), fault(500, said, headers=headers)]
    with Scripted(first_then(*answers)) as server:
        config = section(server, api_key_env="PLANTED_KEY", max_concurrency=1)  # in the order of the answers
        reply, trouble = send_all(config, 2)
        assert server.chats[0].headers["authorization"] == f"Bearer {key}"
    assert reply.text == "it was [key]"
    assert trouble.detail == "HTTP 500: GET http://u:[key]@judge/v1?key=[key] failed"
    for text in (repr(reply), repr(trouble), repr(Response("", {"x": key})), caplog.text):
        assert key not in text
        assert quote(key, safe="") not in text


@pytest.mark.parametrize(
    "spell",
    [
        lambda char: char,
        lambda char: "\\/" if char == "/" else char,
        lambda char: f"\\u{ord(char):04x}",
        lambda char: f"\\u{ord(char):04X}" if char in "/+" else char,
        lambda char: f"%{ord(char):02X}",
        lambda char: f"%{ord(char):02x}" if char == "=" else char,
    ],
    ids=["as it is", "PHP", "escaped", "partly escaped", "URL", "partly URL"],
)
def test_a_key_is_found_however_json_or_a_url_spells_it(spell, monkeypatch):
    key = "Zm9v/YmFy+cXV4/b3JnMTIz=="
    monkeypatch.setenv("PLANTED_KEY", key)
    spelt = "".join(map(spell, key))
    with Scripted(after_probe(lambda _: completion(f"50 % of {spelt} \\n"))) as server:
        assert send_one(section(server, api_key_env="PLANTED_KEY")).text == "50 % of [key] \\n"


@pytest.mark.parametrize("charset", ["utf-16", "idna", "hex", "rot13", "undefined", "nonesuch"])
def test_a_charset_that_no_text_has_is_no_reason_to_stop(charset):
    """JSON is UTF-8, and an error page may be anything: a failed try, and no traceback."""
    headers = {"content-type": f"text/html; charset={charset}"}
    answers = [Answer(body=completion("good").body, headers=headers), Answer(503, {"error": "x"}, headers=headers)]
    with Scripted(first_then(*answers)) as server:
        reply, trouble = send_all(section(server, max_concurrency=1), 2)
    assert reply.text == "good"
    assert isinstance(trouble, Trouble)
    assert trouble.then == "retry"


def test_a_log_probability_beyond_every_float_is_none():
    body = completion(logprobs={"content": [{"token": "m", "logprob": -(10**400), "top_logprobs": []}]}).body
    found = read_completion(json.dumps(body))
    assert found is not None
    assert found.first_logprobs is None


@pytest.mark.parametrize("key", ["none", "EMPTY", "x", "Not-Needed"])
def test_a_placeholder_is_no_secret_and_garbles_no_word(key, monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", key)
    with Scripted(after_probe(lambda _: completion(f"the text {key}"))) as server:
        assert send_one(section(server, api_key_env="PLANTED_KEY")).text == f"the text {key}"


@pytest.mark.parametrize("key", ["a", "abc"])
def test_a_key_too_short_to_be_scrubbed_is_refused(key, monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", key)
    with pytest.raises(DnoError, match=r"PLANTED_KEY holds \d characters, too few .* set p\.api_key_env=null"):
        Endpoint(who="the judge", place="p", url="http://a/v1", api_key_env="PLANTED_KEY", timeout=1.0)
