"""What servers do besides answering, and what becomes of the questions: the table of docs/annotation.md."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Sequence
from contextlib import closing
from itertools import count
from typing import Any

import pytest

from dno_jax.annotation import Candidate, Pool, build_annotator
from dno_jax.annotation.ledger.budget import Budget
from dno_jax.annotation.ledger.store import VerdictStore
from dno_jax.annotation.models import is_another
from dno_jax.annotation.transport import routes
from dno_jax.annotation.transport.client import Unreachable
from dno_jax.config import AnnotationSection, OpenAISection
from dno_jax.endpoint import EndpointError
from dno_jax.errors import DnoError
from dno_jax.records import Judgement, Message, Prompt
from tests.annotation.scripted import Answer, Asked, Scripted, after_probe, completion, fault, is_probe

KEY = "planted.0123456789.do-not-leak"
WEB_PAGE = Answer(403, b"<!doctype html><html><head><title>Blocked</title></head>", {"Content-Type": "text/html"})


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(routes, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(routes, "MAX_PAUSE_SECONDS", 0.02)


def pool(number: int, candidates: int = 3) -> Pool:
    prompt = Prompt(prompt_id=f"p{number}", messages=(Message(role="user", content=f"Question {number}?"),))
    texts = [f"answer {place} to {number} worth={1 + (number + place) % 6}" for place in range(candidates)]
    return Pool(prompt, tuple(Candidate(f"000/p{number}/{place}", text) for place, text in enumerate(texts)))


def points(asked: Asked) -> dict[str, Any]:
    user = asked.body["messages"][-1]["content"]
    shown = re.findall(r"<<<CANDIDATE (\S+) [0-9a-f]{16}>>>\n.*?worth=(\d)", user)
    return {name: {"justification": "as planted", "score": int(worth)} for name, worth in shown}


def graded(asked: Asked) -> Answer:
    return completion(json.dumps(points(asked)))


def about(number: int, asked: Asked) -> bool:
    return f"Question {number}?" in json.dumps(asked.body["messages"])


def judge(server: Scripted, store_path, pools: Sequence[Pool], **fields: Any) -> list[Judgement]:
    usual = {"model": "judge-1", "base_url": server.url, "api_key_env": None, "max_concurrency": 1}
    section = OpenAISection(**{**usual, "timeout": 20.0, "max_outage": 20.0, **fields})

    async def work() -> list[Judgement]:
        annotator = build_annotator(AnnotationSection(kind="openai", openai=section), store_path=store_path, seed=0)
        try:
            return await asyncio.gather(*map(annotator.judge, pools))
        finally:
            await annotator.close()

    return asyncio.run(work())


def states(judgements: Sequence[Judgement]) -> list[str]:
    return [judgement.state for judgement in judgements]


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "annotations.sqlite"


# One question is not the endpoint


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (WEB_PAGE, "HTTP 403: a web page ('Blocked')"),
        (fault(403, "this prompt is not for you"), "HTTP 403: this prompt is not for you"),
        (fault(404, "no such thing"), "HTTP 404: no such thing"),
        (Answer(404, b"<html><title>Not here</title></html>"), "HTTP 404: a web page ('Not here')"),
        (fault(302, "elsewhere", headers={"Location": "/login"}), "HTTP 302: elsewhere"),
        (fault(413, "too large"), "HTTP 413: too large"),
    ],
    ids=["403 page", "403", "404", "404 page", "302", "413"],
)
def test_one_question_that_is_turned_away_is_no_reason_to_stop(answer, detail, store_path):
    with Scripted(after_probe(lambda asked: answer if about(3, asked) else graded(asked))) as server:
        found = judge(server, store_path, [pool(number) for number in range(8)])
        assert sum(about(3, asked) for asked in server.chats) == 1
    assert states(found) == ["ok"] * 3 + ["failed"] + ["ok"] * 4
    assert found[3].detail == detail


def test_a_first_question_that_is_turned_away_beside_others_is_its_own_fault(store_path):
    with Scripted(after_probe(lambda asked: WEB_PAGE if about(0, asked) else graded(asked))) as server:
        assert states(judge(server, store_path, [pool(n) for n in range(6)], max_concurrency=4)).count("failed") == 1


@pytest.mark.parametrize("answer", [WEB_PAGE, fault(403), fault(404)], ids=["page", "403", "404"])
def test_several_in_a_row_that_are_turned_away_stop_the_run(answer, store_path):
    numbers = count()
    with Scripted(after_probe(lambda asked: graded(asked) if next(numbers) < 4 else answer)) as server:
        with pytest.raises(EndpointError, match=rf"judge-1.*{server.url} answered HTTP 40[34]"):
            judge(server, store_path, [pool(number) for number in range(30)])
        assert len(server.chats) == 4 + routes.REFUSALS_STOP


def test_answers_between_them_keep_the_run_going(store_path):
    with Scripted(after_probe(lambda asked: WEB_PAGE if asked.body["seed"] % 2 else graded(asked))) as server:
        found = states(judge(server, store_path, [pool(0), *(pool(number) for number in range(1, 13))]))
    assert 2 < found.count("failed") < 11
    assert found.count("failed") + found.count("ok") == 13


@pytest.mark.parametrize(
    "answer",
    [
        fault(401, "Incorrect API key"),
        fault(403, "API key expired. Please renew the API key."),
        fault(400, "Please check the key.", code="INVALID_ARGUMENT", details=[{"reason": "API_KEY_INVALID"}]),
        fault(403, "no", code="invalid_api_key"),
    ],
    ids=["401", "403 in words", "400 in details", "403 by code"],
)
def test_a_key_that_expires_amid_the_run_stops_it_with_its_name(answer, store_path, monkeypatch):
    monkeypatch.setenv("JUDGES_KEY", KEY)
    numbers = count()
    with Scripted(after_probe(lambda asked: graded(asked) if next(numbers) < 4 else answer)) as server:
        with pytest.raises(EndpointError, match=r"put a key .* into the environment variable JUDGES_KEY") as caught:
            judge(server, store_path, [pool(number) for number in range(30)], api_key_env="JUDGES_KEY")
        assert len(server.chats) == 5
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        fault(402, "pay"),
        fault(429, "quota", code="insufficient_quota"),
        fault(429, "no balance", type="exceeded_current_quota_error"),
        fault(400, "overdue", code="Arrearage"),
    ],
    ids=["402", "quota", "balance", "arrears"],
)
def test_an_empty_account_stops_the_run_at_once(answer, store_path):
    with Scripted(after_probe(lambda asked: answer)) as server:
        with pytest.raises(EndpointError, match="the account is used up"):
            judge(server, store_path, [pool(number) for number in range(6)])
        assert len(server.chats) == 1


# Limits and storms


@pytest.mark.parametrize("where", ["probe", "questions"])
@pytest.mark.parametrize("answer", [fault(429, "Come back tomorrow", code=429),
                                    Answer(429, [{"error": {"message": "Come back tomorrow", "code": 429}}]),
                                    Answer(body={"error": {"message": "Come back tomorrow", "code": 429}})],
                         ids=["object", "list", "in a 200"])  # fmt: skip
def test_a_429_without_end_stops_the_run_after_max_outage_with_the_servers_words(answer, where, store_path):
    script = (lambda asked: answer) if where == "probe" else after_probe(lambda asked: answer)
    with Scripted(script) as server:
        with pytest.raises(Unreachable, match=r"let nothing through .*Come back tomorrow.*already paid for is kept"):
            judge(server, store_path, [pool(number) for number in range(4)], max_outage=0.3, max_tries=2)
        assert len(server.asked) > 3


def test_a_429_is_no_try(store_path):
    numbers = count()
    with Scripted(after_probe(lambda asked: graded(asked) if next(numbers) % 9 == 8 else fault(429))) as server:
        assert states(judge(server, store_path, [pool(n) for n in range(3)], max_tries=1)) == ["ok"] * 3
        assert len(server.chats) == 27


def test_a_question_that_alone_is_too_large_for_the_limits_fails_in_the_end(store_path):
    def script(asked: Asked) -> Answer:
        return fault(429, "Request too large") if about(1, asked) else graded(asked)

    with Scripted(after_probe(script)) as server:
        found = judge(server, store_path, [pool(number) for number in range(80)], max_outage=0.05, max_concurrency=2)
    assert states(found).count("ok") == 79
    assert (found[1].state, found[1].detail) == ("failed", "HTTP 429: Request too large")


def test_the_next_endpoint_serves_while_the_first_gives_nothing_but_429(store_path, monkeypatch):
    monkeypatch.setattr(routes, "LONG_PAUSE_SECONDS", 0.05)
    with Scripted(after_probe(lambda asked: fault(429))) as first, Scripted(after_probe(graded)) as second:
        more = [{"base_url": second.url}]
        assert states(judge(first, store_path, [pool(n) for n in range(4)], more_endpoints=more)) == ["ok"] * 4


@pytest.mark.parametrize("status", [500, 502, 503, 529])
def test_a_storm_of_5xx_is_waited_out_however_many_tries_it_takes(status, store_path):
    numbers = count()

    def script(asked: Asked) -> Answer:  # small requests, too
        return fault(status) if 2 < next(numbers) < 12 else completion("ready") if is_probe(asked) else graded(asked)

    with Scripted(script) as server:
        assert states(judge(server, store_path, [pool(n) for n in range(3)], max_tries=2)) == ["ok"] * 3


def test_a_storm_that_begins_amid_the_run_is_waited_out_too(store_path):
    """What was answered before it is no sign that the questions are to blame."""
    numbers = count()

    def script(asked: Asked) -> Answer:
        return fault(503) if 6 < next(numbers) < 40 else completion("ready") if is_probe(asked) else graded(asked)

    with Scripted(script) as server:
        found = judge(server, store_path, [pool(n) for n in range(9)], max_tries=2, max_concurrency=3)
    assert states(found) == ["ok"] * 9


def test_a_storm_ends_with_max_outage(store_path):
    numbers = count()
    script = lambda asked: completion("ready") if next(numbers) < 2 else fault(503, "no upstream")  # noqa: E731
    with Scripted(script) as server, pytest.raises(Unreachable, match=r"no endpoint answered for .*no upstream"):
        judge(server, store_path, [pool(n) for n in range(3)], max_tries=2, max_outage=0.3)


@pytest.mark.parametrize("others", [0, 5])
def test_a_question_that_a_server_fails_with_while_it_answers_others_has_its_tries(others, store_path):
    with Scripted(after_probe(lambda asked: fault(500, "index") if about(0, asked) else graded(asked))) as server:
        found = judge(server, store_path, [pool(number) for number in range(1 + others)], max_tries=3)
        assert sum(about(0, asked) for asked in server.chats) == 3
    assert states(found) == ["failed"] + ["ok"] * others
    assert found[0].detail == "HTTP 500: index"


# Errors in a 200, and ends


def test_an_error_in_a_200_is_the_error_that_it_is(store_path, monkeypatch):
    monkeypatch.setenv("JUDGES_KEY", KEY)
    answers = [
        Answer(body={"error": {"message": "rate-limited upstream", "code": 429}}),
        Answer(body={"error": {"message": "upstream", "code": 502}, "user_id": "u"}),
        Answer(body={"error": "odd"}),
    ]
    numbers = count()
    with Scripted(after_probe(lambda a: answers[n] if (n := next(numbers)) < 3 else graded(a))) as server:
        assert states(judge(server, store_path, [pool(1)])) == ["ok"]
        server.script = after_probe(lambda asked: Answer(body={"error": {"message": "no key", "code": 401}}))
        with pytest.raises(EndpointError, match="HTTP 401: no key; put a key"):
            judge(server, store_path, [pool(2)], api_key_env="JUDGES_KEY")


@pytest.mark.parametrize("fields", [{"finish_reason": "error"}, {"finish_reason": "abort"},
                                    {"finish_reason": "stop", "error": {"code": 502, "message": "upstream"}}],
                         ids=["error", "abort", "object"])  # fmt: skip
def test_a_reply_that_is_broken_off_is_a_fault_and_no_verdict(fields, store_path):
    numbers = count()
    whole = json.dumps({str(n): {"justification": "cut", "score": 3} for n in (1, 2, 3)})
    with Scripted(after_probe(lambda a: completion(whole, **fields) if next(numbers) < 2 else graded(a))) as server:
        (found,) = judge(server, store_path, [pool(1)], max_tries=2)
        assert (found.state, found.detail) == ("failed", "the reply was broken off by the server or one behind it")
        assert states(judge(server, store_path, [pool(1)])) == ["ok"]


REFUSALS = {
    "Azure": fault(400, "filtered", code="content_filter", innererror={"code": "ResponsibleAIPolicyViolation"}),
    "litellm": fault(400, "litellm.ContentPolicyViolationError: AzureException", code="400"),
    "OpenAI": fault(400, "Invalid prompt: flagged as potentially violating our usage policy", code="invalid_prompt"),
    "DashScope": fault(400, "Input data may contain inappropriate content.", code="data_inspection_failed"),
    "DeepSeek": fault(400, "Content Exists Risk"),
    "OpenRouter": fault(403, "flagged", metadata={"reasons": ["violence"], "flagged_input": "Which"}),
    "Gemini": completion(None, finish_reason="content_filter: PROHIBITED_CONTENT"),
    "Gemini, natively": completion("", finish_reason="SAFETY"),
    "a field": Answer(body={"choices": [{"message": {"content": None, "refusal": "I cannot help with that."}}]}),
}  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_moderations_refusal_is_one_request_and_one_questions(refusal, store_path):
    with Scripted(after_probe(lambda asked: refusal if about(1, asked) else graded(asked))) as server:
        assert states(judge(server, store_path, [pool(number) for number in range(3)])) == ["ok", "refused", "ok"]
        assert sum(about(1, asked) for asked in server.chats) == 1


# Schemas, contents, the same bytes


def schema_of(asked: Asked) -> dict[str, Any]:
    return asked.body.get("response_format", {}).get("json_schema", {}).get("schema", {})


def test_the_probe_shows_the_schema_that_will_be_sent(store_path):
    """Gemini takes schemas, and none with an enum of numbers."""

    def script(asked: Asked) -> Answer:
        if '"enum": [1' in json.dumps(schema_of(asked)):
            return Answer(400, [{"error": {"code": 400, "message": "Invalid value at enum[0]", "status": "INVALID"}}])
        return completion("ready") if is_probe(asked) else graded(asked)

    with Scripted(script) as server:
        assert states(judge(server, store_path, [pool(number) for number in range(3)])) == ["ok"] * 3
        assert [bool(schema_of(asked)) for asked in server.asked] == [False, True, False, False, False]


@pytest.mark.parametrize("said", ["too many properties in response_format", "Invalid request"])
def test_a_schema_that_is_refused_later_is_left_out_from_then_on(said, store_path, caplog):
    def script(asked: Asked) -> Answer:
        return fault(400, said) if len(schema_of(asked).get("properties", ())) > 3 else graded(asked)

    pools = [pool(0), pool(1, 5), pool(2, 6), pool(3)]
    with Scripted(after_probe(script)) as server:
        assert states(judge(server, store_path, pools)) == ["ok"] * 4
        assert [bool(schema_of(asked)) for asked in server.chats] == [True, True, False, False, False]
    assert len([record for record in caplog.records if "from now on it is sent none" in record.getMessage()]) == 1


def test_a_400_that_is_not_the_schemas_leaves_the_schema_and_insisting_leaves_no_choice(store_path):
    script = after_probe(lambda asked: fault(400, "context length") if about(0, asked) else graded(asked))
    with Scripted(script) as server:
        assert states(judge(server, store_path, [pool(0), pool(1)])) == ["failed", "ok"]
        assert schema_of(server.chats[-1])
        before = len(server.chats)
        assert states(judge(server, store_path, [pool(0)], structured="json_schema")) == ["failed"]
        assert len(server.chats) == before + 1


def parts(asked: Asked, *kinds: str) -> Answer:
    text = "ready" if is_probe(asked) else json.dumps(points(asked))
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    half = len(text) // 2
    halves = [{"type": kind, "text": part} for kind, part in zip(kinds, (text[:half], text[half:]), strict=True)]
    answer = completion(text)
    answer.body["choices"][0]["message"]["content"] = [thought, *halves]
    return answer


@pytest.mark.parametrize("kinds", [("text", "text"), ("output_text", "text")])
def test_a_content_in_parts_is_joined_without_its_thought(kinds, store_path):
    with Scripted(lambda asked: parts(asked, *kinds)) as server:
        assert states(judge(server, store_path, [pool(number) for number in range(3)])) == ["ok"] * 3


@pytest.mark.parametrize(
    ("fields", "requests"),
    [
        ({}, 4),  # another seed each time
        ({"send_seed": False}, 1),
        ({"send_seed": False, "temperature": 0.7}, 4),
        ({"send_seed": False, "temperature": None}, 4),
        ({"form": "logprob"}, 2),  # one for each order: probabilities depend on no seed
    ],
)
def test_the_same_bytes_are_not_bought_twice(fields, requests, store_path):
    with Scripted(after_probe(lambda _: completion("I prefer neither."))) as server:
        (found,) = judge(server, store_path, [pool(1, 2)], max_tries=4, **fields)
        bodies = [json.dumps(asked.body, sort_keys=True) for asked in server.chats]
    assert found.state == "unparsable"
    assert len(bodies) == requests
    if fields.get("temperature", 0.0) == 0.0:
        assert len(set(bodies)) == requests


def test_where_an_endpoint_takes_no_seed_a_fixed_request_is_sent_once(store_path):
    def script(asked: Asked) -> Answer:
        return fault(400, "no seed here", param="seed") if "seed" in asked.body else completion("nothing")

    with Scripted(script) as server:
        assert states(judge(server, store_path, [pool(1)], max_tries=4)) == ["unparsable"]
        assert len(server.chats) == 1


# What else is sent


def asked_with(store_path, number: int = 1, **fields: Any) -> int:
    """Return how many requests one question with extras took."""
    with Scripted(after_probe(graded)) as server:
        if query := fields.pop("own_query", None):
            fields["base_url"] = f"{server.url}?{query}"
        assert states(judge(server, store_path, [pool(number)], **fields)) == ["ok"]
        return sum(not is_probe(asked) for asked in server.asked)


def test_extras_are_sent_with_every_request_and_keys_come_from_the_environment(store_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AZURE_KEY", KEY)
    body = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
    extras = {"extra_body": body, "extra_headers": {"api-key": "$AZURE_KEY", "X-Title": "dno"}}
    with Scripted(after_probe(graded)) as server:
        judge(server, store_path, [pool(1)], **extras, extra_query={"api-version": "2024-10-21"})
        for asked in server.asked:
            assert {name: asked.body[name] for name in body} == body
            assert asked.headers.get("api-key", asked.headers.get("Api-Key")) == KEY
            assert asked.path.endswith("/chat/completions?api-version=2024-10-21")
            assert "authorization" not in {name.lower() for name in asked.headers}
    assert KEY not in caplog.text


def test_a_key_in_a_header_is_scrubbed_as_any_other(store_path, monkeypatch):
    monkeypatch.setenv("AZURE_KEY", KEY)
    with Scripted(after_probe(lambda _: fault(400, f"the key {KEY} is fine"))) as server:
        (found,) = judge(server, store_path, [pool(1)], extra_headers={"api-key": "${AZURE_KEY}"})
    assert found.detail == "HTTP 400: the key [key] is fine"
    with pytest.raises(DnoError, match="the environment variable NO_SUCH_KEY is not set"), Scripted() as server:
        judge(server, store_path, [pool(1)], extra_headers={"api-key": "$NO_SUCH_KEY"})


@pytest.mark.parametrize(
    ("fields", "requests"),
    [
        ({"extra_body": {"reasoning_effort": "high"}}, 1),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, 1),
        ({"extra_query": {"api-version": "2024-10-21"}}, 1),
        ({"own_query": "api-version=2024-10-21"}, 1),
        ({"extra_headers": {"anthropic-beta": "x"}}, 1),
        ({"extra_body": {"user": "me", "metadata": {"run": "1"}}}, 0),
        ({"extra_headers": {"HTTP-Referer": "somewhere", "X-Title": "dno"}}, 0),
        ({"extra_headers": {"api-key": "$AZURE_KEY"}}, 0),
    ],
)
def test_what_can_change_a_verdict_is_part_of_its_key(fields, requests, store_path, monkeypatch):
    monkeypatch.setenv("AZURE_KEY", KEY)
    assert asked_with(store_path) == 1
    assert asked_with(store_path) == 0
    assert asked_with(store_path, **fields) == requests


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"extra_headers": {"api-key": KEY}}, "'api-key' may hold a key"),
        ({"extra_headers": {"Authorization": f"Bearer {KEY}"}}, "'Authorization' may hold a key"),
        ({"extra_query": {"sig": KEY}}, "'sig' may hold a key"),
        ({"extra_headers": {"X-Note": "sk-0123456789abcdef0123"}}, "'X-Note' may hold a key"),
        ({"extra_headers": {"X-Two": "a\nb"}}, "characters that no header"),
        ({"extra_body": {"temperature": 1.0}}, "set temperature instead"),
        ({"extra_body": {"messages": []}}, "leave it out"),
        ({"extra_body": {"x": float("nan")}}, "not JSON"),
    ],
)
def test_extras_that_hold_keys_or_write_over_the_request_are_refused_without_being_shown(fields, said):
    with pytest.raises(ValueError, match=said) as caught:
        OpenAISection(model="m", **fields)
    assert KEY not in str(caught.value).partition("[type=")[0]


def test_two_members_of_an_ensemble_may_differ_by_what_is_sent_besides():
    plain, told = OpenAISection(model="m"), OpenAISection(model="m", extra_body={"reasoning_effort": "low"})
    assert len(AnnotationSection(kind="ensemble", ensemble=(plain, told)).judges) == 2
    with pytest.raises(ValueError, match="ask 'm' the same"):
        AnnotationSection(kind="ensemble", ensemble=(plain, plain))


# Another model


@pytest.mark.parametrize(
    ("asked", "answered", "another"),
    [
        ("m", "m", False),
        ("m", "", False),
        ("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14", False),
        ("openai/gpt-4o", "gpt-4o-2024-08-06", False),
        ("claude-3-5-sonnet-latest", "claude-3-5-sonnet-20241022", False),
        ("llama-3.1-8b", "accounts/x/models/Llama-3.1-8B-instruct-fp8", False),
        ("gpt-4.1", "gpt-4.1-mini", True),
        ("gpt-4.1", "gpt-4.1-mini-2025-04-14", True),
        ("judge-70b", "judge-7b", True),
        ("m", "tiny-fallback", True),
    ],
)
def test_dates_versions_and_precisions_make_no_other_model(asked, answered, another):
    assert is_another(asked, answered) == another


def test_another_model_than_asked_is_said_once_counted_and_in_the_receipts(store_path, caplog):
    numbers = count()

    def script(asked: Asked) -> Answer:
        answer = graded(asked)
        answer.body["model"] = "tiny-fallback" if next(numbers) % 2 else "judge-1-2026-01-01"
        return answer

    with Scripted(after_probe(script)) as server:
        for first in (0, 6):  # two calls of a run
            judge(server, store_path, [pool(first + number) for number in range(6)])
    said = [record.getMessage() for record in caplog.records if "was asked and" in record.getMessage()]
    assert len(said) == 2
    assert "'judge-1' was asked and 'tiny-fallback' answers" in said[0]
    with closing(VerdictStore(store_path)) as store:
        budget = Budget(AnnotationSection(kind="openai"), store=store, run=".")
        (found,) = budget.receipt()["models"].values()
        assert found["answered_by"]["tiny-fallback"] == 6
