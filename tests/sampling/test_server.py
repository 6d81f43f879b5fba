"""Sampling over real HTTP: what the server drew comes back as it drew it, and what is not surely so never does."""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dno_jax.config import CompletionServerSection
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.records import Message
from dno_jax.sampling import server as server_module
from dno_jax.sampling.completion import Codec, Task, request_seed
from dno_jax.sampling.requests import Finished, Request, Response, SamplingParams
from dno_jax.sampling.server import complete
from dno_jax.sampling.transforms import Truncation
from tests.model.conftest import run
from tests.sampling.completion_server import (
    BEGIN,
    DIALECTS,
    END,
    PIECES,
    CompletionServer,
    decode,
    distribution,
    encode,
    log_softmax,
    toy_logits,
)
from tests.small import WORDS, write_checkpoint

KEY = "planted.0123456789.do-not-leak"  # unlike an OpenAI key: found because it is the key, not by its looks
CODEC = Codec(
    encode=lambda index, text: encode(text),
    decode=lambda index, ids: decode(ids),
    text_ids=lambda text: (BEGIN, *encode(text)),
)
TRUNCATION = Truncation(temperature=0.8, top_k=6, top_p=0.9, min_p=0.02)
PENALISED = dataclasses.replace(TRUNCATION, repetition_penalty=1.1)
ALL = Truncation(temperature=1.0)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.001)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    ours = ("completions", "asyncio_")  # the loop's, and those it looks names up in
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(ours)]


def section(server: CompletionServer | str, **fields: object) -> CompletionServerSection:
    url = server if isinstance(server, str) else server.url
    return CompletionServerSection(**{"base_url": url, "timeout": 20.0, "max_tries": 4, **fields})


def sampling_params(**fields: object) -> SamplingParams:
    base = {"num_samples": 3, "max_new_tokens": 8, "end_ids": (END,), "truncation": TRUNCATION, "seed": 7}
    return SamplingParams(**{**base, "num_ids": len(PIECES), **fields})


