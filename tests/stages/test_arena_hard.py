"""Arena-Hard asked of a policy whose answers are planted, through the real client and a fake judge."""

from __future__ import annotations

import json

import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.console import PlainConsole
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.evaluation.arena_hard import score
from dno_jax.fake_judge import FakeJudge
from dno_jax.report.measured import suite_table
from dno_jax.run_dir import RunDir
from dno_jax.stages import suites
from dno_jax.stages.speak import Said
from dno_jax.stages.suite import Wanted
from dno_jax.stages.suite_arena_hard import read_items
from tests.stages.judged import judged_tree

LENGTHS = {0: 40, 1: 2, 2: 9, 3: 7}  # words of an answer, by the question's number; the baseline's has 8
SAME = 4  # the question whose answer is the baseline's own


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A run with a policy of planted answers, the suite's files, and a judge that counts words."""
    (tmp_path / "policies" / "000").mkdir(parents=True)
    questions = [
        {
            "question_id": f"q{n}",
            "category": "arena-hard-v0.1",
            "cluster": "c",
            "turns": [{"content": f"Question {n}?"}],
        }
        for n in range(5)
    ]
    baseline = [
        {"question_id": f"q{n}", "answer_id": "a", "model_id": "gpt-4-0314", "tstamp": 1.0,
         "choices": [{"index": 0, "turns": [{"content": "word " * 8, "token_len": 8}]}]}
        for n in reversed(range(5))
    ]  # fmt: skip
    for name, rows in (("question", questions), ("baseline", baseline)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {f"Question {n}?": "other " * LENGTHS[n] + "\u2028" for n in LENGTHS} | {f"Question {SAME}?": "word " * 8}

    class Planted:
        @classmethod
        def of_run(cls, config):
            return cls()

        def answer_all(self, policy, prompts, *, num_samples):
            for prompt in reversed(prompts):
                yield prompt, (Said(answers[prompt.messages[-1].content], "stop"),)

    monkeypatch.setattr(suites, "Speakers", Planted)
    seen = []

    def points(prompt, candidates):
        seen.append(tuple(len(text.split()) for text in candidates))
        return [float(len(text.split())) for text in candidates]

    with FakeJudge(scorer=points) as server:
        judge = {"model": "judge", "base_url": server.url, "api_key_env": None, "form": "pairwise"}
        tree = judged_tree(tmp_path, server.url, evaluation={"annotation": {"kind": "openai", "openai": judge}})
        wanted = Wanted("arena_hard", str(tmp_path / "question.jsonl"), reference=str(tmp_path / "baseline.jsonl"))
        yield parse_config(RunConfig, tree, place="test"), wanted, seen


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_answers_and_games_are_in_the_suites_own_form(made):
    config, wanted, seen = made
    results = suites.evaluate(config, wanted)
    folder = suites.folder_of(RunDir(config.run_dir), "arena_hard", 0)
    answers = lines(folder / "model_answer.jsonl")
    assert [row["question_id"] for row in answers] == [f"q{n}" for n in range(5)]
    assert answers[0]["choices"][0]["turns"][0]["content"].startswith("other ")
    rows = lines(folder / "model_judgment.jsonl")
    # The baseline is A in the first game, B in the second: 32 words more are much better, 1 more is better.
    games = [[game["score"] for game in row["games"]] for row in rows]
    assert games == [["B>>A", "A>>B"], ["A>>B", "B>>A"], ["B>A", "A>B"], ["A>B", "B>A"], ["A=B", "A=B"]]
    assert all("justification" in game["judgment"] for row in rows[:SAME] for game in row["games"])
    assert sorted(pair for pair in seen if 8 in pair) == sorted(
        pair for count in LENGTHS.values() for pair in ((8, count), (count, 8))
    )
    told = score([(1.0, 1.0), (0.0, 0.0), (0.75, 0.75), (0.25, 0.25), (0.5, 0.5)])
    assert (results["win_rate"], results["low"], results["high"]) == (told.win_rate, told.low, told.high)
    assert (results["n_total"], results["without_verdict"], results["policy"]) == (5, 0, 0)
    console = PlainConsole(width=120)
    with console.capture() as shown:
        console.print(suite_table(suites.results_of(RunDir(config.run_dir))))
    assert "arena_hard" in shown.get()
    assert f"{told.win_rate:.2f}" in shown.get()
    assert "no number for its leaderboard" in shown.get()


def test_verdicts_are_paid_for_once_and_answers_drawn_once(made):
    config, wanted, seen = made
    first = suites.evaluate(config, wanted)
    before = len(seen)
    assert suites.evaluate(config, wanted) == first
    assert len(seen) == before


def test_the_real_questions_are_read(shared_data):
    path = shared_data / "prompts" / "arena_hard" / "question.jsonl.gz"
    items = read_items(Wanted("arena_hard", str(path)))
    rows = [row for row, _ in read_rows(str(path))]
    assert [item.name for item in items] == [row["question_id"] for row in rows]
    assert len(items) == 500
    assert items[0].instruction == rows[0]["turns"][0]["content"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": [{"content": "x"}]}, "expected a text in 'question_id'"),
        ({"question_id": "q", "turns": []}, "expected `turns` with one turn"),
        ({"question_id": "q", "turns": ["one", "two"]}, "have no second one"),
        ({"question_id": "q", "turns": [{"content": " "}]}, "expected `turns` with one turn"),
        ({"question_id": "q"}, "expected `turns` with one turn"),
    ],
)
def test_a_row_that_is_no_question_is_named(made, tmp_path, row, message):
    config, wanted, _ = made
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DnoError, match=rf"odd\.jsonl:1.*{message}"):
        suites.sample(config, Wanted(wanted.suite, str(path)))
    with pytest.raises(DnoError, match=r"odd\.jsonl:1"):
        suites.evaluate(config, Wanted(wanted.suite, wanted.prompts, reference=str(path)))


def test_another_suites_options_and_judges_are_refused(made):
    config, wanted, _ = made
    with pytest.raises(DnoError, match="--template and --tables are of --suite alpaca_eval"):
        suites.evaluate(config, Wanted(wanted.suite, wanted.prompts, wanted.reference, tables="t"))
    with pytest.raises(DnoError, match="5 rows have no output of the reference"):
        suites.evaluate(config, Wanted(wanted.suite, wanted.prompts))
    own = config.evaluation.annotation
    section = own.model_copy(update={"openai": own.openai.model_copy(update={"form": "listwise"})})
    other = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"annotation": section})})
    with pytest.raises(DnoError, match=r"evaluation\.annotation\.kind=openai, form=listwise: set .*form=pairwise"):
        suites.evaluate(other, wanted)
