"""The budget: the most that a call can cost is set aside before it is sent, so that no run passes its limit."""

from __future__ import annotations

import asyncio
import json
import math
import random
from contextlib import AsyncExitStack, closing

import pytest

from dno_jax.annotation.build import run_name
from dno_jax.annotation.client import JudgeClient
from dno_jax.annotation.ledger.budget import Budget, Usage, cost, most_usage
from dno_jax.annotation.ledger.store import VerdictStore
from dno_jax.annotation.question import Question, Reply, Verdict
from dno_jax.config import AnnotationSection, OpenAISection, PriceSection
from dno_jax.endpoint import Trouble
from dno_jax.errors import DnoError
from tests.annotation.paid_judge import SECTION, FakeClient, Used, question, said

PRICES = {"m": {"input": 10.0, "output": 20.0}}
MOST = (4 + 64) * 10e-6 + 100 * 20e-6  # dollars, of a question of four bytes and a hundred tokens of reply
REAL = 40 * 10e-6 + 10 * 20e-6  # dollars of `said`


@pytest.fixture
def path(tmp_path):
    return tmp_path / "annotations.sqlite"


def section(**fields) -> AnnotationSection:
    return AnnotationSection.model_validate({"kind": "openai", "openai": SECTION, "prices": PRICES, **fields})


def names(count: int, *, first: int = 0) -> list[Question]:
    """Questions of four bytes."""
    return [question(f"{number:04d}") for number in range(first, first + count)]


def ask_all(model: FakeClient, config: AnnotationSection, path, questions) -> tuple[list[Verdict], float, dict]:
    async def work():
        store = VerdictStore(path)
        budget = Budget(config, store=store, run=".")
        client = JudgeClient({SECTION: model}, store=store, budget=budget)
        try:
            verdicts = await asyncio.gather(*map(client.ask, questions))
            return verdicts, budget.spent, budget.receipt()
        finally:
            await client.close()

    return asyncio.run(work())


def states(verdicts: list[Verdict]) -> dict[str, int]:
    found = [verdict.state for verdict in verdicts]
    return {state: found.count(state) for state in sorted(set(found))}


def test_the_most_a_call_can_take_is_bounded_by_its_bytes_and_its_longest_reply():
    assert most_usage(question("four")) == Usage(4 + 64, 100)
    assert most_usage(question("日本")) == Usage(6 + 64, 100)
    schema = {"type": "object"}
    assert most_usage(question("four", schema=schema)).tokens_in == 4 + len(json.dumps(schema)) + 2 * 64
    reasoning = OpenAISection(model="m", max_tokens_field="max_completion_tokens", max_tokens=7)
    asked = Question(
        reasoning, "j", "p", (0, 1), {"messages": [], "max_completion_tokens": 5}, read=lambda reply: (1.0,)
    )
    assert most_usage(asked).tokens_out == 5


def test_what_tokens_cost():
    price = PriceSection(input=2.0, output=8.0, batch=0.5)
    assert cost(price, Usage(1_000_000, 500_000)) == 6.0
    assert cost(price, Usage(1_000_000, 500_000), batch=True) == 3.0


def test_what_is_paid_stands_in_the_receipt_with_the_prices(path):
    client = FakeClient(probe=Used(100, 1))
    _, spent, receipt = ask_all(client, section(), path, names(3))
    assert spent == pytest.approx(3 * REAL + 100 * 10e-6 + 20e-6)
    with closing(VerdictStore(path)) as store:
        store_id = store.store_id
    assert receipt == {
        "store": store_id,
        "path": str(path),
        "max_usd": None,
        "usd": spent,
        "models": {
            "m": {
                "requests": 4,  # one of them the probe
                "tokens_in": 220,
                "tokens_out": 31,
                "usd": spent,
                "requests_without_usage": 0,
                "price": {"input": 10.0, "output": 20.0, "batch": 0.5},
            }
        },
    }
    json.dumps(receipt)


def test_without_a_price_nothing_costs_anything_and_the_receipt_says_so(path):
    _, spent, receipt = ask_all(FakeClient(), section(prices={}), path, names(2))
    assert spent == 0.0
    assert receipt["models"]["m"]["price"] is None
    assert receipt["models"]["m"]["tokens_in"] == 80


def test_a_limit_without_a_price_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"annotation\.prices has no 'm': give its"):
        section(prices={}, max_usd=1.0)


