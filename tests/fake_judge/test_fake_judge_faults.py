"""The faults of the fake judge, as the real client and the wire see them; chance, rates and delays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from dno_jax.annotation.question import Unparsable
from dno_jax.fake_judge import FAULTS, OUTCOMES, Behaviour, FakeJudge
from dno_jax.fake_judge.behaviour import draw_delay
from tests.annotation.asking import (
    address_of,
    ask,
    chat,
    client_of,
    judge_many,
    listwise,
    pairwise,
    raw_request,
    read_to_end,
    scores,
    text_of,
    token,
)

# faults

CONNECTION = {
    "hang": openai.APITimeoutError,
    "close": openai.APIConnectionError,
    "reset": openai.APIConnectionError,
    "truncated": openai.APIConnectionError,
}


@pytest.mark.parametrize("outcome", CONNECTION)
def test_connections_that_fail(outcome):
    with FakeJudge(schedule=[outcome]) as server, client_of(server, timeout=0.5) as client:
        with pytest.raises(CONNECTION[outcome]) as caught:
            client.chat.completions.create(**listwise("a", "b"))
        assert (outcome == "hang") == isinstance(caught.value, openai.APITimeoutError)
        client.with_options(timeout=20.0).chat.completions.create(**listwise("a", "b"))
        assert server.counts.outcomes == {outcome: 1, "ok": 1}
        assert server.counts.in_flight == 0


def test_the_ways_in_which_a_connection_ends_are_told_apart():
    """What the client calls one error is three on the wire: nothing, a reset, half of the body."""
    found = {}
    for outcome in ("close", "reset", "truncated"):
        with FakeJudge(schedule=[outcome]) as server, socket.create_connection(address_of(server)) as connection:
            connection.sendall(raw_request(listwise("a", "b")))
            try:
                found[outcome] = read_to_end(connection)
            except ConnectionResetError:
                found[outcome] = None
    assert found["close"] == b""
    assert found["reset"] is None
    head, _, body = found["truncated"].partition(b"\r\n\r\n")
    assert 0 < len(body) < int(re.search(rb"(?i)content-length: (\d+)", head)[1])


def test_a_trickle_never_ends():
    async def work(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=0.3) as client:
            with pytest.raises(TimeoutError):  # of ours: the client's counts silence only
                async with asyncio.timeout(1.0):
                    await client.chat.completions.create(**listwise("a", "b"))

    with FakeJudge(schedule=["trickle"]) as server:
        asyncio.run(work(server.url))


@pytest.mark.parametrize("status", [400, 403, 404, 408, 422, 429, 500, 502, 503, 529])
def test_statuses(status):
    with FakeJudge(schedule=[str(status)], retry_after="7.5") as server, pytest.raises(openai.APIStatusError) as caught:
        ask(server, listwise("a", "b"))
    assert caught.value.status_code == status
    assert caught.value.response.headers.get("retry-after") == ("7.5" if status == 429 else None)


def test_bodies_that_are_no_completion():
    with FakeJudge(schedule=["html", "cut_json", "no_choices"]) as server, client_of(server) as client:
        replies = [client.chat.completions.with_raw_response.create(**listwise("a", "b")).text for _ in range(3)]
    assert replies[0].startswith("<html>")
    with pytest.raises(json.JSONDecodeError):
        json.loads(replies[1])
    assert replies[1].startswith('{"id": "chatcmpl-')
    assert json.loads(replies[2])["choices"] == []


@pytest.mark.parametrize(
    ("outcome", "content", "refusal", "finish"),
    [
        ("refusal", None, "I cannot help with that.", "stop"),
        ("filter", "", None, "content_filter"),
        ("null", None, None, "stop"),
        ("empty", "", None, "stop"),
    ],
)
@pytest.mark.parametrize("form", [listwise, pairwise, token])
def test_messages_without_an_answer(form, outcome, content, refusal, finish):
    with FakeJudge(schedule=[outcome]) as server:
        choice = ask(server, form("a", "b"))[0].choices[0]
    assert (choice.message.content, choice.message.refusal, choice.finish_reason) == (content, refusal, finish)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("garbage", "not one JSON object"),
        ("echo", "not one JSON object"),
        ("malformed", "not one JSON object"),
        ("length", "not one JSON object"),
        ("wrong_ids", "got 0, 1, 2"),
        ("too_few", "got 1, 2"),
        ("too_many", "got 1, 2, 3, 4"),
        ("out_of_range", "score 7 is outside 1..6"),
    ],
)
def test_spoilt_lists(outcome, reason):
    with FakeJudge(schedule=[outcome]) as server:
        with pytest.raises(Unparsable, match=re.escape(reason)):
            scores(server, "a", "b", "c")
        scores(server, "a", "b", "c")
        assert (server.requests, server.duplicates) == (2, 0)


def test_spoilt_pairs():
    outcomes = ["too_few", "too_many", "out_of_range", "wrong_ids"]
    with FakeJudge(schedule=[*outcomes, "garbage", "malformed"]) as server:
        said = [json.loads(text_of(server, pairwise("a", "bb"))) for _ in outcomes]
        for _ in range(2):
            with pytest.raises(json.JSONDecodeError):
                json.loads(text_of(server, pairwise("a", "bb")))
    assert [sorted(one) for one in said] == [
        ["justification"],
        ["justification", "verdict", "verdict 2"],
        ["justification", "verdict"],
        ["justification", "winner"],
    ]
    assert said[2]["verdict"] == "both"


def test_spoilt_tokens():
    with FakeJudge(schedule=["too_few", "wrong_ids", "out_of_range", "too_many"]) as server:
        few, wrong, high, many = (one.choices[0] for one in ask(server, *[token("a", "b", max_tokens=9)] * 4))
    assert few.logprobs is None
    assert not {"m", "M"} & {one.token for one in wrong.logprobs.content[0].top_logprobs}
    assert not any(one.logprob <= 0.0 for one in high.logprobs.content[0].top_logprobs)
    assert many.message.content == many.logprobs.content[0].token == "mM"
    assert not {"m", "M"} & {one.token for one in many.logprobs.content[0].top_logprobs}


def test_faults_that_a_request_cannot_have_are_none():
    with FakeJudge(schedule=["length", "garbage"]) as server:
        (verdict, answer) = ask(server, token("a", "b"), chat("q"))
        assert verdict.choices[0].message.content in ("m", "M")
        assert answer.choices[0].finish_reason == "stop"
        assert server.counts.outcomes == {"ok": 2}


def test_every_outcome_has_its_test():
    tested = {"ok", "trickle", *CONNECTION, "html", "cut_json", "no_choices", "refusal", "filter", "null", "empty"}
    tested |= {"garbage", "echo", "malformed", "length", "wrong_ids", "too_few", "too_many", "out_of_range"}
    assert tested == set(OUTCOMES)


def test_a_key_is_told_in_all_that_is_said():
    key = "sk-planted-0123456789abcdef"
    with FakeJudge(echoes_key=True, schedule=["ok", "garbage", "refusal", "html", "400"]) as server:
        with client_of(server, key=key) as client:
            create = client.chat.completions.with_raw_response.create
            for _ in range(4):
                answer = create(**listwise("a", "b"))
                assert key in answer.text
                assert answer.headers["x-key"] == key
            with pytest.raises(openai.BadRequestError, match=key):
                create(**listwise("a", "b"))
            (verdict,) = client.chat.completions.create(**listwise("a", "b")).choices
        assert set(json.loads(verdict.message.content)) == {"1", "2"}


def test_refusals_last_and_faults_pass():
    bodies = [pairwise(f"{n} q=0.9", "q=0.1") for n in range(60)]
    faulty = FakeJudge(fraction=0.5, faults=["refusal"], batch_delay=0.0)
    with faulty, FakeJudge(refusals=0.5, batch_delay=0.0) as refusing:
        for server, lasts in ((faulty, False), (refusing, True)):
            rounds = [[one["choices"][0]["message"]["refusal"] for one in judge_many(server, bodies)] for _ in range(2)]
            assert 10 <= sum(refusal is not None for refusal in rounds[0]) <= 50
            assert (rounds[0] == rounds[1]) == lasts


# chance


def outcomes_of(bodies: Sequence[dict[str, Any]], **fields: Any) -> dict[str, list[str]]:
    """digest -> outcomes by attempt, of three requests each."""
    with FakeJudge(**fields) as server, client_of(server) as client:
        for body in bodies:
            with contextlib.suppress(openai.OpenAIError):
                client.chat.completions.create(**body)
    found: dict[str, list[str]] = {}
    for entry in server.log:
        found.setdefault(entry.body, []).append(entry.outcome)
    return found


def test_what_becomes_of_a_request_is_no_matter_of_its_neighbours():
    faults = tuple(name for name in FAULTS if name != "hang")
    bodies = [pairwise(f"{n}", "other") for n in range(12)]
    found = outcomes_of(bodies * 3, fraction=0.5, faults=faults, seed=3)
    assert outcomes_of([*bodies[::-1], *bodies, *bodies], fraction=0.5, faults=faults, seed=3) == found
    assert outcomes_of(bodies * 3, fraction=0.5, faults=faults, seed=4) != found
    assert len({tuple(one) for one in found.values()}) > 3
    met = Counter(outcome for one in found.values() for outcome in one)
    assert 8 <= met["ok"] <= 28  # of 36
    assert len(met) > 4


def test_delays_have_their_distributions():
    def drawn(**fields: Any) -> list[float]:
        behaviour = Behaviour(delay=0.2, **fields)
        return [draw_delay(behaviour, number) for number in range(4000)]

    assert set(drawn()) == {0.2}
    exponential = drawn(delay_shape="exponential")
    assert statistics.mean(exponential) == pytest.approx(0.2, rel=0.08)  # five standard errors
    assert statistics.median(exponential) == pytest.approx(0.2 * math.log(2), rel=0.12)
    logs = [math.log(one) for one in drawn(delay_shape="lognormal", delay_sigma=0.8)]
    assert statistics.mean(logs) == pytest.approx(math.log(0.2), abs=0.065)
    assert statistics.stdev(logs) == pytest.approx(0.8, rel=0.06)
    assert drawn(delay_shape="exponential", seed=1) != exponential


def test_an_answer_waits_for_its_delay():
    with FakeJudge(delay=0.1) as server:
        start = time.monotonic()
        ask(server, listwise("a", "b"))
        assert time.monotonic() - start >= 0.1


# rates


def test_requests_a_minute():
    limits = {"requests_per_minute": 60, "burst_seconds": 2.0, "tokens_per_minute": 10**6}
    with FakeJudge(**limits) as server, client_of(server) as client:
        create = client.chat.completions.with_raw_response.create
        headers = create(**listwise("a", "b")).headers
        assert headers["x-ratelimit-limit-requests"] == "60"
        assert headers["x-ratelimit-remaining-requests"] == "1"
        assert re.fullmatch(r"\d+ms|1s", headers["x-ratelimit-reset-requests"])
        assert int(headers["x-ratelimit-remaining-tokens"]) <= 10**6 / 30 - 2048  # max_tokens is more than the prompt
        with pytest.raises(openai.RateLimitError, match="try again in") as caught:
            ask(server, *[listwise("a", "b")] * 100)
        told = caught.value.response.headers
        assert told["retry-after"] == "1"
        assert told["x-ratelimit-remaining-requests"] == "0"
        time.sleep(int(told["retry-after-ms"]) / 1000)
        create(**listwise("a", "b"))
        assert server.counts.outcomes["limited"] == 1
        assert max(server.counts.tries.values()) == server.counts.outcomes["ok"]  # what is sent away is no attempt


def test_tokens_a_minute_and_requests_that_never_fit():
    with FakeJudge(tokens_per_minute=6000, burst_seconds=30.0) as server, client_of(server) as client:
        headers = client.chat.completions.with_raw_response.create(**listwise("a", "b", max_tokens=2900)).headers
        assert headers["x-ratelimit-limit-tokens"] == "6000"
        assert re.fullmatch(r"2\d(\.\d+)?s", headers["x-ratelimit-reset-tokens"])
        assert "x-ratelimit-limit-requests" not in headers
        with pytest.raises(openai.RateLimitError, match="try again in"):
            client.chat.completions.create(**listwise("a", "b", max_tokens=2900))
        with pytest.raises(openai.RateLimitError, match="too large") as caught:
            client.chat.completions.create(**listwise("a", "b", max_tokens=3001))
        assert "retry-after" not in caught.value.response.headers


# the wire


def test_requests_in_pieces_and_several_at_once():
    request = raw_request(pairwise("a", "b"))
    with FakeJudge(delay=0.02) as server, socket.create_connection(address_of(server)) as connection:
        for start in range(0, len(request), 400):
            connection.sendall(request[start : start + 400])
        connection.sendall(request + raw_request(pairwise("a", "b"), "Connection: close"))
        found = read_to_end(connection)
    assert found.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert server.requests == 3
    assert server.max_in_flight == 1


def test_a_client_that_waits_for_leave_to_send_gets_it():
    head, _, body = raw_request(chat("q"), "Expect: 100-continue", "Connection: close").partition(b"\r\n\r\n")
    with FakeJudge() as server, socket.create_connection(address_of(server)) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_body_in_chunks_is_taken():
    content = json.dumps(chat("q")).encode()
    chunks = [content[:10], content[10:], b""]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with FakeJudge() as server, socket.create_connection(address_of(server)) as connection:
        connection.sendall(head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks))
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 OK\r\n")
        assert server.bodies == [chat("q")]


def test_a_client_that_goes_amid_its_request_or_its_answer_leaves_nothing_behind():
    request = raw_request(pairwise("a", "b"))
    with FakeJudge(delay=60.0) as server:
        for sent in (request[:-5], request):
            with socket.create_connection(address_of(server)) as connection:
                connection.sendall(sent)
                while sent == request and not server.counts.in_flight:
                    time.sleep(0.01)
        while server.counts.in_flight:
            time.sleep(0.01)
        assert server.requests == 1


@pytest.mark.parametrize("outcome", ["hang", "trickle"])
def test_the_server_ends_though_answers_do_not(outcome):
    with FakeJudge(schedule=[outcome]) as server:
        connection = socket.create_connection(address_of(server))
        connection.sendall(raw_request(pairwise("a", "b")))
        while not server.counts.in_flight:
            time.sleep(0.01)
    assert server.counts.in_flight == 0
    with connection, contextlib.suppress(ConnectionResetError):
        read_to_end(connection)  # it ends


@pytest.mark.parametrize(
    "request_",
    [
        b"hello\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_request_is_refused(request_):
    with FakeJudge() as server, socket.create_connection(address_of(server)) as connection:
        connection.sendall(request_)
        assert re.match(rb"HTTP/1\.[01] 400 Bad Request\r\n", read_to_end(connection))


@pytest.mark.parametrize("body", [b"{", b'{"model": "j", "messages": [{"role": "user", "content": "\\ud800"}]}'])
def test_a_body_that_is_no_json_of_text_is_the_clients_fault(body):
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    content = head.encode() + body
    with FakeJudge() as server, socket.create_connection(address_of(server)) as connection:
        connection.sendall(content)
        assert b"could not parse the JSON body" in read_to_end(connection)
