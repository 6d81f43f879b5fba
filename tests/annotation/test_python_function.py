"""A judge that is a function: what it returns is taken as it is, or not at all."""

from __future__ import annotations

import asyncio
import sys

import pytest

from dno_jax.annotation.build import build_annotator
from dno_jax.config import AnnotationSection, RunConfig, parse_config
from dno_jax.errors import DnoError
from tests.annotation.planted import pool_of

MODULE = """
import numpy as np
SEEN = []
def shorter(messages, responses):
    SEEN.append((messages, responses))
    return [-len(text) for text in responses]
async def slow(messages, responses):
    return np.arange(len(responses))
def wins(messages, responses):
    return [[0.5, 1.0, 0.25], [0.0, 0.5, 0.5], [0.75, 0.5, 0.5]]
def raises(messages, responses): raise KeyError("\\x1b[2J no\\nsuch word")
def too_few(messages, responses): return [1.0]
def none(messages, responses): return None
def not_a_number(messages, responses): return [1.0, float("nan"), 2.0]
def words(messages, responses): return ["good", "bad", "ugly"]
def one_sided(messages, responses): return [[0.5, 1.0, 1.0]] * 3
def exits(messages, responses): return [[0.5] * 2] * 2
value = 3
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_judge", raising=False)

    def build(name, **fields):
        section = AnnotationSection(kind="python", python={"function": name, **fields})
        return build_annotator(section, store_path=tmp_path / "none.sqlite", seed=0)

    yield build
    sys.modules.pop("own_judge", None)
    assert not (tmp_path / "none.sqlite").exists()


POOL = pool_of(["one two", "three", "seven nine"])


@pytest.mark.parametrize(
    ("name", "returns", "scores", "wins"),
    [
        ("own_judge:shorter", "points", (-7.0, -5.0, -10.0), None),
        ("own_judge:slow", "points", (0.0, 1.0, 2.0), None),
        ("own_judge:wins", "wins", None, ((0.5, 1.0, 0.25), (0.0, 0.5, 0.5), (0.75, 0.5, 0.5))),
    ],
)
def test_points_and_win_rates(judge, name, returns, scores, wins):
    annotator = judge(name, returns=returns)
    found = asyncio.run(annotator.judge(POOL))
    assert (found.state, found.scores, found.wins) == ("ok", scores, wins)
    assert found.judge == annotator.identity
    assert annotator.recall(POOL) is None
    if name.endswith("shorter"):
        messages, responses = sys.modules["own_judge"].SEEN[0]
        assert messages == [{"role": "user", "content": "What is it?"}]
        assert responses == ["one two", "three", "seven nine"]


@pytest.mark.parametrize(
    ("name", "returns", "detail"),
    [
        ("raises", "points", "KeyError: '\\x1b[2J no\\nsuch word'"),
        ("too_few", "points", "expected 3 finite numbers, one per response, got [1.0]"),
        ("none", "points", "expected 3 finite numbers"),
        ("not_a_number", "points", "got [1.0, nan, 2.0]"),
        ("words", "points", "could not convert string to float"),
        ("wins", "points", "got an array of (3, 3)"),
        ("shorter", "wins", "expected a 3 x 3 matrix"),
        ("one_sided", "wins", "ValueError"),
        ("exits", "wins", "expected a 3 x 3 matrix of P(row beats column), got an array of (2, 2)"),
    ],
)
def test_whatever_else_it_does_is_no_verdict(judge, name, returns, detail):
    found = asyncio.run(judge(f"own_judge:{name}", returns=returns).judge(POOL))
    assert (found.state, found.scores, found.wins) == ("failed", None, None)
    assert detail in found.detail
    assert found.detail.isprintable()


def test_an_edited_function_is_another_judge(judge, tmp_path):
    before = judge("own_judge:shorter").identity
    sys.modules.pop("own_judge")
    assert judge("own_judge:shorter").identity == before
    assert judge("own_judge:slow").identity != before
    sys.modules.pop("own_judge")
    (tmp_path / "own_judge.py").write_text(MODULE + "# another\n")
    assert judge("own_judge:shorter").identity != before


def test_so_many_calls_run_at_a_time_as_are_allowed(judge, tmp_path):
    (tmp_path / "own_judge.py").write_text(
        "import threading, time\nnow = most = 0\nlock = threading.Lock()\n"
        "def f(messages, responses):\n"
        "    global now, most\n"
        "    with lock:\n        now += 1\n        most = max(most, now)\n"
        "    time.sleep(0.02)\n"
        "    with lock:\n        now -= 1\n"
        "    return [0.0] * len(responses)\n"
    )

    async def ask(annotator):
        await asyncio.gather(*(annotator.judge(POOL) for _ in range(6)))

    for limit in (1, 3):
        sys.modules.pop("own_judge", None)
        annotator = judge("own_judge:f", max_concurrency=limit)
        asyncio.run(ask(annotator))
        assert annotator.width == limit
        assert sys.modules["own_judge"].most == limit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "the module 'no_such_module' cannot be imported from"),
        ("own_judge:nobody", "own_judge has no function 'nobody'; its functions: exits, none"),
        ("own_judge:value", "own_judge has no function 'value'"),
        ("broken_judge:f", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_called_is_refused_at_the_start(judge, tmp_path, name, message):
    (tmp_path / "broken_judge.py").write_text("1 / 0\n")
    before = list(sys.path)
    with pytest.raises(DnoError) as error:
        judge(name)
    assert f"annotation.python.function={name}: " in str(error.value)
    assert message in str(error.value)
    assert sys.path == before


@pytest.mark.parametrize(
    ("annotation", "pairing", "message"),
    [
        ({"kind": "python"}, {}, "kind=python needs annotation.python.function"),
        ({"kind": "python", "python": {"function": "no_colon"}}, {}, "annotation.python.function"),
        ({"kind": "python", "python": {"function": "m:f", "returns": "wins"}}, {"reward": "score"}, "no scores"),
        ({"kind": "python", "python": {"function": "m:f"}}, {"reward": "score"}, None),
        (
            {"kind": "python", "python": {"function": "m.n:f"}, "quality": {"repeat": 0.5}},
            {},
            "repeat=0.5 asks an endpoint",
        ),
    ],
)
def test_what_it_goes_with(annotation, pairing, message):
    tree = {"run_dir": "r", "model": {"path": "m"}, "prompts": {"path": "p", "held_out": 2}, "annotation": annotation}
    if message is None:
        config = parse_config(RunConfig, tree | {"pairing": pairing}, place="test")
        assert config.annotation.is_judge
        assert config.annotation.gives_scores
        return
    with pytest.raises(DnoError, match=message):
        parse_config(RunConfig, tree | {"pairing": pairing}, place="test")