def test_the_limit_is_never_passed_and_is_used_to_the_last_call_that_fits(path):
    """Forty calls would fit by what they really cost, ten by the most that they can cost."""
    limit = 10.5 * MOST
    client = FakeClient(probe=Used(1, 0), delay=0.001)
    verdicts, spent, _ = ask_all(client, section(max_usd=limit), path, names(100))
    assert spent <= limit
    assert client.most_in_flight == 10
    # as long as another call at its worst fits, it is made
    made = len(client.bodies)
    assert (made - 1) * REAL + MOST <= limit < made * REAL + MOST + 10e-6
    assert states(verdicts) == {"ok": made, "over budget": 100 - made}
    over = next(verdict for verdict in verdicts if verdict.state == "over budget")
    assert (over.tries, over.usd) == (0, 0.0)
    assert "annotation.max_usd=" in over.detail
    with closing(VerdictStore(path)) as store:
        assert {tally.state: tally.verdicts for tally in store.tallies()} == {"ok": made}


def test_calls_that_all_cost_their_worst_do_not_pass_the_limit(path):
    client = FakeClient(default=lambda: said("1", tokens_in=68, tokens_out=100), probe=Used(1, 0), delay=0.001)
    verdicts, spent, _ = ask_all(client, section(max_usd=10.5 * MOST), path, names(50))
    assert spent == pytest.approx(10 * MOST + 10e-6)
    assert states(verdicts) == {"ok": 10, "over budget": 40}


def test_a_run_goes_on_after_the_limit_is_raised_and_pays_for_nothing_twice(path):
    questions = names(60)
    client = FakeClient(probe=Used(1, 0))
    verdicts, spent, _ = ask_all(client, section(max_usd=10 * MOST), path, questions)
    made = len(client.bodies)
    assert 0 < made < 60
    with closing(VerdictStore(path)) as store:
        error = Budget(section(max_usd=10 * MOST), store=store, run=".").stop(missing=states(verdicts)["over budget"])
    assert isinstance(error, DnoError)
    parts = (f"annotation.max_usd={10 * MOST:g}", f"${spent:.4f}", f"{60 - made} pools", "Raise annotation.max_usd")
    assert all(part in str(error) for part in parts)
    same = ask_all(client, section(max_usd=10 * MOST), path, questions)[0]
    assert (states(same), len(client.bodies), client.probes) == (states(verdicts), made, 1)
    more = ask_all(client, section(max_usd=1.0), path, questions)[0]
    assert states(more) == {"ok": 60}
    assert len(client.bodies) == 60


def test_a_limit_of_nothing_sends_nothing_but_to_a_model_that_costs_nothing(path):
    client = FakeClient()
    assert states(ask_all(client, section(max_usd=0.0), path, names(3))[0]) == {"over budget": 3}
    assert (client.probes, client.bodies) == (0, [])
    free = {"m": {"input": 0.0, "output": 0.0}}
    assert states(ask_all(client, section(max_usd=0.0, prices=free), path, names(3))[0]) == {"ok": 3}


def test_a_reply_without_usage_counts_as_the_most_it_can_have_cost(path):
    client = FakeClient([said("1", tokens_in=0, tokens_out=0)], probe=Used(1, 0))
    verdicts, spent, receipt = ask_all(client, section(), path, names(1))
    assert verdicts[0].usd == pytest.approx(MOST)
    assert spent == pytest.approx(MOST + 10e-6)
    assert receipt["models"]["m"]["requests_without_usage"] == 1
    assert (verdicts[0].tokens_in, verdicts[0].tokens_out) == (0, 0)  # what nobody counted is not made up


@pytest.mark.parametrize(
    ("trouble", "usd"),
    [
        (Trouble("HTTP 500", status=500), 0.0),
        (Trouble("HTTP 429", status=429), 0.0),
        (Trouble("HTTP 503", status=503), 0.0),
        (Trouble("HTTP 408", status=408), MOST),
        (Trouble("HTTP 502", status=502), MOST),
        (Trouble("HTTP 504", status=504), MOST),
        (Trouble("HTTP 524", status=524), MOST),
        (Trouble("no connection", unreachable=True), 0.0),
        (Trouble("no answer within 1 s"), MOST),
        (Trouble("HTTP 200 without a chat completion"), MOST),
    ],
    ids=lambda value: value.detail if isinstance(value, Trouble) else "",
)
def test_a_failed_try_is_free_where_the_endpoint_refused_it_and_counts_where_nobody_knows(
    path, monkeypatch, trouble, usd
):
    monkeypatch.setattr("dno_jax.endpoint.wait_seconds", lambda *_, **__: 0.0)
    client = FakeClient([trouble], probe=Used(1, 0))
    verdicts, spent, receipt = ask_all(client, section(), path, names(1))
    assert verdicts[0].tries == 2
    assert spent == pytest.approx(usd + REAL + 10e-6)
    assert receipt["models"]["m"]["requests"] == 3


