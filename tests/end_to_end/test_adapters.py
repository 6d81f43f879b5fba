"""Runs that train adapters: in bfloat16 over two iterations, killed and resumed, from PEFT's folder, in all schemes."""

import json
import math
import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from dno_jax import iteration
from dno_jax.config import MeshSection, RunConfig, SftConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.hf import peft
from dno_jax.model.params import abstract_adapters
from dno_jax.parallel.sharding import TRAIN
from dno_jax.report.verify import verify
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import exports, sft, train
from dno_jax.training.checkpoint import fingerprint, policy_fingerprint, save_policy
from tests.configured import deep_merge
from tests.running import prepare, run_stage
from tests.small import small_tree

ADAPTER = {"rank": 4, "alpha": 8.0}
TREE = {
    "model": {"dtype": "bfloat16"},
    "adapter": ADAPTER,
    "prompts": {"held_out_path": None},
    "sampling": {"audit_prompts": 2},
    "optimizer": {"learning_rate": 2e-3},
    "training": {"save_every": 1, "num_epochs": 4},
}


def configured(folder, run_dir, **changes):
    tree = deep_merge(deep_merge(small_tree(folder), TREE), {"run_dir": str(run_dir), **changes})
    return parse_config(RunConfig, tree, place="test")


@pytest.fixture(scope="module")
def finished(small_folder, tmp_path_factory):
    """A finished run of two iterations in bfloat16; tests that change it take a copy."""
    config = configured(small_folder, tmp_path_factory.mktemp("adapters") / "run")
    iteration.run(config)
    return config, RunDir(config.run_dir)


def num_stored(folder):
    """Numbers of a checkpoint's arrays; its bytes on disk depend on how often the store rewrote its index meanwhile."""
    with closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(epath.Path(folder)).tree
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def losses(run_dir, t):
    return [row["loss"] for row in run_dir.read_metrics() if (row["stage"], row["iteration"]) == ("train", t)]


def test_policies_are_adapters_beside_policy_0(finished):
    config, run_dir = finished
    base = policy_fingerprint(run_dir.policy(0))
    assert not (run_dir.policy(0) / "ADAPTER.json").exists()
    for t in (1, 2):
        note = json.loads((run_dir.policy(t) / "ADAPTER.json").read_text())
        assert note == {
            "base": "000", "fingerprint": base, **ADAPTER, "targets": ["q", "k", "v", "o", "gate", "up", "down"],
        }  # fmt: skip
        assert num_stored(run_dir.policy(t) / "params") < 0.5 * num_stored(run_dir.policy(0) / "params")
    assert len({policy_fingerprint(run_dir.policy(t)) for t in range(3)}) == 3
    # Of both iterations: the guard of the first step and the audit have passed, in bfloat16.
    for t in range(2):
        assert losses(run_dir, t)[0] == pytest.approx(math.log(2), abs=1e-3)
        assert min(losses(run_dir, t)) < 0.6
        audit = run_dir.stage("sample", t).require().details["audit"]
        assert 0 < audit["error"] < audit["bound"]
    # The adapter of policy 2 began as that of policy 1.
    runtime = Runtime.start(config)
    first, second = (runtime.load_trained(run_dir.policy(t))[0]["layers"]["q_b"] for t in (1, 2))
    fresh = runtime.load_trained(run_dir.policy(0))[0]["layers"]["q_b"]
    assert 0 < np.abs(first - second).max() < np.abs(fresh).max()
    assert np.corrcoef(np.ravel(fresh), np.ravel(second))[0, 1] > 0.9
    assert not verify(run_dir, config).faults


def test_beside_training_the_base_is_held_in_the_compute_dtype(finished):
    config, run_dir = finished
    trained, frozen = Runtime.start(config).load_trained(run_dir.policy(1))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    for path, leaf in jax.tree.leaves_with_path(frozen):
        assert leaf.dtype == ("float32" if path[-1].key.endswith("norm") else "bfloat16"), path


@pytest.mark.soak
def test_on_another_mesh_the_merged_policy_is_the_same(finished):
    config, run_dir = finished
    one = Runtime.reading(config.model_copy(update={"mesh": MeshSection(data=8)}))
    expected = one.load_policy(run_dir.policy(1), TRAIN)
    other = Runtime.start(config.model_copy(update={"mesh": MeshSection(data=1, fsdp=4, tensor=2)}))
    found = other.load_policy(run_dir.policy(1), TRAIN)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=str(path))
    held = other.load_for_decoding(run_dir.policy(1))
    for layer, own in enumerate(held["layers"]):
        np.testing.assert_array_equal(own["up"], found["layers"]["up"][layer].astype(jnp.bfloat16))