def prompts(count: int) -> list[Request]:
    return [Request((BEGIN, 2 + number % 8, 2 + number // 8 % 8), name=1000 + number) for number in range(count)]


def task(config: CompletionServerSection, what: SamplingParams | None = None, **fields: Any) -> Task:
    base = {"sampling_params": what or sampling_params(), "codec": CODEC, "iteration": 0}
    return Task(section=config, **{**base, **fields})


def sample(
    config: CompletionServerSection,
    requests: Sequence[Request],
    what: SamplingParams | None = None,
    *,
    codec: Codec = CODEC,
    iteration: int = 0,
    stop: tuple[str, ...] = (),
    **others: object,
) -> list[tuple[Response, ...]]:
    """All responses, in the order of the requests; every request must have been answered once."""
    what = what or sampling_params()
    found: dict[int, tuple[Response, ...]] = {}
    asked = task(config, what, codec=codec, iteration=iteration, stop=stop)
    for item in complete(requests, asked, **others):
        assert isinstance(item, Finished)
        assert item.index not in found
        assert len(item.responses) == what.num_samples
        found[item.index] = item.responses
    assert sorted(found) == list(range(len(requests)))
    return [found[index] for index in range(len(requests))]


def test_frequencies_are_those_of_the_truncated_distribution():
    """Every sampling field reaches the server, so that chi-square tests of one step's tokens hold (1e-4 each)."""
    what = sampling_params(num_samples=250, max_new_tokens=1)
    requests = prompts(3)
    with CompletionServer() as server:
        answers = sample(section(server), requests, what)
    fields = {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.02}
    for request, responses in zip(requests, answers, strict=True):
        expected = 250 * distribution(toy_logits(request.token_ids), fields)
        count = np.bincount([item.token_ids[0] for item in responses], minlength=len(PIECES))
        assert np.all(count[expected == 0] == 0)
        kept = expected > 0
        assert 2 <= kept.sum() <= 6
        chi_square = np.sum((count[kept] - expected[kept]) ** 2 / expected[kept])
        assert chi_square < 25.7  # 1e-4 of chi-square with 5 degrees of freedom, the most there can be


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_was_drawn_comes_back_with_its_ids(dialect):
    requests = prompts(8)
    with CompletionServer(dialect=dialect) as server:
        counts: Counter[str] = Counter()
        config = section(server, logprobs="raw", max_tries=50)
        answers = sample(config, requests, counts=counts)
        drawn = [(tuple(body["prompt"]), *server._draw(body["prompt"], body)) for body in server.sampled]
        wanted = {(prompt, tuple(ids)): logprobs for prompt, ids, logprobs, _ in drawn}
    assert {item.finish for responses in answers for item in responses} == {"stop", "length"}
    for request, responses in zip(requests, answers, strict=True):
        for item in responses:
            assert (request.token_ids, item.token_ids) in wanted
            assert (item.token_ids[-1] == END) == (item.finish == "stop")
            assert END not in item.token_ids[:-1]
            if dialect == "plain":  # its ids are ours, so nothing says whose the log-probs are
                assert item.logprobs is None
                assert item.text == decode(item.token_ids)
            else:
                assert item.text is None
                assert item.logprobs is not None
                assert list(item.logprobs) == wanted[request.token_ids, item.token_ids]
    assert counts["responses"] == 24
    assert ("responses without log-probs" in counts) == (dialect == "plain")
    refused = sum(count for name, count in counts.items() if name.startswith("refused"))
    assert counts["requests"] == 1 + 24 + refused
    assert (refused > 0) == (dialect == "plain")


def test_addressed_seeds_make_the_same_responses_in_any_order():
    requests = prompts(6)
    with CompletionServer() as server:
        answers = sample(section(server), requests)
        assert sample(section(server, max_concurrency=1), requests[::-1])[::-1] == answers
        server.delay = lambda body: 0.01 * (body["seed"] % 7)  # samples of a prompt arrive in another order
        assert sample(section(server), requests) == answers
        server.delay = lambda body: 0.0
        more = sample(section(server), requests[2:3], sampling_params(num_samples=5, first_sample=1))[0]
        assert more[:2] == answers[2][1:]
        assert len({item.token_ids for item in more}) > 1
        assert sample(section(server), requests, sampling_params(seed=8)) != answers
        twins = [Request(requests[0].token_ids, name=1), Request(requests[0].token_ids, name=2)]
        first, second = sample(section(server), twins, sampling_params(num_samples=6))
        assert first != second
    with CompletionServer(model="policy-001") as server:
        assert sample(section(server), requests, iteration=1) != answers


def test_seeds_differ_and_fit_every_server():
    seeds = [
        request_seed(seed=seed, iteration=iteration, prompt=prompt, sample=sample, redraw=redraw)
        for seed in (0, 1)
        for iteration in (0, 1)
        for prompt in (0, 2**32 - 1)
        for sample in range(8)
        for redraw in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_requests_say_all_that_decides_and_no_more_than_ids():
    with CompletionServer() as server:
        sample(section(server), prompts(1), sampling_params(truncation=PENALISED), stop=("dc",))
        (*bodies,) = server.sampled
    assert len(bodies) == 3
    for body in bodies:
        seed = body.pop("seed")
        assert isinstance(seed, int)
        assert body == {
            "model": "policy-000", "prompt": [BEGIN, 2, 2], "max_tokens": 8, "n": 1, "stop": ["dc"],
            "temperature": 0.8, "top_p": 0.9, "top_k": 6, "min_p": 0.02, "repetition_penalty": 1.1,
            "repeat_penalty": 1.1, "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
            "stop_token_ids": [END], "return_token_ids": True,
        }  # fmt: skip
    with CompletionServer() as server:
        sample(section(server, logprobs="processed"), prompts(1), sampling_params(truncation=ALL, max_total_tokens=8))
        assert {(body["max_tokens"], body["top_k"], body["logprobs"]) for body in server.sampled} == {(5, -1, 1)}


@pytest.mark.parametrize(
    ("stated", "truncation", "penalty", "kept"),
    [
        ("raw", TRUNCATION, 1.0, True),
        ("raw", ALL, 1.3, True),
        ("processed", ALL, 1.0, True),
        ("processed", ALL, 1.3, False),
        ("processed", TRUNCATION, 1.0, False),
        ("processed", Truncation(temperature=0.99), 1.0, False),
        ("processed", Truncation(temperature=0.0), 1.0, False),
        ("none", ALL, 1.0, False),
    ],
)
def test_log_probs_are_the_policys_or_none(stated, truncation, penalty, kept):
    requests = prompts(2)
    with CompletionServer(logprobs="processed" if stated == "processed" else "raw") as server:
        what = sampling_params(truncation=dataclasses.replace(truncation, repetition_penalty=penalty))
        answers = sample(section(server, logprobs=stated), requests, what)
    for request, responses in zip(requests, answers, strict=True):
        for item in responses:
            assert (item.logprobs is not None) == kept
            if item.logprobs is not None:
                texts = [(*request.token_ids, *item.token_ids[:n]) for n in range(len(item.token_ids))]
                policys = [log_softmax(toy_logits(text))[t] for text, t in zip(texts, item.token_ids, strict=True)]
                # float64 through JSON and through exp and log
                np.testing.assert_allclose(item.logprobs, policys, atol=1e-9)


@pytest.mark.parametrize("odd", [[-9999.0, -1.0], [-1.0], [None, -1.0], [0.5, -1.0], ["-1", -1.0], "-1"])
def test_log_probs_that_can_be_none_are_none(odd):
    def alter(reply):
        reply["choices"][0] |= {"token_ids": [2, END], "finish_reason": "stop", "logprobs": {"token_logprobs": odd}}
        return reply

    with CompletionServer(alter=alter) as server:
        answers = sample(section(server, logprobs="raw"), prompts(1))
    assert answers == [(Response((2, END), None, "stop"),) * 3]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stop_string_ends_a_response_without_an_end_id(dialect):
    def talks() -> CompletionServer:
        return CompletionServer(dialect=dialect, logits=lambda ids: np.where(np.arange(len(PIECES)) == END, -9, 0.0))

    with talks() as server:
        what = sampling_params(truncation=Truncation(temperature=0.5, top_k=9), max_new_tokens=40, num_ids=None)
        if dialect in ("llama.cpp", "plain"):
            with pytest.raises(DnoError, match="does not say whether a stop string or the end id"):
                sample(section(server, logprobs="raw"), prompts(2), what, stop=("a", "zzz"))
            return
        answers = sample(section(server), prompts(2), what, stop=("a", "zzz"))
    for item in (item for responses in answers for item in responses):
        assert item.finish == "stop"
        assert item.token_ids[-1] in (PIECES.index("a"), PIECES.index("ab"))
        assert item.text is not None
        assert decode(item.token_ids).startswith(item.text + "a")


def alone(altered: dict[str, object], *, what: SamplingParams | None = None) -> Response:
    """The one response to a reply whose choice is altered so."""

    def alter(reply):
        reply["choices"][0] |= {"stop_reason": None, "logprobs": None, **altered}
        return reply

    what = what or sampling_params()
    with CompletionServer(alter=alter) as server:
        config = section(server, logprobs="raw", max_tries=1)
        return sample(config, prompts(1), sampling_params(**{**vars(what), "num_samples": 1}))[0][0]


def test_end_ids_are_where_the_response_ends():
    two = sampling_params(end_ids=(END, 9))
    lp = {"token_logprobs": [-1.0, -2.0, -3.0]}
    # a server that keeps its end id to itself: appended, and what its log-prob was is not known
    assert alone({"token_ids": [2, 3], "finish_reason": "stop"}) == Response((2, 3, END), None, "stop")
    assert alone({"token_ids": [2, 3], "finish_reason": "stop", "logprobs": lp}).logprobs is None
    assert alone({"token_ids": [2], "finish_reason": "stop", "stop_reason": 9}, what=two).token_ids == (2, 9)
    # a server that goes on after an end id: cut there
    past = {"token_ids": [2, 9, 3], "finish_reason": "length", "logprobs": lp}
    assert alone(past, what=sampling_params(end_ids=(END, 9), max_new_tokens=3)) == Response(
        (2, 9), (-1.0, -2.0), "stop"
    )
    # a response of nothing but its end is one
    assert alone({"token_ids": [END], "finish_reason": "stop"}).token_ids == (END,)
    with pytest.raises(DnoError, match=r"ended a response by id 4, and the policy's end ids are \[0\]"):
        alone({"token_ids": [2, 3], "finish_reason": "stop", "stop_reason": 4})
    with pytest.raises(DnoError, match="cut a response after 2 tokens, where 8 were asked for"):
        alone({"token_ids": [2, 3], "finish_reason": "length"})


@pytest.mark.parametrize(
    ("text", "finish", "tokens", "reason"),
    [
        ("cabd", "stop", 4, None),  # c, ab, d and the end
        ("cabd", "stop", 3, None),  # which some do not count
        ("cabd", "stop", 5, "text of other tokens than were drawn"),  # c, a, b, d and the end
        ("cabd", "length", 4, "text of other tokens than were drawn"),
        ("cabd" * 3, "stop", 10, "longer than it may be"),
        ("c?d", "stop", 4, "text that our tokenizer does not give back"),
        ("c<|tool|>d", "stop", 4, "text that our tokenizer does not take"),
        ("ca\ufffd", "length", 3, "text with a broken character"),
        ("", "stop", 1, "empty"),
    ],
)
def test_text_is_tokenised_only_where_that_is_what_was_drawn(text, finish, tokens, reason):
    def strict(index: int, text: str) -> tuple[int, ...]:
        if "<|" in text:
            raise DnoError("the response spells a control token")
        return encode(text)

    def alter(reply):
        reply["choices"][0] |= {"text": text, "finish_reason": finish}
        reply["usage"]["completion_tokens"] = tokens
        return reply

    codec = dataclasses.replace(CODEC, encode=strict)
    with CompletionServer(dialect="plain", alter=alter) as server:
        counts: Counter[str] = Counter()
        if reason is None:
            answers = sample(section(server), prompts(1), codec=codec, counts=counts)
            assert answers == [(Response((4, 7, 5, END), None, "stop", text="cabd"),) * 3]
            return
        with pytest.raises(DnoError, match=f"no usable response to 1 of 1 prompts.*'refused: {reason}'"):
            sample(section(server, max_concurrency=1), prompts(1), codec=codec, counts=counts)
        assert counts[f"refused: {reason}"] == 12
        assert len({body["seed"] for body in server.sampled}) == 12  # each draws anew
        # as long as few enough are lost, they are counted and left out
        got = complete(prompts(1), task(section(server, max_refused=1.0), codec=codec), counts=counts)
        assert list(got) == []
        assert counts["prompts without responses"] == 2
        greedy = sampling_params(truncation=Truncation(temperature=0.0), num_samples=1)
        server.bodies.clear()
        with pytest.raises(DnoError, match="no usable response"):
            sample(section(server), prompts(1), greedy, codec=codec)
        assert len(server.sampled) == 1  # what is decided is not asked again


def test_a_text_without_a_count_is_as_long_as_was_asked_or_ended():
    def alter(reply):
        reply["usage"].pop("completion_tokens")
        reply["choices"][0] |= {"text": "cabd", "finish_reason": "length"}
        return reply

    with CompletionServer(dialect="plain", alter=alter) as server:
        assert sample(section(server), prompts(1), sampling_params(max_new_tokens=3))[0][0].token_ids == (4, 7, 5)
        with pytest.raises(DnoError, match="text of other tokens than were drawn"):
            sample(section(server), prompts(1), sampling_params(max_new_tokens=4))


@pytest.mark.parametrize(
    "schedule",
    [
        ["429", "500", "close"],
        ["503", "html", "none"],
        ["two", "cut json", "text null"],
        ["ids are words", "abort", "408"],
    ],
)
def test_a_fault_is_asked_again_with_the_same_seed(schedule):
    requests = prompts(2)
    with CompletionServer() as server:
        answers = sample(section(server), requests)
    with CompletionServer(schedule=[None, *schedule]) as server:
        counts: Counter[str] = Counter()
        assert sample(section(server, max_concurrency=1), requests, counts=counts) == answers
        assert counts["requests"] == 1 + 6 + 3
        assert len({body["seed"] for body in server.sampled}) == 6


@pytest.mark.parametrize("fault", ["empty", "filter", "strange id", "too long"])
def test_an_answer_that_is_no_sample_is_drawn_anew(fault):
    with CompletionServer(schedule=[None, fault]) as server:
        counts: Counter[str] = Counter()
        responses = sample(section(server, max_concurrency=1), prompts(1), counts=counts)[0]
        assert sum(name.startswith("refused") for name in counts) == 1
        assert counts["requests"] == 1 + 3 + 1
        first, second, *_ = server.sampled
        assert first["seed"] != second["seed"]
        assert all(max(item.token_ids) < len(PIECES) and len(item.token_ids) <= 8 for item in responses)


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ([None, *["500"] * 4], "no answer in 4 tries: HTTP 500: planted fault 500"),
        ([None, *["html"] * 4], "no answer in 4 tries: HTTP 200 without one completion: <html>a proxy"),
        ([None, *["abort"] * 4], "no answer in 4 tries: the response ended by 'abort'"),
        ([None, *["close"] * 4], "no answer in 4 tries: the connection broke"),
        ([None, "400"], "no answer in 1 try: HTTP 400: planted fault 400"),
        ([None, "422"], "no answer in 1 try: HTTP 422: planted fault 422"),
        ([None, "401"], "sampling.server.api_key_env"),
        ([None, "404"], "fix sampling.server.model, or base_url"),
        ([None, "402"], "account is used up"),
        (["500"] * 4, "no answer in 4 tries"),  # the probe
        ([None, "other prompt"], "a prompt of 3 token ids was sent, and the server read another of 4"),
        ([None, "other count"], "a prompt of 3 token ids was sent, and the server read another of 4"),
    ],
)
def test_what_cannot_be_mended_stops_the_sampling_and_says_where(schedule, says):
    with CompletionServer(schedule=schedule) as server:
        with pytest.raises(DnoError, match=says):
            sample(section(server, max_concurrency=1), prompts(4))
        assert len(server.bodies) == len(schedule)


def test_a_failure_amid_others_ends_them_all():
    late = lambda body: 0.05 if body["prompt"] != [BEGIN, 2, 2] else 0.0  # noqa: E731
    with CompletionServer(schedule=[None, "400"], delay=late) as server:
        with pytest.raises(DnoError, match="HTTP 400"):
            sample(section(server, max_concurrency=4), prompts(50))
        assert len(server.bodies) < 20


def test_a_hanging_server_is_given_up():
    with (
        CompletionServer(schedule=[None, "hang", "hang"]) as server,
        pytest.raises(DnoError, match=r"no answer in 2 tries: no answer within 0\.2 s"),
    ):
        sample(section(server, timeout=0.2, max_tries=2, max_concurrency=1), prompts(1))


def test_a_server_that_is_not_there():
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(DnoError, match=f"at {url} does not list its models: no connection.*base_url"):
            sample(section(url, max_tries=2), prompts(1))


def test_another_policy_another_path_and_another_tokenizer_are_found_before_the_first_response():
    with CompletionServer(model="policy-000") as server:
        with pytest.raises(DnoError, match=r"serves policy-000, not 'policy-001'.*--served-model-name"):
            sample(section(server), prompts(1), iteration=1)
        with pytest.raises(DnoError, match=r"HTTP 404.*usually ends in /v1"):
            sample(section(server.url.removesuffix("/v1")), prompts(1))
        for ids_of in (lambda text: (BEGIN, *encode(text)[:-2]), lambda text: tuple(range(2, 90))):
            codec = dataclasses.replace(CODEC, text_ids=ids_of)
            with pytest.raises(DnoError, match=r"tokenizer makes .* ids .* of a text that ours makes"):
                sample(section(server), prompts(1), codec=codec)
        assert not server.sampled
        # a begin token is the server's affair: prompts are sent as ids
        without = dataclasses.replace(CODEC, text_ids=encode)
        sample(section(server), prompts(1), codec=without)
    with CompletionServer(dialect="plain") as server:
        codec = dataclasses.replace(CODEC, text_ids=lambda text: encode(text)[:-1])
        with pytest.raises(DnoError, match="tokenizer makes"):
            sample(section(server), prompts(1), codec=codec)


def test_no_more_requests_are_in_flight_than_allowed_and_prompts_come_as_they_are_done():
    last = [BEGIN, 2, 2]  # the first prompt's
    with CompletionServer(delay=lambda body: 2.0 if body["prompt"] == last else 0.01) as server:
        config, what = section(server, max_concurrency=5), sampling_params(num_samples=2)
        order = [item.index for item in complete(prompts(12), task(config, what))]
        assert server.max_in_flight == 5
    assert order[-1] == 0
    assert sorted(order) == list(range(12))


def test_requests_go_on_while_the_caller_works():
    with CompletionServer() as server:
        items = complete(prompts(5), task(section(server)))
        next(items)
        deadline = time.monotonic() + 20.0
        while len(server.sampled) < 15 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(server.sampled) == 15
        assert len(list(items)) == 4


def test_closing_early_cancels_what_is_in_flight():
    with CompletionServer(delay=lambda body: 30.0 if body["prompt"] == [BEGIN, 3, 2] else 0.0) as server:
        config = section(server, max_concurrency=4)
        items = complete(prompts(40), task(config))
        assert next(items).index != 1
        before = time.monotonic()
        items.close()
        assert time.monotonic() - before < 20.0  # nobody waits for the answer of 30 s
        asked = len(server.bodies)
        assert 4 < asked < 121
        with pytest.raises(StopIteration):
            next(items)
        assert len(server.bodies) == asked


@pytest.mark.parametrize("dialect", [pytest.param("vllm", marks=pytest.mark.soak), "plain"])
def test_an_exported_checkpoint_behind_a_server(tmp_path, dialect):
    """Our export in transformers behind HTTP, with our tokenizer: log-probs are those of our decoder on its ids."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    path = write_checkpoint(tmp_path / "policy")
    tokenizer = ChatTokenizer.load(path, "raw")
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def peer_logits(ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return peer(torch.tensor([list(ids)])).logits[0, -1].numpy().astype(np.float64)

    chats = [[Message(role="user", content=" ".join(WORDS[n : n + 4]))] for n in range(4)]
    requests = [Request(tokenizer.prompt_ids(chat), name=number) for number, chat in enumerate(chats)]
    (end_id,) = tokenizer.end_ids
    codec = Codec(
        encode=lambda index, text: tokenizer.response_ids(chats[index], text, end_id=end_id)[:-1],
        decode=lambda index, ids: tokenizer.decode(ids),
        text_ids=tokenizer.text_ids,
    )
    what = sampling_params(
        num_samples=2, max_new_tokens=10, end_ids=(end_id,), num_ids=tokenizer.vocab_size,
        truncation=Truncation(temperature=0.9, top_p=0.95),
    )  # fmt: skip
    with CompletionServer(
        peer_logits, text_of=tokenizer.decode, ids_of=lambda text: tokenizer.text_ids(text)[1:], end_ids=(end_id,),
        dialect=dialect,
    ) as server:  # fmt: skip
        answers = sample(section(server, max_tries=20, logprobs="raw"), requests, what, codec=codec)
        bodies = {body["seed"]: body for body in server.sampled}
        read = [(server.prompt_ids(body), body) for body in bodies.values()]
        drawn = {(*prompt, *server._draw(prompt, body)[0]) for prompt, body in read}
    config, params = hf.load(path)
    for request, responses in zip(requests, answers, strict=True):
        for item in responses:
            whole = (*request.token_ids, *item.token_ids)
            assert whole in drawn
            assert (item.logprobs is None) == (dialect != "vllm")
            if item.logprobs is not None:
                ours = run(config, params, [whole])[0, len(request.token_ids) - 1 : -1].astype(np.float64)
                ours = [log_softmax(row)[token] for row, token in zip(ours, item.token_ids, strict=True)]
                # float32 in two frameworks, on logits of tens
                np.testing.assert_allclose(item.logprobs, ours, atol=1e-4)


def test_a_caller_that_fails_leaves_nothing_running():
    with CompletionServer(delay=lambda body: 0.02) as server:

        def work() -> None:
            for item in complete(prompts(90), task(section(server))):
                raise RuntimeError(f"the disk is full at {item.index}")

        with pytest.raises(RuntimeError, match="the disk is full"):
            work()
        assert len(server.bodies) < 271  # the frame is gone by now, and the iterator with it


def test_nothing_is_asked_for_nothing():
    with CompletionServer() as server:
        assert sample(section(server), []) == []
        with pytest.raises(DnoError, match=r"leaves no room for a response within sampling.max_total_tokens=3"):
            sample(section(server), prompts(1), sampling_params(max_total_tokens=3))
        assert not server.bodies


def test_a_server_that_ignores_seeds_is_noticed(caplog):
    with CompletionServer(honours_seed=False) as server:
        sample(section(server), prompts(10))
    assert caplog.text.count("does it ignore the seed of a request?") == 1


def test_the_key_is_nowhere_but_in_the_request(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("DNO_TEST_KEY", KEY + "\n")  # as mounted secrets often end
    said: list[str] = []
    with CompletionServer(api_key=KEY, schedule=[None, "500"]) as server:
        config = section(server, api_key_env="DNO_TEST_KEY", max_concurrency=1)
        said.append(repr(sample(config, prompts(2))))
        items = complete(prompts(9), task(config))
        next(items)
        monkeypatch.setattr(server, "api_key", "another")  # its 401 quotes the key it was given
        with pytest.raises(DnoError, match=r"Incorrect API key provided: \[key\].*variable DNO_TEST_KEY") as caught:
            list(items)
    error: BaseException | None = caught.value
    while error is not None:
        said += ["".join(traceback.format_exception(error)), repr(vars(error))]
        assert type(error).__module__.startswith("dno_jax")
        error = error.__cause__ or error.__context__
    assert "try 1 of 4: HTTP 500" in caplog.text
    assert all(KEY not in text for text in [*said, caplog.text, repr(config)])
    monkeypatch.delenv("DNO_TEST_KEY")
    with pytest.raises(DnoError, match="variable DNO_TEST_KEY is not set"):
        sample(config, prompts(1))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with CompletionServer(api_key="none") as server:  # without a variable, none is taken from the surroundings
        sample(section(server), prompts(1))


def test_retry_after_is_honoured(monkeypatch):
    waits = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(server_module, "_pause", note)
    with CompletionServer(schedule=[None, "429", "500"]) as server:
        sample(section(server, max_concurrency=1), prompts(1))
    assert len(waits) == 2
