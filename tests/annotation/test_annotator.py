"""The factory, the pool and the order of presentation."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys

import pytest

from dno_jax.annotation import Candidate, Pool, build_annotator, prompt_text
from dno_jax.annotation.embedded import GivenAnnotator, GoldAnnotator, TableAnnotator
from dno_jax.annotation.pool import Annotator, presentation_order
from dno_jax.config import AnnotationSection, OpenAISection, OracleSection, TableSection
from dno_jax.errors import DnoError
from dno_jax.records import Message, Prompt

PROMPT = Prompt(prompt_id="p", messages=(Message(role="user", content="Tell a story about a brave cat."),))


def pool(*texts: str, prompt: Prompt = PROMPT) -> Pool:
    return Pool(prompt, tuple(Candidate(f"000/{prompt.prompt_id}/{i}", text) for i, text in enumerate(texts)))


def test_a_pool_has_two_or_more_candidates_none_twice():
    with pytest.raises(ValueError, match="two or more"):
        pool("alone")
    with pytest.raises(ValueError, match="none twice"):
        Pool(PROMPT, (Candidate("a", "x"), Candidate("a", "y")))


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([("user", "q")], "q"),
        ([("system", "s"), ("user", "q1"), ("assistant", "a"), ("user", "q2")], "q2"),
        ([("system", "s"), ("user", "q"), ("system", "t")], "q"),
        ([("system", "s"), ("system", "t")], "s\nt"),
    ],
)
def test_prompt_text(messages, text):
    prompt = Prompt(prompt_id="p", messages=tuple(Message(role=role, content=content) for role, content in messages))
    assert prompt_text(prompt) == text


def test_the_oracle_answers_every_pool_and_needs_no_store(tmp_path):
    annotator = build_annotator(AnnotationSection(), store_path=tmp_path / "no" / "store", seed=0)
    assert isinstance(annotator, Annotator)
    judged = pool("The brave cat told a story by the sea.", "No.", "Cat cat cat cat cat cat.")
    judgement = asyncio.run(annotator.judge(judged))
    assert judgement.state == "ok"
    assert judgement.scores is None
    assert judgement.candidate_ids == judged.candidate_ids
    assert judgement.wins[0] == (0.5, 1.0, 1.0)
    assert all(judgement.wins[i][j] + judgement.wins[j][i] == 1.0 for i in range(3) for j in range(3))
    assert judgement == annotator.recall(judged)
    asyncio.run(annotator.probe())
    assert (annotator.asks_by_batch, annotator.may_repeat, annotator.receipt()) == (False, False, None)
    annotator.refuse_over_budget(0)
    asyncio.run(annotator.drain())
    asyncio.run(annotator.close())


def test_an_annotator_behind_an_endpoint_can_be_asked_again_and_says_what_it_has_paid(tmp_path):
    judge = OpenAISection(api_key_env=None, base_url="http://127.0.0.1:9/v1")
    prices = {judge.model: {"input": 1.0, "output": 1.0}}

    async def built(**fields):
        tree = {"kind": "openai", "openai": judge.model_copy(update=fields), "prices": prices, "max_usd": 2.5}
        annotator = build_annotator(AnnotationSection.model_validate(tree), store_path=tmp_path / "s.sqlite", seed=0)
        try:
            assert isinstance(annotator, Annotator)
            annotator.refuse_over_budget(0)
            with pytest.raises(DnoError, match=r"max_usd=2\.5 leaves no room.* 7 pools have no verdict yet"):
                annotator.refuse_over_budget(7)
            receipt = annotator.receipt()
            assert (receipt["usd"], receipt["max_usd"], receipt["models"]) == (0, 2.5, {})
            return annotator.asks_by_batch, annotator.may_repeat
        finally:
            await annotator.drain()
            await annotator.close()

    assert asyncio.run(built()) == (False, True)
    assert asyncio.run(built(batch=True)) == (True, True)


def test_every_embedded_kind_is_built_without_a_store(tmp_path):
    game = TableSection(answers=("rock", "paper"), preferences=((0.5, 0.2), (0.8, 0.5)))
    built = [
        build_annotator(AnnotationSection(kind=kind, table=game), store_path=tmp_path / "no" / "store", seed=3)
        for kind in ("table", "gold", "given")
    ]
    assert [type(annotator) for annotator in built] == [TableAnnotator, GoldAnnotator, GivenAnnotator]
    assert built[0].identity == TableAnnotator(game, seed=3).identity


def test_the_policy_as_its_own_judge_is_not_built_here(tmp_path):
    with pytest.raises(DnoError, match=r"annotation\.kind=self"):
        build_annotator(AnnotationSection(kind="self"), store_path=tmp_path / "s", seed=0)


def test_an_unknown_criterion_and_a_crooked_table_are_refused_when_built(tmp_path):
    section = AnnotationSection(oracle=OracleSection(criteria=("brevity", "variety", "wit")))
    with pytest.raises(DnoError, match="wit"):
        build_annotator(section, store_path=tmp_path / "s", seed=0)
    crooked = TableSection(answers=("rock", "paper"), preferences=((0.5, 0.3), (0.8, 0.5)))
    with pytest.raises(DnoError, match=r"annotation\.table\.preferences"):
        build_annotator(AnnotationSection(kind="table", table=crooked), store_path=tmp_path / "s", seed=0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "environment variable DNO_TEST_KEY is not set"),
        ({"api_key_env": None, "rubric": "nonesuch"}, "listwise_6point"),
        ({"api_key_env": None, "base_url": "nonsense"}, r"openai\.base_url: 'nonsense': expected http\(s\)://host"),
        ({"api_key_env": None, "base_url": "localhost:8000/v1"}, "'localhost:8000/v1': expected http"),
        ({"api_key_env": None, "base_url": "http:///v1"}, "'http:///v1': expected http"),
        ({"api_key_env": None, "base_url": "user:hunter22@host/v1"}, "'host/v1': expected http"),
        ({"api_key_env": None, "base_url": "http://user:hunter22@/v1"}, "'/v1': expected http"),
        ({"api_key_env": None, "base_url": "ftp://user:hunter22@host/v1"}, "'ftp://host/v1': expected http"),
        ({"api_key_env": None, "base_url": "host/v1?key=hunter22"}, "'host/v1': expected http"),
        ({"api_key_env": None, "base_url": "host/v1?key=a@hunter22"}, r"'\.\.\.': expected http"),
        ({"api_key_env": None, "base_url": "http://host:port/v1"}, "not a URL"),
        ({"api_key_env": None, "base_url": "http://user:hunter22@host/v1"}, "with a user"),
        ({"api_key_env": None, "base_url": "http://host/v1?key=hunter22"}, "a query"),
    ],
)
def test_what_is_wrong_shows_when_the_annotator_is_built(tmp_path, monkeypatch, fields, reason):
    monkeypatch.delenv("DNO_TEST_KEY", raising=False)
    section = AnnotationSection(kind="openai", openai=OpenAISection(**{"api_key_env": "DNO_TEST_KEY", **fields}))
    with pytest.raises(DnoError, match=reason) as caught:
        build_annotator(section, store_path=tmp_path / "s", seed=0)
    assert "hunter22" not in str(caught.value)


def test_a_key_with_odd_characters_is_refused_without_being_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("DNO_TEST_KEY", "sk-secret\nsecond line")
    section = AnnotationSection(kind="openai", openai=OpenAISection(api_key_env="DNO_TEST_KEY"))
    with pytest.raises(DnoError, match="DNO_TEST_KEY holds no key") as caught:
        build_annotator(section, store_path=tmp_path / "s", seed=0)
    assert "secret" not in str(caught.value)


def test_every_place_is_equally_likely_and_the_order_is_a_function_of_seed_and_ids():
    texts = ("a", "b", "c")
    seen = {}
    for number in range(600):
        prompt = PROMPT.model_copy(update={"prompt_id": f"p{number}"})
        order = presentation_order(pool(*texts, prompt=prompt), seed=0)
        assert order == presentation_order(pool(*texts, prompt=prompt), seed=0)
        seen[order] = seen.get(order, 0) + 1
    # 600 draws of 6 orders: mean 100, standard deviation 9; the draws are fixed, so this cannot flicker.
    assert set(seen) == set(itertools.permutations(range(3)))
    assert all(60 < count < 140 for count in seen.values())
    assert len({presentation_order(pool(*"abcdef"), seed=seed) for seed in range(20)}) > 10


def test_importing_the_package_is_cheap():
    code = "import sys, dno_jax.annotation; print([m for m in ('jax', 'openai', 'jinja2') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_no_annotator_imports_jax_and_the_client_no_openai():
    modules = "dno_jax.annotation.transport.client, dno_jax.annotation.client, dno_jax.annotation.embedded"
    code = f"import sys, {modules}; print([m for m in ('jax', 'openai') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