def test_the_export_is_the_policy_merged_and_the_folder_for_peft(finished, tmp_path):
    config, run_dir = finished
    runtime = Runtime.reading(config)
    meant = runtime.load_policy(run_dir.policy(2), TRAIN)
    exports.run(run_dir, str(tmp_path / "out"), exports.Wanted(policy=2))
    _, found = hf.load(tmp_path / "out")
    for a, b in zip(*map(jax.tree.leaves, (found, meant)), strict=True):
        np.testing.assert_array_equal(a, b)
    adapter = runtime.programs.adapter
    _, base = hf.load(config.model.path)
    written = peft.load(tmp_path / "out" / "adapter", runtime.model_config, adapter)["layers"]
    delta = 2.0 * np.einsum("ldr,lrf->ldf", written["up_a"], written["up_b"])
    np.testing.assert_allclose(meant["layers"]["up"], base["layers"]["up"] + delta, atol=1e-6)
    assert np.abs(delta).max() > 1e-3
    # The run's own export, and what its note holds it to.
    noted = json.loads(run_dir.exported_path.read_text())
    assert noted["policy"] == 2
    assert "adapter/adapter_model.safetensors" in noted["files"]


@pytest.mark.soak
def test_five_steps_kill_and_the_rest_end_where_all_of_them_do(finished, tmp_path, monkeypatch):
    """States hold adapters and the fingerprint of their base: the second half is of the same bits."""
    config, run_dir = finished
    shutil.copytree(run_dir.path, tmp_path / "copy")
    copied = config.model_copy(update={"run_dir": str(tmp_path / "copy")})
    copy, steps = RunDir(copied.run_dir), len(losses(run_dir, 1))
    for path in (copy.stage("train", 1).path, copy.policy(2)):
        shutil.rmtree(path)
    taken, step = [], train.train_step

    def killed(*arguments, **options):
        if len(taken) == steps // 2:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*arguments, **options)

    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_stage(train, copied, 1)
    monkeypatch.undo()
    states = copy.stage("train", 1).path / "states"
    (newest,) = sorted(int(path.name) for path in states.iterdir() if path.name.isdecimal())[-1:]
    assert 0 < newest < steps
    metadata = json.loads((states / str(newest) / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert metadata["BASE"] == policy_fingerprint(run_dir.policy(0))
    # Three times the adapter, and no base.
    assert num_stored(states / str(newest) / "default") < num_stored(run_dir.policy(0) / "params")
    run_stage(train, copied, 1)
    assert policy_fingerprint(copy.policy(2)) == policy_fingerprint(run_dir.policy(2))
    assert losses(copy, 1) == losses(run_dir, 1)


def test_beside_other_weights_an_adapter_is_refused(finished, tmp_path):
    config, run_dir = finished
    shutil.copytree(run_dir.path, tmp_path / "copy")
    copied = config.model_copy(update={"run_dir": str(tmp_path / "copy")})
    copy, runtime = RunDir(copied.run_dir), Runtime.start(config)
    shutil.rmtree(copy.policy(0))
    moved = jax.tree.map(lambda leaf: leaf * 1.01, runtime.load_policy(run_dir.policy(0), TRAIN))
    save_policy(copy.policy(0), moved)
    for read in (lambda r: r.load_for_decoding(copy.policy(1)), lambda r: r.load_trained(copy.policy(1))):
        with pytest.raises(DnoError, match=r"001: an adapter beside weights of fingerprint .* have "):
            read(Runtime.start(copied))
    places = {fault.place: fault.text for fault in verify(copy, copied).faults}
    assert "beside other weights" in places["policies/001"].lower()
    # And an edited note is not the policy that was written.
    note = run_dir.policy(2) / "ADAPTER.json"
    (tmp_path / "copy" / "policies" / "002" / "ADAPTER.json").write_text(note.read_text().replace("8.0", "16.0"))
    assert "policies/002" in {fault.place for fault in verify(copy, copied).faults}


def peft_folder(path, checkpoint, **changes):
    """A trained adapter as PEFT writes it, made without PEFT."""
    config = hf.read_config(checkpoint)
    adapter = AdapterConfig.of(config, rank=2, alpha=4.0, targets=["q_proj", "down_proj"])
    rng = np.random.default_rng(3)
    adapters = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), abstract_adapters(config, adapter)
    )
    peft.save(path, config, adapter, adapters, source=checkpoint, base=(str(checkpoint), None))
    file = Path(path) / peft.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return adapters


