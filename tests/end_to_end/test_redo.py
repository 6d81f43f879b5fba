"""A run goes on in the same directory with what may change, and is redone from a stage where results would."""

import json
import shutil

import numpy as np
import pytest

from dno_jax import iteration
from dno_jax.annotation.embedded import OracleAnnotator
from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.run_dir import RunDir
from dno_jax.runtime import sampler
from dno_jax.stages import train
from dno_jax.training.checkpoint import policy_fingerprint
from tests.configured import deep_merge
from tests.small import small_tree

SHARED = {"prompts": {"split": "shared"}, "training": {"batch_size": 16, "save_every": 1}}


class OutOfMemory(Exception):
    """As a device raises it, in the middle of training."""


def fail_at(monkeypatch, call):
    """Let the call-th optimiser step fail; return the list of steps taken since."""
    real, steps = train.train_step, []

    def step(*args, **kwargs):
        if len(steps) == call:
            raise OutOfMemory("RESOURCE_EXHAUSTED: out of memory")
        steps.append(int(args[0].step))
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", step)
    return steps


def watch(monkeypatch):
    """Return lists of what is drawn, (policy, first sample, number of samples, prompts), and of what is judged."""
    drawn, judged = [], []
    generate, judge = sampler.generate, OracleAnnotator.judge

    def watched_generate(params, requests, programs, *, iteration, **kwargs):
        requests = list(requests)
        params_of = programs.sampling_params
        drawn.append((iteration, params_of.first_sample, params_of.num_samples, len(requests)))
        return generate(params, requests, programs, iteration=iteration, **kwargs)

    async def watched_judge(self, pool, **kwargs):
        judged.append(pool.candidate_ids)
        return await judge(self, pool, **kwargs)

    monkeypatch.setattr(sampler, "generate", watched_generate)
    monkeypatch.setattr(OracleAnnotator, "judge", watched_judge)
    return drawn, judged


def files(run_dir, *stages):
    """The bytes of what these stages of iterations 0 and 1 wrote."""
    folders = [run_dir.stage(name, t).path for t in run_dir.begun()[:2] for name in stages]
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.iterdir()) if path.is_file()}


def losses(run_dir):
    rows = [row for row in run_dir.read_metrics() if row["stage"] == "train"]
    return {(row["iteration"], row["step"]): row["loss"] for row in rows}


@pytest.fixture(scope="module")
def straight(small_folder, tmp_path_factory):
    """A run of two iterations that nothing interrupted."""
    changes = {**SHARED, "run_dir": str(tmp_path_factory.mktemp("straight") / "run"), "evaluation": {"num_samples": 1}}
    config = parse_config(RunConfig, deep_merge(small_tree(small_folder), changes), place="test")
    iteration.run(config)
    return RunDir(config.run_dir)


@pytest.mark.soak
def test_out_of_memory_is_cured_in_the_same_directory(make_config, straight, monkeypatch):
    config = make_config(**SHARED, evaluation={"num_samples": 1})
    run_dir, steps_a_training = RunDir(config.run_dir), len([key for key in losses(straight) if key[0] == 0])
    with monkeypatch.context() as patch:
        fail_at(patch, steps_a_training + 2)  # the third step of iteration 1
        with pytest.raises(OutOfMemory):
            iteration.run(config)
    before = files(run_dir, "sample", "annotate", "pair", "score")
    assert run_dir.stage("train", 1).manifest() is None

    cured = make_config(
        **SHARED | {"training": {"batch_size": 16, "micro_batch_size": 8, "save_every": 1}},
        iterations=3,
        evaluation={"num_samples": 2},
    )
    drawn, judged = watch(monkeypatch)
    steps = fail_at(monkeypatch, None)
    iteration.run(cured)
    assert files(run_dir, "sample", "annotate", "pair", "score") == before
    held_out = 4
    # Of finished iterations only the second held-out sample is drawn; of the new policies both, in one pass each.
    assert [call for call in drawn if call[0] == 0] == [(0, 1, 1, held_out)]
    assert [call for call in drawn if call[0] == 1] == [(1, 1, 1, held_out)]
    assert (2, 0, 2, held_out) in drawn
    assert steps[:1] == [2]  # training went on from its last state
    trained = {candidate.split("/")[0] for pool in judged for candidate in pool if candidate.count("/") == 2}
    assert trained == {"002"}  # no pool of iterations 0 and 1 was judged again
    found, expected = losses(run_dir), losses(straight)
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), atol=1e-5)
    for t in range(3):
        assert run_dir.stage("evaluate", t).require().rows > 0
    aside = run_dir.aside_path / "0" / "iterations" / "000" / "evaluation" / "MANIFEST.json"
    assert json.loads(aside.read_text())["stage"] == "evaluate"  # the earlier figures


