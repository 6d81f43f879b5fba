"""The Batch API over real HTTP: crashes anywhere cost no answer and no second batch."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from dno_jax.annotation.question import Question, Reply
from dno_jax.annotation.transport import batch as batch_module
from dno_jax.annotation.transport import batch_api
from dno_jax.annotation.transport.batch import Room, run
from dno_jax.annotation.transport.batch_api import OpenBatch
from dno_jax.annotation.transport.client import EndpointClient, Unreachable
from dno_jax.config import OpenAISection
from dno_jax.endpoint import Trouble
from dno_jax.errors import DnoError
from tests.annotation.scripted import Answer, Asked, Scripted, after_probe, completion, fault, free_port

KEY = "planted.0123456789.do-not-leak"
SCHEMA = {"type": "object"}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(batch_module, "FIRST_POLL_SECONDS", 0.005)
    monkeypatch.setattr(batch_module, "MAX_POLL_SECONDS", 0.02)


class Api:
    """Files and batches, as OpenAI has them; a batch is done at its third look.

    Args:
        answer: the line of a request, or None for one that is left out; by default as live.
        status: what batches end as.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None, status="completed"):
        self.answer = answer or answered
        self.status = status
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.looks: dict[str, int] = {}
        self.faults: list[tuple[str, Answer, bool]] = []
        """(method and path, answer, whether the deed is done all the same), used up in order."""
        self.page_size = 100
        self.lock = threading.Lock()

    def __call__(self, asked: Asked) -> Answer:
        with self.lock:
            what = f"{asked.method} {asked.path}"
            if self.faults and what.startswith(self.faults[0][0]):
                _, answer, done = self.faults.pop(0)
                if done:
                    self.serve(asked)
                return answer
            return self.serve(asked)

    def serve(self, asked: Asked) -> Answer:
        path, _, query = asked.path.removeprefix("/v1").partition("?")
        if asked.method == "POST" and path == "/files":
            name = f"file-{len(self.files)}"
            self.files[name] = form_file(asked)
            return Answer(body={"id": name, "object": "file"})
        if asked.method == "POST" and path == "/batches":
            name = f"batch_{len(self.batches)}"
            self.batches[name] = {"id": name, "status": "validating", **asked.body}
            return Answer(body=self.batches[name])
        if path == "/batches":
            after = re.search(r"after=([^&]+)", query)
            names = list(reversed(self.batches))
            names = names[names.index(after[1]) + 1 :] if after else names
            page = [self.batches[name] for name in names[: self.page_size]]
            return Answer(body={"data": page, "has_more": len(names) > self.page_size})
        kind, name, *_ = path.strip("/").split("/")
        if kind == "batches" and name in self.batches:
            return Answer(body=self.look(name))
        if kind == "files" and name in self.files:
            return Answer(body=self.files[name].encode())
        return fault(404, f"no {path}")

    def look(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        self.looks[name] = self.looks.get(name, 0) + 1
        if self.looks[name] >= 3 and batch["status"] != self.status:
            requests = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
            lines = [line for request in requests if (line := self.answer(request)) is not None]
            good = [line for line in lines if (line.get("response") or {}).get("status_code") == 200]
            for field, part in (("output_file_id", good), ("error_file_id", [x for x in lines if x not in good])):
                if part:
                    batch[field] = f"{name}-{field}"
                    self.files[batch[field]] = "".join(line.get("raw") or json.dumps(line) + "\n" for line in part)
            batch["status"] = self.status
        return batch

    def sent(self) -> list[str]:
        """The keys that were paid for, once for each time."""
        return [
            json.loads(line)["custom_id"]
            for batch in self.batches.values()
            for line in self.files[batch["input_file_id"]].splitlines()
        ]


def form_file(asked: Asked) -> str:
    text = asked.body.decode()
    assert 'name="purpose"\r\n\r\nbatch\r\n' in text
    (content,) = re.findall(r'filename="requests.jsonl".*?\r\n\r\n(.*?)\r\n--', text, re.DOTALL)
    return content


def line(request: dict[str, Any], status: int, body: Any) -> dict[str, Any]:
    return {
        "id": "batch_req_1",
        "custom_id": request["custom_id"],
        "response": {"status_code": status, "request_id": "r", "body": body},
        "error": None,
    }


def answered(request: dict[str, Any]) -> dict[str, Any]:
    return line(request, 200, completion(f"to {request['body']['messages'][0]['content']}").body)


class Memory:
    """A store whose notes outlive a run; `kill_at` raises before that many notes are taken."""

    def __init__(self) -> None:
        self.notes: dict[str, OpenBatch] = {}
        self.kill_at: int | None = None

    def remember_batch(self, batch: OpenBatch) -> None:
        if self.kill_at is not None:
            self.kill_at -= 1
            if self.kill_at < 0:
                raise KeyboardInterrupt
        self.notes[batch.token] = batch

    def open_batches(self) -> Sequence[OpenBatch]:
        return tuple(self.notes.values())

    def close_batch(self, token: str) -> None:
        del self.notes[token]


SECTION = OpenAISection(api_key_env=None)


def questions(numbers: Iterable[int]) -> list[Question]:
    return [
        Question(
            asked=SECTION,
            judge="j",
            prompt_id=f"p{number}",
            order=(0, 1),
            body={"model": "m", "messages": [{"role": "user", "content": str(number)}], "max_tokens": 8, "seed": 1},
            read=lambda reply: (1.0,),
            schema=SCHEMA,
        )
        for number in numbers
    ]


async def plenty(question: Question, *, was_sent: bool) -> bool:
    return True


def ask(
    url: str,
    asked: Sequence[Question],
    store: Memory,
    *,
    stop_after: int | None = None,
    room: Room | None = None,
    fresh: bool = True,
    **fields: Any,
) -> dict[str, Reply | Trouble]:
    async def work() -> dict[str, Reply | Trouble]:
        config = OpenAISection(**{"base_url": url, "api_key_env": None, "max_outage": 5.0, **fields})
        client = EndpointClient(config, who="the judge 'm'", place="annotation.openai")
        found: dict[str, Reply | Trouble] = {}
        try:
            await client.probe(asked[0].body)
            stream = run(asked, client=client, store=store, room=room or plenty, fresh=fresh)
            async for key, result in stream:
                assert key not in found
                found[key] = result
                if len(found) == stop_after:
                    await stream.aclose()
                    break
            return found
        finally:
            await client.close()

    return asyncio.run(work())


def texts(found: dict[str, Reply | Trouble], asked: Sequence[Question]) -> list[str | None]:
    results = [found.get(question.key) for question in asked]
    return [result.text if isinstance(result, Reply) else None for result in results]


def test_every_question_is_answered_as_live_and_nothing_is_left_open():
    api, store, asked = Api(), Memory(), questions(range(7))
    with Scripted(after_probe(api)) as server:
        found = ask(server.url, asked, store)
    assert texts(found, asked) == [f"to {n}" for n in range(7)]
    assert found[asked[0].key] == Reply("to 0", finish="stop", model="served-1", tokens_in=7, tokens_out=3)
    assert not store.notes
    (batch,) = api.batches.values()
    assert (batch["endpoint"], batch["completion_window"]) == ("/v1/chat/completions", "24h")
    request = json.loads(api.files[batch["input_file_id"]].splitlines()[0])
    assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
    assert request["body"].pop("response_format")["json_schema"]["schema"] == SCHEMA
    assert request["body"] == asked[0].body


def test_a_question_that_is_asked_twice_is_paid_for_once():
    api, asked = Api(), questions([1, 2, 1])
    with Scripted(after_probe(api)) as server:
        assert len(ask(server.url, asked, Memory())) == 2
    assert len(api.sent()) == 2


@pytest.mark.parametrize(("limit", "value", "batches"), [("MAX_REQUESTS", 3, 4), ("MAX_BYTES", 1000, 4)])
def test_what_is_too_large_for_one_batch_is_split(monkeypatch, limit, value, batches):
    monkeypatch.setattr(batch_module, limit, value)
    api, store, asked = Api(), Memory(), questions(range(10))
    with Scripted(after_probe(api)) as server:
        found = ask(server.url, asked, store)
    assert texts(found, asked) == [f"to {n}" for n in range(10)]
    assert len(api.batches) == batches
    for batch in api.batches.values():
        content = api.files[batch["input_file_id"]]
        assert len(content) <= 1000 or limit == "MAX_REQUESTS"
        assert len(content.splitlines()) <= 3
    assert not store.notes


@pytest.mark.parametrize("status", ["expired", "cancelled", "failed"])
def test_what_a_batch_leaves_is_for_the_caller_to_ask_live(status, caplog):
    caplog.set_level(logging.WARNING, logger="dno_jax")
    api = Api(lambda request: answered(request) if int(request["body"]["messages"][0]["content"]) < 2 else None, status)
    store, asked = Memory(), questions(range(4))
    with Scripted(after_probe(api)) as server:
        found = ask(server.url, asked, store)
    assert texts(found, asked) == ["to 0", "to 1", None, None]
    for question in asked[2:]:
        trouble = found[question.key]
        assert isinstance(trouble, Trouble)
        assert (trouble.then, status in trouble.detail) == ("retry", True)
    assert not store.notes
    assert f"batch_0: {status}" in caplog.text
    assert f"batch_0 ({status}) left 2 of 4 requests without a reply" in caplog.text
    assert "they are asked live, at the full price" in caplog.text


NO_ROOM = {
    "object": "list",
    "data": [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached for m. Limit: 90,000 tokens."}],
}


class SmallQueue(Api):
    """Takes so many requests at a time; a batch for which there is no room fails, as it does at OpenAI's."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def serve(self, asked: Asked) -> Answer:
        answer = super().serve(asked)
        if asked.method == "POST" and asked.path == "/v1/batches":
            taken = [b for b in self.batches.values() if b["status"] == "validating"]
            if sum(len(self.files[b["input_file_id"]].splitlines()) for b in taken) > self.room:
                answer.body.update(status="failed", errors=NO_ROOM)
        return answer

    def look(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        return batch if batch["status"] == "failed" else super().look(name)


@pytest.mark.parametrize(
    ("a_batch", "room", "batches", "live"),
    [(4, 5, 3, 0), (8, 3, 10, 0), (8, 1, 3, 8)],
    ids=["another ends", "halves", "too small"],
)
def test_a_batch_that_finds_no_room_is_made_again_and_only_then_left_and_said(
    monkeypatch, caplog, a_batch, room, batches, live
):
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", a_batch)
    monkeypatch.setattr(batch_module, "_FEWEST_REQUESTS", 3 if live else 1)
    api, store, asked = SmallQueue(room), Memory(), questions(range(8))
    with Scripted(after_probe(api)) as server:
        found = ask(server.url, asked, store)
    assert texts(found, asked) == [None if live else f"to {n}" for n in range(8)]
    assert not store.notes
    assert "Enqueued token limit reached for m" in caplog.text
    said = [record.getMessage() for record in caplog.records if "full price" in record.getMessage()]
    assert sum(int(re.search(r"left (\d+) of", text)[1]) for text in said) == live
    assert len(api.batches) == batches


@pytest.mark.parametrize(
    ("of_line", "detail", "then"),
    [
        (lambda r: line(r, 500, {"error": {"message": "boom"}}), "HTTP 500: boom", "retry"),
        (lambda r: line(r, 401, {"error": {"message": "no"}}), "answered HTTP 401: no", "retry"),
        (lambda r: line(r, 400, {"error": {"message": "long"}}), "HTTP 400: long", "give up"),
        (lambda r: line(r, 400, {"error": {"message": "x", "code": "content_filter"}}), "HTTP 400: x", "refused"),
        (lambda r: line(r, 200, {"choices": []}), "without a chat completion", "retry"),
        (lambda r: line(r, 200, None), "without a chat completion", "retry"),
        (lambda r: line(r, True, completion().body), "a line of a batch failed", "retry"),
        (
            lambda r: {"custom_id": r["custom_id"], "response": None, "error": {"code": "batch_expired"}},
            "batch_expired",
            "retry",
        ),
        (lambda r: None, "without an answer", "retry"),
        (lambda r: {"raw": "not JSON\n"}, "without an answer", "retry"),
        (lambda r: {"raw": "[1]\n"}, "without an answer", "retry"),
        (lambda r: {"raw": '{"custom_id": 7}\n'}, "without an answer", "retry"),
        (lambda r: {**answered(r), "custom_id": "never asked"}, "without an answer", "retry"),
    ],
    ids=["500", "401", "400", "filter", "empty", "null", "odd status", "expired", "missing", "no JSON", "list",
         "number", "stranger"],
)  # fmt: skip
def test_each_line_is_read_as_a_live_answer_is(of_line, detail, then):
    def answer(request: dict[str, Any]) -> dict[str, Any] | None:
        return of_line(request) if request["body"]["messages"][0]["content"] == "1" else answered(request)

    asked = questions(range(3))
    with Scripted(after_probe(Api(answer))) as server:
        found = ask(server.url, asked, Memory())
    assert texts(found, asked) == ["to 0", None, "to 2"]
    trouble = found[asked[1].key]
    assert isinstance(trouble, Trouble)
    assert detail in trouble.detail
    assert trouble.then == then


def test_a_line_that_comes_twice_counts_once():
    def twice(request: dict[str, Any]) -> dict[str, Any]:
        good = answered(request)
        other = line(request, 200, completion("another").body)
        return {**good, "raw": json.dumps(good) + "\n\n" + json.dumps(other) + "\n"}

    asked = questions(range(3))
    with Scripted(after_probe(Api(twice))) as server:
        found = ask(server.url, asked, Memory())
    assert texts(found, asked) == ["to 0", "to 1", "to 2"]


def test_a_file_answers_the_questions_of_its_own_batch_alone(monkeypatch):
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", 1)
    asked = questions(range(2))

    def for_the_other(request: dict[str, Any]) -> dict[str, Any]:
        own = answered(request)
        if request["custom_id"] == asked[1].key:
            return own
        foreign = {**line(request, 200, completion("planted").body), "custom_id": asked[1].key}
        return {**own, "raw": json.dumps(foreign) + "\n" + json.dumps(own) + "\n"}

    with Scripted(after_probe(Api(for_the_other))) as server:
        assert texts(ask(server.url, asked, Memory()), asked) == ["to 0", "to 1"]


# Crashes


def test_a_run_that_was_killed_collects_what_it_left(monkeypatch):
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", 4)
    api, store, asked = Api(), Memory(), questions(range(10))
    with Scripted(after_probe(api)) as server:
        first = ask(server.url, asked, store, stop_after=5)  # in the middle of the second batch
        assert store.notes
        left = [question for question in asked if question.key not in first]
        second = ask(server.url, left, store)
    assert texts(first | second, asked) == [f"to {n}" for n in range(10)]
    assert len(api.sent()) == len(set(api.sent())) == 10
    assert not first.keys() & second.keys()


@pytest.mark.parametrize("notes", [0, 1])
def test_a_kill_while_a_batch_is_made_costs_no_second_batch(notes):
    api, store, asked = Api(), Memory(), questions(range(4))
    with Scripted(after_probe(api)) as server:
        store.kill_at = notes
        with pytest.raises(KeyboardInterrupt):
            ask(server.url, asked, store)
        assert len(api.batches) == notes  # killed before it was made; after, and before its id was noted
        store.kill_at = None
        found = ask(server.url, asked, store)
    assert texts(found, asked) == [f"to {n}" for n in range(4)]
    assert len(api.batches) == 1
    assert not store.notes


def test_a_note_of_a_batch_that_was_never_made_is_dropped_and_its_questions_asked():
    api, asked = Api(), questions(range(3))
    api.page_size = 1
    store = Memory()
    with Scripted(after_probe(api)) as server:
        ask(server.url, questions(range(10, 13)), Memory())  # somebody else's
        ask(server.url, questions(range(20, 23)), Memory())
        note = OpenBatch(token="never", url=server.url, keys=tuple(question.key for question in asked))
        store.remember_batch(note)
        found = ask(server.url, asked, store)
    assert texts(found, asked) == ["to 0", "to 1", "to 2"]
    assert not store.notes


def test_a_batch_is_found_behind_the_first_page():
    api, store, asked = Api(), Memory(), questions(range(3))
    api.page_size = 1
    with Scripted(after_probe(api)) as server:
        store.kill_at = 1
        with pytest.raises(KeyboardInterrupt):
            ask(server.url, asked, store)
        store.kill_at = None
        for other in (10, 20):
            ask(server.url, questions([other]), Memory())
        found = ask(server.url, asked, store)
    assert texts(found, asked) == ["to 0", "to 1", "to 2"]
    assert len(api.batches) == 3


def test_a_creation_whose_answer_is_lost_is_not_repeated():
    api, asked = Api(), questions(range(3))
    api.faults = [
        ("POST /v1/batches", Answer(fault="reset"), True),  # made, and nobody heard
        ("GET /v1/batches", fault(500), False),
    ]
    with Scripted(after_probe(api)) as server:
        found = ask(server.url, asked, Memory())
    assert texts(found, asked) == ["to 0", "to 1", "to 2"]
    assert len(api.batches) == 1


def test_a_batch_that_may_have_been_made_is_remembered_and_named_where_nobody_can_look():
    api, store, asked = Api(), Memory(), questions(range(3))
    with Scripted(after_probe(api)) as server:
        api.faults = [
            ("POST /v1/batches", Answer(fault="reset"), True),  # made, and nobody heard
            ("GET /v1/batches", fault(404, "no such path"), False),
        ]
        with pytest.raises(DnoError, match="no such path") as caught:
            ask(server.url, asked, store)
        (note,) = store.notes.values()
        for part in (f"dno_jax={note.token}", "cancel it first", "set annotation.openai.batch=false to ask live"):
            assert part in str(caught.value)
        assert texts(ask(server.url, asked, store), asked) == ["to 0", "to 1", "to 2"]
    assert len(api.batches) == 1
    assert not store.notes


def killed_after_a_batch(api: Api, store: Memory, url: str, asked: Sequence[Question]) -> None:
    store.kill_at = 1
    with pytest.raises(KeyboardInterrupt):
        ask(url, asked, store)
    store.kill_at = None
    assert len(api.batches) == 1


def test_what_was_sent_is_collected_though_there_is_no_room_for_more():
    api, store, asked = Api(), Memory(), questions(range(6))
    told: list[tuple[str, bool]] = []

    async def room(question: Question, *, was_sent: bool) -> bool:
        told.append((question.key, was_sent))
        return was_sent

    with Scripted(after_probe(api)) as server:
        killed_after_a_batch(api, store, server.url, asked[:4])
        found = ask(server.url, asked, store, room=room)
    assert texts(found, asked[:4]) == ["to 0", "to 1", "to 2", "to 3"]
    assert set(found) == {question.key for question in asked[:4]}
    assert sorted(told) == sorted((question.key, question in asked[:4]) for question in asked)
    assert len(api.batches) == 1
    assert not store.notes


def test_without_leave_for_new_ones_what_is_under_way_is_collected_and_that_is_said(caplog):
    api, store, asked = Api(), Memory(), questions(range(6))
    with Scripted(after_probe(api)) as server:
        killed_after_a_batch(api, store, server.url, asked[:4])
        found = ask(server.url, asked, store, fresh=False)
    assert texts(found, asked[:4]) == ["to 0", "to 1", "to 2", "to 3"]
    assert set(found) == {question.key for question in asked[:4]}
    assert "batch=false now (batch_0); cancel them there" in caplog.text
    assert len(api.batches) == 1
    assert not store.notes


def test_a_batch_is_collected_where_it_was_made_though_another_endpoint_is_preferred_now():
    api, other, store, asked = Api(), Api(), Memory(), questions(range(4))
    with Scripted(after_probe(api)) as first, Scripted(after_probe(other)) as second:
        killed_after_a_batch(api, store, first.url, asked)
        more = [{"base_url": first.url, "api_key_env": None}]
        assert texts(ask(second.url, asked, store, more_endpoints=more), asked) == [f"to {n}" for n in range(4)]
    assert not other.batches
    assert not store.notes


def test_a_batch_at_an_address_that_is_configured_no_more_is_told_of(caplog):
    api, other, store, asked = Api(), Api(), Memory(), questions(range(4))
    with Scripted(after_probe(api)) as first, Scripted(after_probe(other)) as second:
        killed_after_a_batch(api, store, first.url, asked)
        assert texts(ask(second.url, asked, store), asked) == [f"to {n}" for n in range(4)]
    assert f"a batch of 4 questions was made at {first.url}" in caplog.text
    assert "annotation.openai.more_endpoints" in caplog.text
    assert len(store.notes) == 1


def test_batches_go_where_somebody_answers():
    api, asked = Api(), questions(range(3))
    with Scripted(after_probe(api)) as second:
        more = [{"base_url": second.url, "api_key_env": None}]
        found = ask(f"http://127.0.0.1:{free_port()}/v1", asked, Memory(), more_endpoints=more)
    assert texts(found, asked) == ["to 0", "to 1", "to 2"]


def test_two_groups_that_collect_one_batch_together_leave_no_note():
    api, store, asked = Api(), Memory(), questions(range(6))

    async def both(url: str) -> list[dict[str, Reply | Trouble]]:
        client = EndpointClient(
            OpenAISection(base_url=url, api_key_env=None), who="the judge 'm'", place="annotation.openai"
        )

        async def group(own: Sequence[Question]) -> dict[str, Reply | Trouble]:
            return {key: result async for key, result in run(own, client=client, store=store, room=plenty)}

        try:
            await client.probe(asked[0].body)
            return await asyncio.gather(group(asked[:2]), group(asked[2:]))
        finally:
            await client.close()

    with Scripted(after_probe(api)) as server:
        killed_after_a_batch(api, store, server.url, asked)
        first, second = asyncio.run(both(server.url))
    assert texts(first | second, asked) == [f"to {n}" for n in range(6)]
    assert len(api.batches) == 1
    assert not store.notes


def test_a_retry_after_is_waited_for_no_longer_than_an_outage_may_last(monkeypatch):
    now, waits = [1000.0], []

    async def pause(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("dno_jax.endpoint.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(batch_api, "pause", pause)
    api = Api()
    with Scripted(after_probe(api)) as server:
        api.faults = [("POST /v1/files", fault(429, headers={"Retry-After": "3600"}), False)] * 9
        with pytest.raises(Unreachable, match="has not answered for 600 s"):
            ask(server.url, questions(range(2)), Memory(), max_outage=600.0, max_tries=3)
    assert waits[0] == pytest.approx(600.0, abs=0.1)
    assert sum(waits[1:]) < 1.0


def test_faults_on_every_path_are_outlasted():
    api, store, asked = Api(), Memory(), questions(range(3))
    api.faults = [
        ("POST /v1/files", fault(500), False),
        ("POST /v1/files", Answer(body=b"<html>"), False),
        ("POST /v1/batches", fault(429, headers={"Retry-After": "0"}), False),
        ("GET /v1/batches/", Answer(fault="reset"), False),
        ("GET /v1/batches/", Answer(body=[1]), False),
        ("GET /v1/files/", Answer(body={"x": "y"}, fault="truncated"), False),
    ]
    with Scripted(after_probe(api)) as server:
        found = ask(server.url, asked, store)
    assert not api.faults
    assert texts(found, asked) == ["to 0", "to 1", "to 2"]
    assert len(api.batches) == 1


def test_what_is_not_asked_for_now_stays_to_be_collected():
    api, store, asked = Api(), Memory(), questions(range(6))
    with Scripted(after_probe(api)) as server:
        store.kill_at = 1
        with pytest.raises(KeyboardInterrupt):
            ask(server.url, asked, store)
        store.kill_at = None
        first = ask(server.url, asked[:2], store)
        (note,) = store.notes.values()
        assert set(note.keys) == {question.key for question in asked[2:]}
        second = ask(server.url, asked[2:], store)
    assert texts(first | second, asked) == [f"to {n}" for n in range(6)]
    assert len(api.batches) == 1
    assert not store.notes


def test_batches_of_another_endpoint_and_of_other_questions_are_left_alone():
    api, store, asked = Api(), Memory(), questions(range(2))
    elsewhere = OpenBatch("a", "http://elsewhere/v1", (asked[0].key,), "batch_x")
    with Scripted(after_probe(api)) as server:
        others = OpenBatch("b", server.url, ("other",), "batch_y")
        store.notes = {"a": elsewhere, "b": others}
        assert texts(ask(server.url, asked, store), asked) == ["to 0", "to 1"]
    assert store.notes == {"a": elsewhere, "b": others}


@pytest.mark.parametrize("gone", ["batch", "file"])
def test_a_batch_or_file_that_is_gone_leaves_its_questions_to_be_asked_live(gone):
    api, store, asked = Api(), Memory(), questions(range(2))
    with Scripted(after_probe(api)) as server:
        where = "GET /v1/batches/" if gone == "batch" else "GET /v1/files/"
        api.faults = [(where, fault(404, "gone"), False)]
        found = ask(server.url, asked, store)
    assert [type(found[question.key]) for question in asked] == [Trouble, Trouble]
    assert not store.notes


# Refusals


@pytest.mark.parametrize(
    ("where", "answer"),
    [("POST /v1/files", fault(404, "no files here")), ("POST /v1/batches", fault(400, "no such endpoint"))],
)
def test_an_endpoint_without_batches_says_so_and_what_to_set(where, answer):
    api, store = Api(), Memory()
    api.faults = [(where, answer, False)]
    with (
        Scripted(after_probe(api)) as server,
        pytest.raises(DnoError, match=r"set annotation\.openai\.batch=false") as got,
    ):
        ask(server.url, questions(range(2)), store)
    assert answer.body["error"]["message"] in str(got.value)
    assert not isinstance(got.value, Unreachable)
    assert not store.notes


def test_an_endpoint_that_stays_away_ends_the_run_and_its_batch_is_remembered():
    api, store, asked = Api(), Memory(), questions(range(2))
    with Scripted(after_probe(api)) as server:
        api.faults = [("GET /v1/batches/", fault(503), False)] * 100_000
        with pytest.raises(Unreachable, match=r"has not answered .* are remembered"):
            ask(server.url, asked, store, max_outage=0.1, max_tries=2)
        assert len(store.notes) == 1
        api.faults = []
        assert texts(ask(server.url, asked, store), asked) == ["to 0", "to 1"]
    assert len(api.batches) == 1


def test_the_key_is_in_no_line_note_or_message(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PLANTED_KEY", KEY)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        which = request["body"]["messages"][0]["content"]
        return {
            "0": line(request, 200, completion(f"heard {KEY}").body),
            "1": line(request, 400, {"error": {"message": f"bad {KEY}"}}),
            "2": {"custom_id": request["custom_id"], "response": None, "error": {"message": KEY}},
        }[which]

    api, store, asked = Api(answer, status="expired"), Memory(), questions(range(3))
    with Scripted(after_probe(api)) as server:
        found = ask(server.url, asked, store, api_key_env="PLANTED_KEY")
        assert all(request.headers["authorization"] == f"Bearer {KEY}" for request in server.asked)
    assert texts(found, asked) == ["heard [key]", None, None]
    assert KEY not in repr(found)
    assert KEY not in caplog.text
    assert KEY not in api.files["file-0"]