def test_money_set_aside_comes_back_when_calls_fail_or_are_cancelled(path):
    async def work() -> None:
        store = VerdictStore(path)
        budget = Budget(section(max_usd=2.5 * MOST), store=store, run=".")
        first, second, third, fourth = names(4)

        async def hold(asked: Question, until: asyncio.Event) -> bool:
            async with budget.room(asked) as granted:
                await until.wait()
                return granted

        go, never = asyncio.Event(), asyncio.Event()
        holders = [asyncio.ensure_future(hold(asked, never)) for asked in (first, second)]
        waiting = [asyncio.ensure_future(hold(asked, go)) for asked in (third, fourth)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # while it waits
        holders[0].cancel()  # while it holds
        await asyncio.sleep(0)
        go.set()
        assert await waiting[1] is True
        holders[1].cancel()
        await asyncio.gather(*holders, waiting[0], return_exceptions=True)
        assert (budget._held, budget._holders) == (0.0, 0)
        store.close()

    asyncio.run(work())


def test_a_batch_takes_the_room_there_is_at_its_own_price_and_stops_nobody(path):
    async def work() -> tuple[list[bool], list[bool]]:
        with closing(VerdictStore(path)) as store:
            budget = Budget(section(max_usd=1.75 * MOST), store=store, run=".")
            async with AsyncExitStack() as stack:
                rooms = [budget.room(asked, batch=True, wait=False) for asked in names(5)]
                batch = [await stack.enter_async_context(room) for room in rooms]
            live = []
            for asked in names(2):
                async with budget.room(asked) as granted:
                    live.append(granted)
            return batch, live

    # at half the price three fit into what holds one live call; given back, it holds a live one again
    assert asyncio.run(work()) == ([True, True, True, False, False], [True, True])


def test_what_a_batch_answers_is_billed_at_its_price(path):
    async def work() -> Verdict:
        store = VerdictStore(path)
        client = JudgeClient({SECTION: FakeClient()}, store=store, budget=Budget(section(), store=store, run="."))
        try:
            return await client.settle(names(1)[0], said("1"), batch=True)
        finally:
            await client.close()

    assert asyncio.run(work()).usd == pytest.approx(0.5 * REAL)


def test_no_order_of_events_passes_the_limit(path, monkeypatch):
    """Calls of random sizes and lengths, with failures and replies to be asked again: never is more served."""
    monkeypatch.setattr("dno_jax.endpoint.wait_seconds", lambda *_, **__: 0.0)
    rng = random.Random(5)
    served = [10e-6]

    def reply() -> Reply | Trouble:
        if rng.random() < 0.2:
            return Trouble("HTTP 500", status=500, then=rng.choice(["retry", "give up"]))
        tokens_in, tokens_out = rng.randrange(1, 68), rng.randrange(1, 101)
        served.append(tokens_in * 10e-6 + tokens_out * 20e-6)
        return said(rng.choice(["1", "none"]), tokens_in=tokens_in, tokens_out=tokens_out)

    class Uneven(FakeClient):
        async def send(self, body, **fields):
            await asyncio.sleep(rng.random() * 0.003)
            return await super().send(body, **fields)

    limit = 12 * MOST
    client = Uneven(default=reply, probe=Used(1, 0))
    verdicts, spent, _ = ask_all(client, section(max_usd=limit), path, names(200))
    assert "over budget" in states(verdicts)
    assert limit - MOST - 1e-9 < sum(served) <= limit + 1e-9
    assert spent == pytest.approx(sum(served))


def test_what_another_process_spends_for_the_run_counts(path):
    async def work() -> list[bool]:
        with closing(VerdictStore(path)) as store, closing(VerdictStore(path)) as other:
            budget = Budget(section(max_usd=2.5 * MOST), store=store, run=".")
            elsewhere = Budget(section(), store=other, run=".")
            granted = []
            for asked in names(3):
                async with budget.room(asked) as room:
                    granted.append(room)
                await other.pay(elsewhere.bill(asked, Trouble("no answer within 1 s")))
            return granted

    assert asyncio.run(work()) == [True, True, False]


def test_a_run_is_named_by_where_it_lies_so_that_both_may_move(tmp_path):
    own = str(tmp_path / "runs" / "one" / "annotations.sqlite")
    assert run_name(own, own) == "."
    assert run_name(own, str(tmp_path / "runs" / "shared.sqlite")) == "one"
    assert run_name("gs://bucket/one/annotations.sqlite", str(tmp_path / "shared.sqlite")) == "gs://bucket/one"


def test_an_infinite_limit_is_none_at_all():
    with pytest.raises(ValueError, match="finite"):
        section(max_usd=math.inf)
