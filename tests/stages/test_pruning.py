"""Which policies are kept, and that a pruned one is named where it is asked for."""

import numpy as np
import pytest

from dno_jax import iteration
from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.parallel.sharding import TRAIN
from dno_jax.report.verify import verify
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import pruning
from dno_jax.training.checkpoint import is_pruned, policy_fingerprint
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
