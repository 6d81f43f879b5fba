"""Which policies are kept, and that a pruned one is named where it is asked for."""

import json
import shutil

import numpy as np
import pytest

from dno_jax import iteration
from dno_jax.config import RunConfig, parse_config
from dno_jax.config.sections import GuardSection
from dno_jax.console import PlainConsole
from dno_jax.errors import DnoError
from dno_jax.parallel.sharding import TRAIN
from dno_jax.report.measured import matrix_table
from dno_jax.report.verify import verify
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import evaluate, pruning, redo
from dno_jax.training.checkpoint import is_pruned, policy_fingerprint, prune_policy
from tests.configured import deep_merge
from tests.small import small_tree

PROXIMAL = {"outer": {"scheme": "proximal", "every": 2}, "reference": {"kind": "initial"}}


def kept(config, t, *, best):
    run_dir = RunDir(config.run_dir)
    stage = run_dir.stage("evaluate", t)
    if not stage.manifest_path.exists():
        stage.finish(config, inputs={}, rows=1, seconds=0.1, details={"best": best})
    names = {path.name for path in pruning.needed_after(config, run_dir, t)}
    return sorted(name for name in names if int(name[:3]) <= t + 1)  # those that are there by then


@pytest.mark.parametrize(
    ("changes", "keep", "best", "expected"),
    [
        ({}, 1, 4, {0, 4}),
        ({}, 1, 2, {0, 2, 4}),
        ({}, 3, 4, {0, 2, 3, 4}),
        ({}, "all", 4, {0, 1, 2, 3, 4}),
        (PROXIMAL, 1, 3, {0, 3, 4}),  # iteration 4's reference moves to policy 4 itself
        (PROXIMAL | {"outer": {"scheme": "proximal", "every": 3}}, 1, 4, {0, 3, 4}),
        ({"outer": {"scheme": "average"}}, 1, 4, {0, 1, 2, 3, 4}),  # the mixture is of them all
    ],
)
def test_what_later_iterations_read_is_kept(make_config, changes, keep, best, expected):
    config = make_config(iterations=6, training={"keep_policies": keep}, prompts={"split": "shared"}, **changes)
    found = {int(name) for name in kept(config, 3, best=best)}
    assert found == expected


@pytest.mark.parametrize(("t", "names"), [(2, ["000", "002", "003"]), (3, ["000", "004"])])
def test_where_the_second_half_of_a_step_starts_is_kept(make_config, t, names):
    rated = {"rule": "all", "reward": "win_rate", "opponents": "policy", "replay": 0.0}
    config = make_config(
        iterations=6, outer={"scheme": "extragradient"}, training={"keep_policies": 1}, prompts={"split": "shared"},
        pairing=rated,
    )  # fmt: skip
    assert kept(config, t, best=t + 1) == names


@pytest.fixture(scope="module")
def pruned(small_folder, tmp_path_factory):
    """A run that keeps one policy beside those that it needs, to its end."""
    changes = {"run_dir": str(tmp_path_factory.mktemp("pruned") / "run"), "iterations": 3,
               "training": {"keep_policies": 1}, "optimizer": {"carry": True}}  # fmt: skip
    tree = deep_merge(small_tree(small_folder), changes)
    config = parse_config(RunConfig, tree, place="test")
    return config, RunDir(config.run_dir), iteration.run(config)


def test_a_run_prunes_goes_on_and_returns_a_policy(pruned):
    config, run_dir, result = pruned
    assert iteration.run(config) == result  # nothing is left to do, and what is gone is not missed
    there = {t for t in range(4) if not is_pruned(run_dir.policy(t))}
    assert {0, 3, result.best} <= there
    assert len(there) < 4
    assert all(policy_fingerprint(run_dir.policy(t)) for t in range(4))
    assert (run_dir.policy(3) / "moments").exists()
    assert not any((run_dir.policy(t) / "moments").exists() for t in set(range(4)) - there)
    assert verify(run_dir, config).faults == []


def test_a_pruned_policy_is_named_where_it_is_asked_for(pruned):
    config, run_dir, _ = pruned
    gone = next(t for t in range(4) if is_pruned(run_dir.policy(t)))
    with pytest.raises(DnoError, match=rf"policies/00{gone}: .*training\.keep_policies.*--from train:{gone - 1}"):
        Runtime.start(config).load_policy(run_dir.policy(gone), TRAIN)


def test_a_guard_given_later_asks_whom_it_can(pruned, tmp_path, capsys):
    """Who was pruned before there was a guard is named; the evaluation itself, whose responses are there, goes on."""
    before, _, _ = pruned
    questions = [{"question": f"des dot {word}", "answer": word} for word in ("bas", "des", "dot")]
    (tmp_path / "guard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    shutil.copytree(before.run_dir, tmp_path / "run")
    section = before.evaluation.model_copy(update={"guard": GuardSection(path=str(tmp_path / "guard.jsonl"))})
    config = before.model_copy(update={"run_dir": str(tmp_path / "run"), "evaluation": section})
    run_dir = RunDir(config.run_dir)
    gone = next(t for t in range(1, 4) if is_pruned(run_dir.policy(t)))
    redo.set_aside(run_dir, "evaluate", 0)
    capsys.readouterr()
    runtime = Runtime.start(config)
    own = evaluate.run(runtime, gone - 1)
    said = capsys.readouterr().err
    assert "guard" not in own.details
    assert own.details["win_rates"]
    assert f"policies/00{gone}: policy {gone} is not asked the guard's questions, as its weights are not there" in said
    assert "this evaluation has no figures of the guard. To have it asked, restore it from a copy, or train it" in said
    assert f"dno run CONFIG --from train:{gone - 1}" in said
    figures = evaluate.run(runtime, 2).details
    guard = figures["guard"]
    assert gone in guard["not_asked"]
    assert str(gone) not in guard["accuracy"]
    assert {"0", "3"} <= set(guard["accuracy"])
    console = PlainConsole(width=200)
    with console.capture() as shown:
        console.print(matrix_table(figures))
    assert "not asked, their weights being gone: " in shown.get()

    # Answers that were cut short by the pruning are no whole answers, and are not gone on with.
    prune_policy(run_dir.policy(3))
    redo.set_aside(run_dir, "evaluate", 2)
    folder = next(run_dir.stage("evaluate", 2).path.glob("guard-003-*"))
    next(folder.glob("*.jsonl")).unlink()
    assert "guard" not in evaluate.run(runtime, 2).details


def test_where_the_best_was_pruned_the_best_of_the_kept_is_returned(make_config, capsys):
    config = make_config()
    run_dir = RunDir(config.run_dir)
    wins = np.array([[0.5, 0.4, 0.4, 0.3], [0.6, 0.5, 0.7, 0.9], [0.6, 0.3, 0.5, 0.6], [0.7, 0.1, 0.4, 0.5]])
    details = {"best": 1, "matrix": wins.tolist()}
    run_dir.stage("evaluate", 2).finish(config, inputs={}, rows=1, seconds=0.1, details=details)
    assert pruning.best_kept(run_dir, 2) == 1
    run_dir.policy(1).mkdir(parents=True)
    pruning.prune_policy(run_dir.policy(1))
    assert pruning.best_kept(run_dir, 2) == 2
    assert "policy 1 is best" in capsys.readouterr().err
