"""What a server sends is bounded in bytes and in time, and goes nowhere but to the address that was given."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from contextlib import closing

import pytest

from dno_jax import endpoint as endpoints
from dno_jax.annotation.client import _MOST_KEPT
from dno_jax.annotation.ledger.store import VerdictStore
from dno_jax.endpoint import Endpoint, EndpointError, Response, Trouble
from tests.annotation.scripted import Answer, Asked, Scripted, after_probe, completion
from tests.annotation.test_server_behaviours import graded, judge, points, pool, states

WHOLE = json.dumps(completion("fine").body).encode()


def post(server: Scripted, *, timeout: float = 20.0) -> Response | Trouble:
    async def work() -> Response | Trouble:
        asked = Endpoint(who="the judge", place="p", url=server.url, api_key_env=None, timeout=timeout)
        try:
            return await asked.post("/chat/completions", {"model": "m", "messages": []})
        finally:
            await asked.close()

    return asyncio.run(work())


def encoded(body: bytes, encoding: str) -> Answer:
    return Answer(body=body, headers={"Content-Encoding": encoding})


@pytest.mark.parametrize(
    "answer",
    [
        encoded(WHOLE, "identity"),
        encoded(gzip.compress(WHOLE), "gzip"),
        encoded(gzip.compress(WHOLE[:20]) + gzip.compress(WHOLE[20:]), "gzip"),
        encoded(zlib.compress(WHOLE), "deflate"),
        encoded(zlib.compress(WHOLE)[2:-4], "deflate"),  # without a header, as some send it
    ],
    ids=["identity", "gzip", "two members", "deflate", "raw deflate"],
)
def test_compressed_replies_are_read(answer):
    with Scripted(lambda _: answer) as server:
        found = post(server)
    assert isinstance(found, Response)
    assert found.text.encode() == WHOLE


BOMB = gzip.compress(b" " * (64 * 2**20), 9)  # 64 KB


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (encoded(BOMB, "gzip"), "a body of more than 16,777,216 bytes, which is not read on"),
        (Answer(500, BOMB, {"Content-Encoding": "gzip"}), "a body of more than 16,777,216 bytes"),
        (Answer(body=b" " * (17 * 2**20)), "a body of more than 16,777,216 bytes"),
        (encoded(gzip.compress(BOMB), "gzip, gzip"), "an encoding that was not asked for ('gzip, gzip')"),
        (encoded(b"\x0b\x02\x80hello\x03", "br"), "an encoding that was not asked for ('br')"),
        (encoded(b"not compressed", "gzip"), "not compressed as its header says"),
        (encoded(gzip.compress(b"") * 1000, "gzip"), "a compressed body of too many parts"),
    ],
    ids=["gzip", "error", "plain", "twice", "br", "none", "members"],
)
def test_a_body_beyond_the_limit_is_not_read_on(answer, detail):
    with Scripted(lambda _: answer) as server:
        tracemalloc.start()
        found = post(server)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert isinstance(found, Trouble)
    assert detail in found.detail
    assert most < 120 * 2**20  # the server's own bodies lie in it, too


def test_a_question_whose_reply_is_a_bomb_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.001)
    bomb = encoded(BOMB, "gzip")
    script = after_probe(lambda asked: bomb if "Question 1?" in json.dumps(asked.body) else graded(asked))
    with Scripted(script) as server:
        found = judge(server, tmp_path / "a.sqlite", [pool(number) for number in range(3)], max_tries=2)
    assert states(found) == ["ok", "failed", "ok"]


@pytest.mark.parametrize("fault", ["trickle", "drip", "hang"])
def test_bytes_now_and_then_do_not_put_off_the_end(fault):
    with Scripted(lambda _: Answer(fault=fault)) as server:
        assert post(server, timeout=0.4) == Trouble("no answer within 0.4 s")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_wherever_it_leads(status):
    with Scripted() as other, Scripted() as server:
        for place in (f"{other.url}/chat/completions?key=abc", f"{server.url}/v2", "/elsewhere", "//[bad"):
            server.script = lambda _, place=place: Answer(status, {}, {"Location": place})
            with pytest.raises(EndpointError, match=r"is not followed.* fix p\.base_url") as caught:
                post(server)
            assert "key=abc" not in str(caught.value)
        assert len(server.asked) == 4
        assert not other.asked


def test_a_reply_is_stored_cut_to_what_a_verdict_needs(tmp_path):
    def script(asked: Asked) -> Answer:
        found = points(asked)
        found["1"]["justification"] = "very " * 200_000
        return completion(json.dumps(found))

    with Scripted(after_probe(script)) as server:
        (found,) = judge(server, tmp_path / "a.sqlite", [pool(1)])
        (lost,) = judge(server, tmp_path / "a.sqlite", [pool(2, 2)], form="pairwise", max_tries=1)
    assert (found.state, lost.state) == ("ok", "unparsable")
    assert len(found.raw) == _MOST_KEPT
    with closing(VerdictStore(tmp_path / "a.sqlite")) as store:
        assert all(len(row["raw"]) <= _MOST_KEPT and len(row["detail"]) <= 400 for row in store.rows())


def test_others_words_are_cut_before_they_are_searched_and_no_key_is_cut_in_two(monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", "planted.0123456789.do-not-leak")
    asked = Endpoint(who="w", place="p", url="http://a/v1", api_key_env="PLANTED_KEY", timeout=1.0)
    key = "planted.0123456789.do-not-leak"
    for cut in range(1, len(key)):
        text = " " * (endpoints._SHOWN - cut) + key + " " * 10**6
        assert asked.words(text) in ("", "[key]")
    asyncio.run(asked.close())