@pytest.mark.soak
def test_a_run_starts_from_an_adapter_of_pefts(small_folder, tmp_path):
    tree = small_tree(small_folder)
    adapters = peft_folder(tmp_path / "peft", Path(tree["model"]["path"]), use_rslora=True)
    given = {"rank": 2, "alpha": 4.0 * 2**0.5, "targets": ["down_proj", "q_proj"], "path": str(tmp_path / "peft")}
    config = configured(small_folder, tmp_path / "run", adapter=given, model={"dtype": "float32"})
    prepare(config)
    run_dir, runtime = RunDir(config.run_dir), Runtime.start(config)
    trained, frozen = runtime.load_trained(run_dir.policy(0))
    jax.tree.map(np.testing.assert_array_equal, trained, adapters)
    _, base = hf.load(config.model.path)
    jax.tree.map(np.testing.assert_array_equal, frozen, base)
    assert fingerprint(frozen) == policy_fingerprint(run_dir.base_path) != policy_fingerprint(run_dir.policy(0))
    prepare(config)  # again: it is the same
    with pytest.raises(DnoError, match=r"adapter\.path is not set, and policy 0 of .* was made with"):
        prepare(config.model_copy(update={"adapter": config.adapter.model_copy(update={"path": None})}))
    with pytest.raises(
        DnoError, match=r"Set adapter\.rank=2 adapter\.alpha=5\.65685 adapter\.targets=\[q_proj,down_proj\]"
    ):
        prepare(configured(small_folder, tmp_path / "other", adapter={**given, "rank": 3}))
    peft_folder(tmp_path / "peft", Path(tree["model"]["path"]), use_rslora=True, base_model_name_or_path="another")
    with pytest.raises(DnoError, match="what it held was another"):
        prepare(config)


RATED = {"rule": "all", "reward": "win_rate", "opponents": "policy", "replay": 0.0}


@pytest.mark.soak
@pytest.mark.parametrize(
    "changes",
    [
        {"outer": {"scheme": "extragradient"}, "iterations": 2, "prompts": {"split": "shared"}, "pairing": RATED},
        {"outer": {"scheme": "lookahead"}},
        {"outer": {"scheme": "proximal", "every": 1}, "reference": {"kind": "initial"}},
    ],
    ids=lambda changes: changes["outer"]["scheme"],
)
def test_every_scheme_trains_adapters(small_folder, tmp_path, changes):
    config = configured(small_folder, tmp_path / "run", **changes)
    iteration.run(config)
    run_dir = RunDir(config.run_dir)
    names = sorted(path.name for path in run_dir.policy(0).parent.iterdir() if (path / "FINGERPRINT").exists())
    assert len(names) == 1 + config.iterations
    for name in names[1:]:
        note = json.loads((run_dir.path / "policies" / name / "ADAPTER.json").read_text())
        assert (note["base"], note["fingerprint"]) == ("000", policy_fingerprint(run_dir.policy(0)))
    assert not verify(run_dir, config).faults


def test_fine_tuning_trains_adapters_and_exports_both(small_folder, tmp_path):
    (tmp_path / "sft.jsonl").write_text(
        "".join(json.dumps({"prompt": "bam bas", "response": f"dom {word}"}) + "\n" for word in ("fen", "les", "ket"))
    )
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": small_tree(small_folder)["model"],
        "data": {"path": str(tmp_path / "sft.jsonl"), "max_length": 16},
        "adapter": ADAPTER,
        "optimizer": {"learning_rate": 1e-2},
        "training": {"batch_size": 8, "num_epochs": 4},
        "report": {"tensorboard": False},
    }
    config = parse_config(SftConfig, tree, place="test")
    target = Path(sft.run(Runtime.start(config)))
    model, whole = hf.load(target)
    _, base = hf.load(config.model.path)
    adapter = AdapterConfig.of(model, rank=4, alpha=8.0)
    found = peft.load(target / "adapter", model, adapter)["layers"]
    delta = 2.0 * np.einsum("ldr,lrf->ldf", found["up_a"], found["up_b"])
    assert np.abs(delta).max() > 1e-3
    np.testing.assert_allclose(whole["layers"]["up"], base["layers"]["up"] + delta, atol=1e-6)
    np.testing.assert_array_equal(whole["embed"], base["embed"])
    exports.run(RunDir(config.run_dir), str(tmp_path / "out"), exports.Wanted())
    assert (tmp_path / "out" / "adapter" / peft.WEIGHTS_FILE).exists()
