"""`dno status --verify`: a whole directory, and from where to redo what is not as it was written."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from dno_jax.cli.main import app
from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.files import digest_of, write_atomically
from dno_jax.records import ReferenceScore
from dno_jax.report import verify
from dno_jax.run_dir import RunDir
from dno_jax.training.checkpoint import save_policy
from tests.damage import cut, damage_weights, empty, flip, remove


def config(root):
    tree = {"run_dir": str(root), "model": {"path": "m"}, "prompts": {"path": "p"}, "annotation": {"kind": "openai"}}
    return parse_config(RunConfig, tree | {"iterations": 2}, place="test")


def policy(run_dir, index):
    made = {"w": jax.random.normal(jax.random.key(index), (64, 64)), "b": jnp.zeros(4)}
    return save_policy(run_dir.policy(index), made)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory as one iteration leaves it, with a second one begun."""
    root = tmp_path_factory.mktemp("verify") / "run"
    run_dir, made_by = RunDir(root), config(root)
    run_dir.create(made_by)
    policies = [policy(run_dir, index) for index in range(2)]
    write_atomically(run_dir.prompts_path(0), '{"prompt_id": "a"}\n')
    inputs = run_dir.stage("sample", 0).input_digest(run_dir.prompts_path(0)) | {"policies/000": policies[0]}
    for name in ("sample", "annotate", "pair", "score", "train"):
        stage = run_dir.stage(name, 0)
        if name != "train":
            rows = [ReferenceScore(pair_id=name, chosen_logprob=-1.0, rejected_logprob=-2.0)] * 9
            stage.write_shard("0000000", rows)
            stage.write_shard("0000008", rows)
        stage.finish(made_by, inputs=inputs, rows=18, seconds=0.1, details={"fingerprint": policies[1]})
        inputs = stage.input_digest(stage.manifest_path)
    run_dir.stage("sample", 1).start(made_by)
    run_dir.stage("sample", 1).write_shard("0000000", rows)
    (run_dir.export_path).mkdir()
    (run_dir.export_path / "model.safetensors").write_bytes(b"weights" * 99)
    files = {"model.safetensors": digest_of(run_dir.export_path / "model.safetensors")}
    write_atomically(run_dir.exported_path, json.dumps({"policy": 1, "fingerprint": policies[1], "files": files}))
    run_dir.append_metrics({"iteration": 0, "stage": "train", "step": 0, "loss": 0.7})
    return run_dir


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def test_a_whole_directory_has_no_fault_and_its_bytes_are_read_once(whole):
    found = verify.verify(whole, config(whole.path))
    assert found.faults == []
    sizes = [
        path.stat().length for name in ("000", "001") for path in verify._files_below(whole.path / "policies" / name)
    ]
    assert sum(sizes) < found.nbytes < sum(sizes) + 20_000


@pytest.mark.parametrize(
    ("damage", "place", "redo"),
    [
        (flip, "iterations/000/rollouts/0000008.jsonl", "sample:0"),
        (remove, "iterations/000/judgements/0000000.jsonl", "annotate:0"),
        (cut, "iterations/000/pairs/0000000.jsonl", "pair:0"),
        (empty, "iterations/000/reference/MANIFEST.json", "score:0"),
        (lambda path: path.write_text(path.read_text().replace('"rows": 18', '"rows": 17')),
         "iterations/000/train/MANIFEST.json", "train:0"),
        (empty, "iterations/000/reference/STARTED.json", "score:0"),
        (flip, "iterations/000/prompts.jsonl", "sample:0"),
        (lambda path: damage_weights(path, flip), "policies/001", "train:0"),
        (lambda path: damage_weights(path, remove), "policies/001", "train:0"),
        (lambda path: remove(path / "FINGERPRINT"), "policies/001", "train:0"),
        (lambda path: damage_weights(path, flip), "policies/000", None),
        (lambda path: path.write_text('{"a": 1}\n{"b\n{"c": 2}\n'), "metrics.jsonl", None),
        (lambda path: path.write_text("{"), "policies/SOURCE.json", None),
        (flip, "export/model.safetensors", None),
        (remove, "export/model.safetensors", None),
        (shutil.rmtree, "export", None),
        (shutil.rmtree, "policies/001", "train:0"),
        (shutil.rmtree, "policies/000", None),
        (remove, "iterations/000/pairs/MANIFEST.json", "pair:0"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + b"x" * 500), "annotations.sqlite", None),
        (lambda path: path.write_text('{"a"\n{"b": 1}\n'), "iterations/001/rollouts/0000000.jsonl", None),
    ],
)  # fmt: skip
def test_each_damage_is_named_with_the_stage_to_redo(copy, damage, place, redo):
    damage(copy.path / place)
    found = verify.verify(copy, config(copy.path))
    assert [fault.place for fault in found.faults].count(place) == 1 or any(place in one.text for one in found.faults)
    assert found.redo == redo


def test_a_directory_may_be_named_from_where_one_stands(whole, monkeypatch):
    monkeypatch.chdir(whole.path.parent)
    assert verify.verify(RunDir(whole.path.name), config(whole.path)).faults == []


def test_the_command_says_the_first_stage_and_fails(copy, monkeypatch):
    runner = CliRunner()
    flip(copy.path / "iterations/000/reference/0000000.jsonl")
    damage_weights(copy.path / "policies" / "001", flip)
    with pytest.raises(DnoError, match=r"2 faults found; .*--from score:0"):
        runner.invoke(app, ["status", str(copy.path), "--verify"], catch_exceptions=False)


def test_a_policy_of_another_training_is_noticed(copy):
    policy(copy, 1)
    shutil.rmtree(copy.policy(1))
    save_policy(copy.policy(1), {"w": jnp.ones((64, 64)), "b": jnp.zeros(4)})
    found = verify.verify(copy, config(copy.path))
    assert [fault.place for fault in found.faults] == ["policies/001"]
