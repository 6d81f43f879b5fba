"""One held-out prompt answered by policy 0 beside the best: chosen by the evaluation, shown in terminal and card."""

from __future__ import annotations

import io

import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.console import PlainConsole
from dno_jax.model.hf.card import ExportFacts, model_card
from dno_jax.records import Message, Prompt
from dno_jax.report.answers import ShownAnswers, answers_text, shown_answers
from dno_jax.run_dir import RunDir
from dno_jax.stages.evaluate import _figures, _judge, _shown
from dno_jax.stages.held_out import Players

TREE = {"run_dir": "r", "model": {"path": "m"}, "prompts": {"path": "p"}, "pairing": {"reward": "win_rate",
        "positive_floor": 0.5, "margin": 0.2, "student_margin": 0.2}}  # fmt: skip


def players(prompt_id, *texts, sample=0, question="Why?", prefix=""):
    messages = (Message(role="system", content="Be brief."), Message(role="user", content=question))
    prompt = Prompt(prompt_id=prompt_id, messages=messages, assistant_prefix=prefix)
    return Players(prompt, sample, {str(policy): text for policy, text in enumerate(texts)})


def test_the_first_prompt_whose_answers_differ_is_shown():
    same, other, later = players("a", "x", "x", "x"), players("b", "x", "y", "z"), players("c", "x", "y", "y")
    assert _shown([same, other, later], newest=2)["prompt_id"] == "b"
    assert _shown([same], newest=2)["answers"] == {"0": "x", "1": "x", "2": "x"}
    assert _shown([players("d", "x", "y", sample=1)], newest=1) is None
    assert _shown([], newest=1) is None
    long = _shown([players("e", "x" * 9000, "y", question="q" * 9000, prefix="Well: ")], newest=1)
    assert len(long["answers"]["0"]) < 2010
    assert len(long["messages"][1]["content"]) < 2010
    assert long["answers"]["1"] == "Well: y"


@pytest.fixture
def run_dir(tmp_path):
    config = parse_config(RunConfig, TREE | {"run_dir": str(tmp_path / "run")}, place="test")
    directory = RunDir(config.run_dir)
    for iteration in range(2):
        shown = _shown(
            [players("p", *(f"answer of {policy}" for policy in range(iteration + 2)))], newest=iteration + 1
        )
        stage = directory.stage("evaluate", iteration)
        stage.finish(config, inputs={}, rows=1, seconds=0.0, details={"win_rates": {}, "best": 1, "shown": shown})
    return directory


@pytest.mark.parametrize(
    ("policy", "answers"),
    [(2, ((0, "answer of 0"), (2, "answer of 2"))), (1, ((0, "answer of 0"), (1, "answer of 1"))),
     (0, ((0, "answer of 0"),)), (3, None)],
)  # fmt: skip
def test_the_last_evaluation_says_how_any_policy_answered(run_dir, policy, answers):
    found = shown_answers(run_dir, iterations=2, policy=policy)
    assert (found and found.answers) == answers
    if found:
        assert found.messages == (("system", "Be brief."), ("user", "Why?"))


def test_a_run_without_an_evaluation_shows_nothing(tmp_path):
    assert shown_answers(RunDir(str(tmp_path)), iterations=3, policy=0) is None


HOSTILE = "\x1b[2J[bold]gone[/bold]\r\n```\n# Not a heading\n````\n\u202etxt"


def test_the_terminal_shows_words_that_do_not_act():
    out = io.StringIO()
    PlainConsole(file=out, width=80, force_terminal=True, color_system=None).print(
        answers_text(ShownAnswers((("user", "Why?"),), ((0, HOSTILE), (3, "Because."))))
    )
    said = out.getvalue()
    assert "user: Why?" in said
    assert "policy 3: Because." in said
    assert "\\x1b[2J[bold]gone[/bold]" in said
    assert "\x1b[2J" not in said
    assert "\u202e" not in said


def test_the_card_encloses_them_so_that_nothing_closes_the_block(tmp_path):
    facts = ExportFacts(
        method="DNO",
        loss="dno",
        messages=(("user", "Why?"),),
        answers=(("policy 0", HOSTILE), ("policy 3", "Because.")),
    )
    card = model_card(tmp_path, facts=facts)
    assert "## A held-out prompt, and the first answers to it" in card
    assert "`policy 3`:\n\n```text\nBecause.\n```" in card
    block = card.split("`policy 0`:\n\n")[1].split("\n\n`policy 3`")[0]
    assert block.startswith("`````text\n\\x1b[2J[bold]gone")
    assert block.endswith("\\u202etxt\n`````")
    assert "\x1b" not in card
    assert "held-out prompt" not in model_card(tmp_path, facts=ExportFacts(method="DNO", loss="dno"))


@pytest.mark.parametrize("kind", ["self", "given", "gold"])
def test_where_nothing_is_held_out_nobody_is_asked_to_judge(kind, tmp_path):
    """Not even built: a policy that judges itself is no annotator of the host's."""
    tree = TREE | {"run_dir": str(tmp_path / "run"), "annotation": {"kind": kind}}
    tree["pairing"] = {
        "rule": "best_worst",
        "reward": "score" if kind in ("self", "given") else "win_rate",
        "margin": 0.5,
    }
    config = parse_config(RunConfig, tree, place="test")
    run_dir = RunDir(config.run_dir)
    judged = _judge(config, run_dir, [], stage=run_dir.stage("evaluate", 0), newest=1)
    assert judged.compared.rows == []
    assert _figures(judged, config, newest=1)["why"] == "the newest: no held-out prompts"
