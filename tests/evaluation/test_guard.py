"""Which answers are right, and when a policy is said to have forgotten."""

from __future__ import annotations

import json
import random

import pytest

from dno_jax.errors import DnoError
from dno_jax.evaluation.guard import check_of, guard_figures, is_right
from dno_jax.stages.guard import read_questions


@pytest.mark.parametrize(
    ("response", "answer", "check", "right"),
    [
        ("3 + 4 is 7, so the answer is 7.", "7", "number", True),
        ("She has $1,234.50 left.", "1234.5", "number", True),
        ("It is 7, not 8", "7", "number", False),  # the last number counts
        ("no number", "7", "number", False),
        ("-3", "3", "number", False),
        ("x = \u22123", "-3", "number", True),
        ("10-3", "3", "number", True),  # what is taken away, not -3
        ("so 5 to 7, or 5-7", "-7", "number", False),
        ("it costs 1{,}234 or 1\u202f234", "1234", "number", True),
        ("12345678901234567890", "12345678901234567891", "number", False),
        ("9" * 400, "9" * 399 + "8", "number", False),
        ("\\boxed{42}, in 3 steps", "42", "number", True),
        ("\\boxed{7}, no, \\boxed{ \\text{about }42}.", "42", "number", True),
        ("so\n#### 42\n", "42", "number", True),
        ("it is \\frac{3}{4}", "0.75", "number", True),
        ("it is 3/4", "4", "number", False),
        ("it is 2/4", "1/2", "number", True),
        ("on 3/4/2024", "2024", "number", True),
        ("1/0", "0", "number", True),
        (".50", "1/2", "number", True),
        ("5 km/h", "5", "number", True),
        ("(B). I hope that this helps", "B", "choice", True),
        ("B, as a dog is no cat. A dog barks.", "B", "choice", True),
        ("It is not B: A is right", "A", "choice", True),
        ("C or I", "I", "choice", True),
        ("\\boxed{C}, and not A", "C", "choice", True),
        ("I think (B) is right", "B", "choice", True),
        ("A is wrong, so B.", "B", "choice", True),
        ("Because", "B", "choice", False),
        (" Paris. ", "paris", "exact", True),
        ("It is Paris", "Paris", "exact", False),
        ("It is Paris!", "Paris", "contains", True),
        ("Parisian", "Paris", "contains", False),
        ("the blue whale", "blue whale", "contains", True),
        ("", "Paris", "contains", False),
    ],
)
def test_what_is_right(response, answer, check, right):
    assert is_right(response, [answer], check) is right
    assert is_right(response, ["99", answer] if check == "number" else ["nothing", answer], check) is right


def test_how_answers_are_checked_by_default():
    assert [check_of([one]) for one in ("42", "1,000", "-2.5", "$3", "1/2", "\u22122", "B", "Paris", "4 apples")] == [
        "number", "number", "number", "number", "number", "number", "choice", "contains", "contains",
    ]  # fmt: skip


def answered(share, *, seed, count=300, samples=1):
    rng = random.Random(seed)
    return {str(q): [rng.random() < share for _ in range(samples)] for q in range(count)}


def test_a_fall_is_told_with_its_interval():
    """The paper's GSM8K: .635 before, .542 after, on 1,319 questions."""
    found = guard_figures({0: answered(0.635, seed=0, count=1319), 1: answered(0.542, seed=1, count=1319)})
    (fall,) = found["falls"]
    assert (fall["policy"], fall["earlier"]) == (1, 0)
    assert fall["low"] < -0.093 < fall["high"] < 0.0
    (sentence,) = found["warnings"]
    assert "policy 1 answers" in sentence
    assert found["accuracy"]["0"]["value"] == pytest.approx(0.635, abs=0.03)
    assert found["accuracy"]["0"]["prompts"] == 1319


def test_policies_that_are_as_good_raise_no_alarm():
    alarms = sum(
        bool(guard_figures({0: answered(0.6, seed=2 * s), 1: answered(0.6, seed=2 * s + 1)})["falls"])
        for s in range(200)
    )
    assert alarms / 200 <= 0.06  # 2.5 % of two-sided intervals lie below 0
    assert guard_figures({0: answered(0.5, seed=0)})["falls"] == []
    assert guard_figures({0: {"q": [True]}, 1: {"q": [False]}})["falls"] == []  # one question is no evidence


def test_the_best_before_is_looked_at_too():
    same = answered(0.5, seed=0, count=400)
    better = {name: [True] if int(name) % 3 else own for name, own in same.items()}
    found = guard_figures({0: same, 1: better, 2: same})
    assert [(fall["policy"], fall["earlier"]) for fall in found["falls"]] == [(2, 1)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_questions_of_several_forms(tmp_path):
    path = write(
        tmp_path / "guard.jsonl",
        {"question": "3 + 4?", "answer": 7},
        {"question": "GSM8K's", "answer": "He has 3.\n#### 1,200"},
        {"prompt": "Capital?", "answer": ["Paris", "paris city"]},
        {"question": "Pick", "answer": "B", "check": "exact"},
    )
    found = read_questions(path)
    assert [(one.answers, one.check) for one in found] == [
        (("7",), "number"),
        (("1,200",), "number"),
        (("Paris", "paris city"), "contains"),
        (("B",), "exact"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x", "answer": ""}], "expected a question"),
        ([{"question": "x", "answer": True}], "expected a question"),
        ([{"question": "x", "answer": []}], "expected a question"),
        ([{"question": "x", "answer": float("nan")}], "expected a question"),
        ([{"answer": "x"}], "expected a question"),
        ([{"question": "x", "answer": "Paris", "check": "number"}], "check is 'number'"),
        ([{"question": "x", "answer": "Paris", "check": "guess"}], "known: number, choice, exact, contains"),
        ([{"question": "x", "answer": "1"}, {"question": "x", "answer": "2"}], "a second row"),
        ([], "no questions"),
    ],
)
def test_rows_that_are_no_questions(tmp_path, rows, message):
    with pytest.raises(DnoError, match=message):
        read_questions(write(tmp_path / "guard.jsonl", *rows))
