"""Two real processes on this machine (gloo), through the launcher that people rehearse pods with."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from dno_jax.model import hf
from dno_jax.records import Judgement, ReferenceScore, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import stage_names
from dno_jax.training.checkpoint import policy_fingerprint
from tests.pairs import read_pairs
from tests.running import export
from tests.small import small_tree

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same configuration by one process and by two, to the end."""
    folder = tmp_path_factory.mktemp("processes")
    sampling = {"as_reference": True, "shard_prompts": 3}
    return folder, {count: launched(folder, count, sampling=sampling) for count in (1, 2)}


def launched(folder, count, *, sampling, **changes):
    """Run a small configuration to its end by so many processes; return its directory."""
    tree = small_tree(folder, run_dir=f"run{count}") | changes
    tree["sampling"] |= sampling
    path = folder / f"{count}.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [str(ROOT / "launch" / "local.sh"), str(count), str(path)],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "DNO": f"{Path(sys.executable).parent}/dno"},
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return RunDir(folder / f"run{count}")


def test_every_stage_is_whole_and_every_prompt_comes_once(runs):
    _, found = runs
    for run_dir in found.values():
        for t in range(2):
            for name in stage_names(run_dir.load_config(), t):
                assert run_dir.stage(name, t).require().rows > 0
            rollouts = list(run_dir.stage("sample", t).read(Rollout))
            assert len(rollouts) == len({row.rollout_id for row in rollouts}) == 6 * 5
            scores = [row.pair_id for row in run_dir.stage("score", t).read(ReferenceScore)]
            assert sorted(scores) == sorted({row.pair_id for row in read_pairs(run_dir.stage("pair", t))})
            assert len(list(run_dir.stage("annotate", t).read(Judgement))) == 6
            # Each process saw all audited responses, also those that the other's devices scored.
            assert run_dir.stage("sample", t).require().details["audit"]["error"] < 1e-5
            assert 0 < run_dir.stage("score", t).require().details["sampled"] < len(scores)
    # One shard for each of two processes, which sampled it on its own devices; alone, one process drew the same two.
    names = [found[count].stage("sample", 0).shard_names() for count in (1, 2)]
    assert names[0] == names[1] == ["0000000", "0000003"]


def test_the_first_iteration_equals_one_processs(runs):
    _, found = runs
    one, two = ({row.rollout_id: row for row in found[n].stage("sample", 0).read(Rollout)} for n in (1, 2))
    assert {name: row.token_ids for name, row in one.items()} == {name: row.token_ids for name, row in two.items()}
    pairs = [sorted(row.pair_id for row in read_pairs(found[n].stage("pair", 0))) for n in (1, 2)]
    assert pairs[0] == pairs[1]
    assert policy_fingerprint(found[1].policy(0)) == policy_fingerprint(found[2].policy(0))


def test_policies_agree_to_rounding(runs, tmp_path):

    _, found = runs
    loaded = []
    for count in (1, 2):
        config = found[count].load_config()
        export(config, policy=1, path=str(tmp_path / str(count)))
        loaded.append(hf.load(str(tmp_path / str(count)))[1])
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(loaded[0]), jax.tree.leaves_with_path(loaded[1]), strict=True
    ):
        # Six Adam steps at 1e-3: a gradient of rounding size can turn a step's sign,
        # so no element moves more than a step.
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def test_metrics_are_written_once(runs):
    _, found = runs
    for run_dir in found.values():
        places = [(row["iteration"], row["stage"], row["step"]) for row in run_dir.read_metrics()]
        assert len(places) == len(set(places)) > 0


def test_the_launcher_reports_a_failing_process(runs):
    folder, _ = runs
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "DNO": f"{Path(sys.executable).parent}/dno"}
    done = subprocess.run(
        [str(ROOT / "launch" / "local.sh"), "2", str(folder / "1.yaml"), "loss.beta=0.7"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "loss.beta" in done.stderr


def test_the_launcher_ends_where_the_directory_is_in_use(tmp_path):
    """Process 0 alone asks for it; the other must not wait for it."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_tree(tmp_path)))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "DNO": f"{Path(sys.executable).parent}/dno"}
    with RunDir(tmp_path / "run").held():
        done = subprocess.run(
            [str(ROOT / "launch" / "local.sh"), "2", str(path)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert f"in use by process {os.getpid()} on" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.soak
def test_a_model_that_lies_across_processes_draws_the_same(tmp_path):
    """Neither process could sample alone: each holds half of every head. All decisions must fall alike in both."""
    alone = launched(tmp_path, 1, sampling={}, iterations=1)
    across = launched(tmp_path, 2, sampling={}, iterations=1, mesh={"data": 1, "tensor": 2})
    texts = [
        {row.rollout_id: row.token_ids for row in run_dir.stage("sample", 0).read(Rollout)}
        for run_dir in (alone, across)
    ]
    assert texts[0] == texts[1]
    assert across.stage("sample", 0).require().details["audit"]["error"] < 1e-5
    judged = [list(run_dir.stage("annotate", 0).read(Judgement)) for run_dir in (alone, across)]
    assert judged[0] == judged[1]