@pytest.mark.soak
def test_costs_change_nothing_bit_for_bit(make_config, straight, monkeypatch):
    config = make_config(**SHARED, evaluation={"num_samples": 1})
    with monkeypatch.context() as patch:
        fail_at(patch, 2)
        with pytest.raises(OutOfMemory):
            iteration.run(config)
    other = make_config(
        **SHARED | {"training": {"batch_size": 16, "save_every": 3}},
        evaluation={"num_samples": 1},
        annotation={"store": str(RunDir(config.run_dir).path / "own.sqlite"), "max_failed": 0.5},
    )
    iteration.run(other)
    run_dir = RunDir(config.run_dir)
    assert losses(run_dir) == losses(straight)
    for policy in range(3):
        assert policy_fingerprint(run_dir.policy(policy)) == policy_fingerprint(straight.policy(policy))


@pytest.mark.soak
def test_another_learning_rate_trains_anew_from_the_stored_verdicts(make_config, monkeypatch, capsys):
    config = make_config(**SHARED)
    iteration.run(config)
    run_dir = RunDir(config.run_dir)
    before = files(run_dir, "sample", "annotate", "pair", "score")
    policies = [policy_fingerprint(run_dir.policy(policy)) for policy in range(3)]
    other = make_config(**SHARED, optimizer={"learning_rate": 3e-3})
    with pytest.raises(DnoError, match=r"(?s)optimizer\.learning_rate: 0\.001 -> 0\.003\n.*--from train:0"):
        iteration.run(other)
    drawn, judged = watch(monkeypatch)
    iteration.run(other, redo_from="train")
    said = " ".join(capsys.readouterr().err.split())
    assert "redone from train of iteration 0: train, evaluate of it, every later iteration and policy; " in said
    now = files(run_dir, "sample", "annotate", "pair", "score")
    first = {path: text for path, text in before.items() if "/000/" in str(path)}
    assert {path: now[path] for path in first} == first  # iteration 0's samples and verdicts
    assert not [call for call in drawn if call[:2] == (0, 0) and call[3] > 4]
    aside = RunDir(run_dir.aside_path / "0")
    assert [policy_fingerprint(aside.policy(policy)) for policy in (1, 2)] == policies[1:]
    assert policy_fingerprint(run_dir.policy(1)) != policies[1]
    assert aside.stage("train", 0).require().details["fingerprint"] == policies[1]
    assert "learning_rate: 0.001" in (run_dir.aside_path / "0" / "config.yaml").read_text()
    assert judged


@pytest.mark.soak
def test_iterations_may_grow_where_they_share_their_prompts_alone(make_config):
    config = make_config(iterations=1)
    iteration.run(config)
    with pytest.raises(DnoError, match=r"iterations: 1 -> 2: with prompts\.split=disjoint each iteration has its own"):
        iteration.run(make_config(iterations=2))
    with pytest.raises(DnoError, match=r"prompts\.split: 'disjoint' -> 'shared'"):
        iteration.run(make_config(iterations=1, prompts={"split": "shared"}))


def test_a_place_that_there_is_not_is_named(make_config):
    config = make_config()
    with pytest.raises(DnoError, match=r"--from is 'trian'; iteration 0 has the stages sample, annotate, pair, score"):
        iteration.run(config, redo_from="trian")
    with pytest.raises(DnoError, match=r"--from is 'train:2'; the configuration has iterations 0 to 1"):
        iteration.run(config, redo_from="train:2")


def test_contents_are_identity_and_paths_are_not(make_config, tmp_path):
    """The directory, the checkpoint and the prompts may lie elsewhere: on another mount, in another checkout."""
    config = make_config(iterations=1)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 1)
        with pytest.raises(OutOfMemory):
            iteration.run(config)
    moved = tmp_path / "elsewhere"
    shutil.copytree(config.run_dir, moved / "run")
    shutil.copytree(config.model.path, moved / "checkpoint")
    shutil.copy(config.prompts.path, moved / "prompts.jsonl")
    shutil.copy(config.prompts.held_out_path, moved / "held_out.jsonl")
    there = make_config(
        iterations=1,
        run_dir=str(moved / "run"),
        model={"path": str(moved / "checkpoint")},
        prompts={"path": str(moved / "prompts.jsonl"), "held_out_path": str(moved / "held_out.jsonl")},
    )
    before = files(RunDir(config.run_dir), "sample", "annotate", "pair", "score")
    iteration.run(there)
    after = files(RunDir(there.run_dir), "sample", "annotate", "pair", "score")
    assert list(after.values()) == list(before.values())

    weights = moved / "checkpoint" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 0x40
    weights.write_bytes(changed)
    with pytest.raises(DnoError, match=r"not the checkpoint that policy 0 of .* was imported from"):
        iteration.run(there)
