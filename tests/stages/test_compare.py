"""Runs side by side: made of manifests and held-out responses alone, without a model."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest

from dno_jax.cli import main as cli
from dno_jax.config import RunConfig, parse_config
from dno_jax.console import PlainConsole
from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.records import Rollout
from dno_jax.report.measured import comparison_tables, last_matrix
from dno_jax.run_dir import RunDir
from dno_jax.stages import compare
from dno_jax.stages.evaluate import _figures, _Judged, rollouts_of
from dno_jax.stages.held_out import Asked, Players
from dno_jax.stages.held_out import compare as judged_groups
from tests.configured import deep_merge
from tests.stages.test_answers import TREE

WORDS = {"brief": "something about a colour such as blue", "long": "blue and then " + "some more words " * 30}


def rollout(policy, number, text):
    return Rollout(
        rollout_id=f"{policy:03d}/p{number}/0", prompt_id=f"p{number}", sample=0, source="policy", policy=policy,
        text=text, token_ids=(1, 2), prompt_token_ids=(1,), logprob=-1.0, finish="stop",
    )  # fmt: skip


def make_run(folder, name, text, *, prompts=60, first=0, done=1, **changes):
    """A run of 2 iterations of which `done` are evaluated; its policies answer with the text, its first one briefly."""
    lines = [{"prompt_id": f"p{n}", "prompt": f"Say something about colour {n}"} for n in range(first, first + prompts)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": f"Train {n}"}) + "\n" for n in range(4)))
    tree = deep_merge(TREE, {
        "run_dir": str(folder / "runs" / name), "iterations": 2,
        "prompts": {"path": str(folder / "train.jsonl"), "held_out_path": str(folder / f"{name}.jsonl")},
    })  # fmt: skip
    config = parse_config(RunConfig, deep_merge(tree, changes), place="test")
    run_dir = RunDir(config.run_dir)
    run_dir.create(config)
    loaded = compare.split_prompts(config).held_out
    for t in range(done):
        stage = run_dir.stage("evaluate", t)
        groups = [Players(p, 0, {str(k): f"red {k}" if not k else text for k in range(t + 2)}) for p in loaded]
        for policy in range(t + 2):
            rows = [rollout(policy, p.prompt_id[1:], "red 0" if not policy else text) for p in loaded]
            if not rollouts_of(run_dir, policy, 0, 1).shard_paths():
                rollouts_of(run_dir, policy, 0, 1).write_shard("0000000", rows)
        found = judged_groups(groups, Asked(config.evaluation_judge, "annotation", "here", "judge", 0), run_dir)
        details = _figures(_Judged(found, dropped=Counter(), lengths={}), config, newest=t + 1)
        stage.finish(config, inputs={}, rows=len(found.rows), seconds=1.0, details=details)
    return run_dir


@pytest.fixture
def runs(tmp_path):
    one = make_run(tmp_path, "one", WORDS["brief"])
    other = make_run(tmp_path, "other", WORDS["long"], loss={"beta": 0.3}, seed=5)
    return one, other


def shown(found):
    console = PlainConsole(width=100)
    with console.capture() as captured:
        for table in comparison_tables(found.as_dict()):
            console.print(table)
    return captured.get()


def test_differences_and_figures_stand_side_by_side(runs):
    found = compare.run([str(run.path) for run in runs])
    beta = runs[0].load_config().loss.beta
    assert found.differences["loss.beta"] == {"one": beta, "other": 0.3}
    assert found.differences["seed"] == {"one": 0, "other": 5}
    assert set(found.differences) == {"loss.beta", "seed", "prompts.held_out_path"}
    text = shown(found)
    assert "loss.beta" in text
    assert "half-finished: 1 of 2 iterations are evaluated" in text
    rates = found.runs[0].iterations[0]["win_rates"]["0"]
    assert f"{100 * rates['rate']:.0f} [{100 * rates['low']:.0f}, {100 * rates['high']:.0f}]" in text
    assert found.judged is None
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["runs"][0]["name"] == "one"


def test_held_out_responses_are_judged_against_each_other_when_asked(runs, tmp_path):
    judge = parse_config(RunConfig, TREE | {"run_dir": str(tmp_path / "judged")}, place="test")
    found = compare.run([str(run.path) for run in runs], judge)
    assert found.judged["policies"] == {"one": found.runs[0].best, "other": found.runs[1].best}
    assert found.judged["prompts"] == 60
    rates = found.judged["comparison"]["rates"]
    assert rates[0][1] + rates[1][0] == pytest.approx(1.0)
    assert rates[0][1] != 0.5
    text = shown(found)
    assert "judged against each other by" in text
    assert "of the row over the column" in text
    assert not (tmp_path / "runs" / "one" / "suites").exists()


def test_different_judges_are_said_and_not_averaged(tmp_path):
    one = make_run(tmp_path, "one", WORDS["brief"])
    other = make_run(tmp_path, "other", WORDS["brief"], annotation={"oracle": {"target_words": 5}})
    found = compare.run([str(one.path), str(other.path)])
    assert any(note.startswith("different judges: ") and "not averaged" in note for note in found.notes)
    assert found.runs[0].judge != found.runs[1].judge


def test_different_held_out_prompts_are_said(tmp_path):
    one = make_run(tmp_path, "one", WORDS["brief"])
    other = make_run(tmp_path, "other", WORDS["brief"], first=40)
    found = compare.run([str(one.path), str(other.path)])
    assert any("different held-out prompts (one 60, other 60; 20 in common)" in note for note in found.notes)
    apart = make_run(tmp_path, "apart", WORDS["brief"], first=200)
    judge = parse_config(RunConfig, TREE | {"run_dir": str(tmp_path / "judged")}, place="test")
    with pytest.raises(DnoError, match="no held-out prompt in common"):
        compare.run([str(one.path), str(apart.path)], judge)


def test_held_out_prompts_that_another_run_was_trained_on_are_said(runs):
    prompts = compare.split_prompts(runs[0].load_config()).held_out[:3]
    write_atomically(runs[1].prompts_path(0), "".join(prompt.model_dump_json() + "\n" for prompt in prompts))
    found = compare.run([str(run.path) for run in runs])
    assert any(
        note.startswith("3 of one's held-out prompts are among those other was trained on") for note in found.notes
    )


def test_runs_that_cannot_be_compared(runs, tmp_path):
    one = str(runs[0].path)
    (tmp_path / "link").symlink_to(one)
    for same in (one, f"{one}/", str(tmp_path / "link")):
        with pytest.raises(DnoError, match=f"{same} and {one} are one run directory"):
            compare.run([one, same])
    with pytest.raises(DnoError, match="two or more run directories, got"):
        compare.run([one])
    with pytest.raises(DnoError, match="no run directory"):
        compare.run([one, str(tmp_path)])
    fresh = make_run(tmp_path, "fresh", "x", done=0)
    found = compare.run([one, str(fresh.path)])
    assert any("fresh: half-finished: 0 of 2" in note for note in found.notes)
    assert "one 1" in shown(found)
    judge = parse_config(RunConfig, TREE | {"run_dir": str(tmp_path / "judged")}, place="test")
    with pytest.raises(DnoError, match="fresh: nothing is evaluated there yet"):
        compare.run([one, str(fresh.path)], judge)


def test_directories_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [str(make_run(tmp_path / folder, "run", "blue").path) for folder in ("a", "b")]
    assert [run.name for run in compare.run(paths).runs] == ["a/runs/run", "b/runs/run"]


def test_the_command_prints_tables_or_json(runs, monkeypatch, capsys):
    def dno(*arguments):
        monkeypatch.setattr(sys, "argv", ["dno", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    status, out, err = dno(runs[0].path, runs[1].path)
    assert (status, err) == (0, "")
    assert "what the configurations differ in" in out
    status, out, _ = dno(runs[0].path, runs[1].path, "--json")
    assert status == 0
    assert json.loads(out)["differences"]["loss.beta"]["other"] == 0.3
    status, _, err = dno(runs[0].path)
    assert status == 2
    assert "two or more" in err


def test_the_last_matrix_of_a_run_is_a_table(runs):
    console = PlainConsole(width=100)
    with console.capture() as captured:
        console.print(last_matrix(runs[0], iterations=2))
    assert "of the row over the column" in captured.get()
    assert "Nash mixture of the policies" in captured.get()
