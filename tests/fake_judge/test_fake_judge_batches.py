"""The fake judge's Batch API, its counts and its command."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import openai
import pytest

from dno_jax.errors import DnoError
from dno_jax.fake_judge import Behaviour, FakeJudge, read_settings
from tests.annotation.asking import (
    address_of,
    ask,
    batch_file,
    chat,
    client_of,
    end_of,
    http_get,
    listwise,
    pairwise,
    rows_of,
    start_batch,
    token,
)

# batches


def test_a_batch_from_file_to_file():
    bodies = [listwise(f"q=0.{n}", "q=0.5") for n in range(10)]
    with FakeJudge(prefers="marker", batch_delay=0.2) as server, client_of(server) as client:
        batch = start_batch(client, batch_file(bodies))
        assert (batch.status, batch.output_file_id, batch.metadata) == ("validating", None, {"run": "r1"})
        assert client.files.retrieve(batch.input_file_id).filename == "requests.jsonl"
        assert client.files.content(batch.input_file_id).read() == batch_file(bodies)
        batch = end_of(client, batch.id)
        counts = batch.request_counts
        assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 10, 10, 0)
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        assert batch.error_file_id is None
        rows = rows_of(client, batch.output_file_id)
        assert list(rows) != [f"c{number}" for number in range(10)]
        for number, body in enumerate(bodies):
            response = rows[f"c{number}"]["response"]
            assert response["status_code"] == 200
            (live,) = ask(server, body)
            assert response["body"]["choices"][0]["message"]["content"] == live.choices[0].message.content
        client.files.delete(batch.output_file_id)
        with pytest.raises(openai.NotFoundError):
            client.files.content(batch.output_file_id)
        assert (server.requests, server.duplicates) == (20, 10)
        assert (server.counts.batches, server.counts.batch_lines) == (1, 10)


def test_lines_that_fail_and_lines_that_expire():
    bodies = [pairwise(f"{n}", "other") for n in range(60)]
    faults = {"fraction": 0.3, "faults": ["500", "close", "refusal"], "batch_expired": 0.3}
    with FakeJudge(**faults, batch_delay=0.0) as server, client_of(server) as client:
        batch = end_of(client, start_batch(client, batch_file(bodies)).id)
        output, errors = rows_of(client, batch.output_file_id), rows_of(client, batch.error_file_id)
        again = end_of(client, start_batch(client, batch_file(bodies)).id)
        expired_again = set(rows_of(client, again.error_file_id))
    assert batch.status == "expired"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (len(output), len(errors))
    assert set(output) | set(errors) == {f"c{number}" for number in range(60)}
    expired = {name for name, row in errors.items() if row["error"]}
    assert {errors[name]["error"]["code"] for name in expired} == {"batch_expired"}
    assert 5 <= len(expired) <= 33
    assert expired <= expired_again
    failed = [errors[name]["response"] for name in set(errors) - expired]
    assert failed
    assert {response["status_code"] for response in failed} == {500}
    refused = [row["response"]["body"]["choices"][0]["message"]["refusal"] for row in output.values()]
    assert 0 < sum(refusal is not None for refusal in refused) < len(output)


def test_a_cancelled_batch_keeps_what_is_done():
    with FakeJudge(batch_delay=60.0) as server, client_of(server) as client:
        batch = start_batch(client, batch_file([pairwise(f"{n}", "x") for n in range(64)]))
        while client.batches.retrieve(batch.id).request_counts.completed == 0:
            time.sleep(0.01)
        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = end_of(client, batch.id)
        output, errors = rows_of(client, batch.output_file_id), rows_of(client, batch.error_file_id)
        with pytest.raises(openai.ConflictError, match="Cannot cancel"):
            client.batches.cancel(batch.id)
    assert batch.status == "cancelled"
    assert len(output) == 16
    assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
    assert len(errors) == 48


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"{}\n", "invalid_json_line"),
        (b"no json\n", "invalid_json_line"),
        (batch_file([chat("q")]) * 2, "duplicate_custom_id"),
        (batch_file([chat("q")]).replace(b"/v1/chat", b"/v1/chats"), "invalid_url"),
        (batch_file([chat("q"), chat("q", model="other")]), "mismatched_model"),
    ],
)
def test_input_files_that_are_no_batch(content, code):
    with FakeJudge() as server, client_of(server) as client:
        batch = end_of(client, start_batch(client, content).id)
        assert (batch.status, batch.output_file_id, server.requests) == ("failed", None, 0)
    assert code in {problem.code for problem in batch.errors.data}


def test_batches_are_listed_newest_first_and_page_by_page():
    with FakeJudge(batch_delay=0.0) as server, client_of(server) as client:
        ids = [start_batch(client, batch_file([chat(f"{n}")])).id for n in range(5)]
        assert [batch.id for batch in client.batches.list(limit=2)] == ids[::-1]
        page = client.batches.list(limit=2)
        assert ([batch.id for batch in page.data], page.has_more) == (ids[:2:-1], True)
        assert len(list(client.files.list(limit=2))) >= 5


def test_an_endpoint_without_batches():
    with FakeJudge(batches=False) as server, client_of(server) as client, pytest.raises(openai.NotFoundError):
        start_batch(client, batch_file([chat("q")]))
    with FakeJudge() as server, client_of(server) as client:
        for call in (client.batches.retrieve, client.batches.cancel, client.files.retrieve, client.files.content):
            with pytest.raises(openai.NotFoundError, match="No such"):
                call("nothing")
        with pytest.raises(openai.BadRequestError, match="no such input file"):
            client.batches.create(input_file_id="x", endpoint="/v1/chat/completions", completion_window="24h")


def test_calls_to_batches_that_fail_and_replies_that_are_lost():
    with FakeJudge(batch_fraction=0.6) as server, client_of(server) as client:
        known = None
        met: Counter[str] = Counter()
        for _ in range(60):
            try:
                client.files.create(file=("requests.jsonl", b"{}"), purpose="batch")
                met["ok"] += 1
            except openai.InternalServerError:
                met["500"] += 1
            except openai.APIConnectionError:
                met["lost"] += 1
        while known is None:
            with contextlib.suppress(openai.OpenAIError):
                known = len(client.files.list(limit=100).data)
    assert min(met.values()) > 5
    assert len(met) == 3
    assert known == met["ok"] + met["lost"]


# what it counts


def test_counts_are_kept_and_served():
    async def many(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            await asyncio.gather(*(client.chat.completions.create(**listwise(f"{n}", "b")) for n in range(8)))

    with FakeJudge(delay=0.3, schedule=[*["ok"] * 8, "garbage"]) as server:
        asyncio.run(many(server.url))
        assert (server.requests, server.duplicates, server.max_in_flight) == (8, 0, 8)
        server.behaviour = Behaviour()
        ask(server, listwise("0", "b"), listwise("0", "b"), token("a", "b"), pairwise("a", "b"), chat("q"))
        found = json.loads(http_get(server, "/counts"))
        assert server.counts.as_json() == found
        assert found["forms"] == {"listwise": 10, "token": 1, "pairwise": 1, "chat": 1}
        assert found["outcomes"] == {"ok": 12, "garbage": 1}
        assert (found["requests"], found["answered"], found["duplicates"]) == (12, 12, 1)
        assert (found["in_flight"], found["max_in_flight"]) == (0, 8)
        assert found["completion_tokens"] > found["requests"]
        assert found["prompt_tokens"] > 1000
        assert len(server.bodies) == len(server.log) == 13
        assert server.bodies[-1]["messages"][0]["content"] == "q"


def test_what_fails_in_the_servers_user_is_raised_in_the_end():
    def scorer(prompt: str, candidates: Sequence[str]) -> list[int]:
        raise KeyError("worth")

    def live(server: FakeJudge) -> None:
        with pytest.raises(openai.InternalServerError, match="the fake judge itself failed"):
            ask(server, listwise("a", "b"))

    def batch(server: FakeJudge) -> None:
        with client_of(server) as client:
            start_batch(client, batch_file([listwise("a", "b")]))
        while not server.errors:
            time.sleep(0.01)

    def use(way: Callable[[FakeJudge], None]) -> None:
        with FakeJudge(scorer=scorer, batch_delay=0.0) as server:
            way(server)

    for way in (live, batch):
        with pytest.raises(KeyError, match="worth"):
            use(way)


def test_an_address_that_is_taken_is_named():
    with FakeJudge() as server:
        port = address_of(server)[1]
        with pytest.raises(DnoError, match=f"127.0.0.1:{port}: .*choose another port"), FakeJudge(port=port):
            pass
    with FakeJudge(port=port) as server:
        assert address_of(server)[1] == port


ROOT = Path(__file__).parents[2]


def test_the_command_serves_until_it_is_told_to_stop():
    command = [sys.executable, "-m", "dno_jax", "fake-judge", "prefers=marker", "fraction=1.0", "faults=[garbage]"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            reply = client.chat.completions.create(**listwise("a", "b"))
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert reply.choices[0].message.content == "The best one is clearly number 1, 6/6."
    assert process.returncode == 0
    rows = {row[0]: row[1] for row in re.findall(r"│ (.*?) +│ +([\d,]+) │", said)}
    assert rows["asked for: listwise"] == rows["came of it: garbage"] == "1"
    assert rows["verdicts and answers"] == "0"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("colour=red", "'colour' is unknown; known here: seed, prefers"),
        ("fraction=1.5", "fraction"),
        ("faults=[burn]", "no outcome 'burn'; there are HTTP statuses from 400 on, ok, hang"),
        ("delay", "expected a.b=value"),
    ],
)
def test_settings_that_there_are_not(setting, said):
    with pytest.raises(DnoError, match=re.escape(said)):
        read_settings([setting])


def test_settings_are_yaml():
    found = read_settings(["prefers=longest", "faults=[429, reset]", "requests_per_minute=600", "delay=0.5"])
    assert found == Behaviour(prefers="longest", faults=("429", "reset"), requests_per_minute=600, delay=0.5)
