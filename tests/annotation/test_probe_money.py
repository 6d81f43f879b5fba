"""What finding out about endpoints costs: each request is set aside and billed, and not sent where it does not fit."""

from __future__ import annotations

import asyncio
from contextlib import closing

import pytest

from dno_jax.annotation.build import open_client
from dno_jax.annotation.endpoint_annotator import EndpointAnnotator
from dno_jax.annotation.judges.functions import build_function
from dno_jax.annotation.ledger.store import Receipt, VerdictStore
from dno_jax.annotation.transport.completion import completion_reply
from dno_jax.config import AnnotationSection
from dno_jax.errors import DnoError
from dno_jax.records import Judgement
from tests.annotation.scripted import Answer, Asked, Scripted, completion, fault, is_probe
from tests.annotation.test_client import planted

LONGEST = 1000  # tokens of a reply, and a dollar each: what is sent hardly counts


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.001)


def section(*servers: Scripted, **fields) -> AnnotationSection:
    first, *others = [{"base_url": server.url, "api_key_env": None} for server in servers]
    openai = {"model": "m", **first, "more_endpoints": others, "max_tokens": LONGEST, "max_tries": 2, "timeout": 20.0}
    openai |= fields.pop("openai", {})
    prices = {"m": {"input": 0.0, "output": 1e6}}
    return AnnotationSection.model_validate({"kind": "openai", "openai": openai, "prices": prices, **fields})


def judge(config: AnnotationSection, path, *, before_the_second=lambda: None) -> tuple[list[Judgement], Receipt]:
    async def work() -> list[Judgement]:
        annotator = EndpointAnnotator(build_function(config, seed=0), open_client(config, store_path=path))
        try:
            first = await annotator.judge(planted(0)[0])
            before_the_second()
            return [first, await annotator.judge(planted(5)[0])]
        finally:
            await annotator.close()

    try:
        found = asyncio.run(work())
    except DnoError:
        found = []
    with closing(VerdictStore(path)) as store:
        return found, next(iter(store.receipts()), Receipt(".", "m"))


def test_every_request_of_a_probe_is_billed_the_ones_that_fail_too(tmp_path):
    """The plain one is met by a 500, a garbled page and silence before it is answered."""
    answers = [fault(500), Answer(body=b"<html>"), Answer(fault="reset"), completion()]

    def script(asked: Asked) -> Answer:
        return answers.pop(0) if is_probe(asked) and answers else completion("no verdict")

    with Scripted(script) as server:
        _, receipt = judge(section(server, openai={"max_tries": 5}), tmp_path / "s.sqlite")
        assert receipt.requests == len(server.asked)
        assert receipt.unmetered == 2
        stated = len(server.asked) - 3
        assert receipt.usd == pytest.approx(2 * LONGEST + 3 * stated)


def test_a_probe_that_gives_up_has_been_billed(tmp_path):
    with Scripted(lambda _: Answer(fault="reset")) as server:
        found, receipt = judge(section(server), tmp_path / "s.sqlite")
        assert (found, receipt.requests, receipt.unmetered) == ([], len(server.asked), 2)


@pytest.mark.parametrize("room", [0.9, 1.5, 2.5])
def test_no_probe_is_sent_that_might_pass_the_limit(tmp_path, room):
    """An endpoint that charges the most and says nothing of it."""

    def script(_: Asked) -> Answer:
        return Answer(body={key: value for key, value in completion().body.items() if key != "usage"})

    with Scripted(script) as server:
        found, receipt = judge(section(server, max_usd=room * LONGEST), tmp_path / "s.sqlite")
        assert LONGEST * len(server.asked) == receipt.usd <= room * LONGEST
        assert len(server.asked) == int(room)
    assert {judgement.state for judgement in found} == {"over budget"}


def test_the_probe_of_a_stand_in_is_billed_and_kept_within_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("dno_jax.annotation.transport.routes.FAILURES_OPEN", 1)
    # beside the call that waits for it, each wants another two thirds of a small limit
    for limit, asked in ((100 * LONGEST, 2), (1.5 * LONGEST, 0)):
        with Scripted(lambda _: completion("no verdict")) as first, Scripted() as second:

            def die(first=first) -> None:
                first.script = lambda _: fault(500)

            path = tmp_path / f"{asked}.sqlite"
            fields = {"openai": {"max_tries": 3}, "max_usd": float(limit)}
            found, receipt = judge(section(first, second, **fields), path, before_the_second=die)
            probes = [one for one in second.asked if is_probe(one)]
            assert len(probes) == asked
            assert receipt.requests == len(first.asked) + len(second.asked)
            assert found[1].state == ("unparsable" if asked else "over budget")


def test_half_a_statement_of_usage_is_none_and_tokens_of_reasoning_count():
    def usage(**stated):
        reply = completion_reply({"choices": [{"message": {"content": "x"}}], "usage": stated})
        return reply.tokens_in, reply.tokens_out

    assert usage(prompt_tokens=50) == (0, 0)
    assert usage(completion_tokens=50) == (0, 0)
    assert usage(prompt_tokens=50, total_tokens=80) == (50, 30)
    assert usage(prompt_tokens=50, completion_tokens=10, total_tokens=60) == (50, 10)
    assert usage(prompt_tokens=50, completion_tokens=10, total_tokens=560) == (50, 510)
    assert usage(prompt_tokens=50, completion_tokens=10, total_tokens=0) == (50, 10)
