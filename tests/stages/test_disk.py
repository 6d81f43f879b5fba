"""Too little disk for checkpoints is said before the start, with what they are."""

import json
import shutil
from types import SimpleNamespace

import pytest

from dno_jax.config import RewardConfig, SftConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import disk, reward, sft
from tests.small import TEMPLATE, small_tree


def test_what_is_yet_to_be_written_is_counted_and_held_to_what_is_free(make_config, monkeypatch):
    runtime = Runtime.start(make_config(training={"keep_states": 1}))
    parameters = runtime.programs.num_parameters
    wanted = disk.missing(runtime)
    assert wanted["policy 0"] == 4 * parameters
    assert wanted["later policies"] == 2 * 4 * parameters  # of two iterations
    assert 2 * 12 * parameters <= wanted["training states"] <= 2 * 12.1 * parameters  # weights, and Adam's two moments
    free = sum(wanted.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    disk.check(runtime)
    free -= 1
    said = r"are free on its disk, and .* of checkpoints will be written .policy 0 .*training.keep_policies=1, or train"
    with pytest.raises(DnoError, match=said):
        disk.check(runtime)

    for policy in (0, 1):  # a restart has these
        path = runtime.run_dir.policy(policy)
        path.mkdir(parents=True)
        (path / "FINGERPRINT").write_text("f" * 64)
    left = disk.missing(runtime)
    assert left["policy 0"] == 0
    assert left["later policies"] == 4 * parameters
    runtime.run_dir.exported_path.write_text("{}")
    assert disk.missing(runtime) == {}


def test_fewer_policies_and_adapters_take_less(make_config):
    kept = disk.missing(Runtime.start(make_config(iterations=5, training={"keep_policies": 1})))
    every = disk.missing(Runtime.start(make_config(iterations=5)))
    assert kept["later policies"] * 5 == every["later policies"] * 3
    adapters = disk.missing(Runtime.start(make_config(iterations=5, adapter={"rank": 2, "targets": "all"})))
    assert adapters["later policies"] < every["later policies"] / 2
    assert adapters["training states"] < every["training states"] / 2


def written(runtime, *policies):
    for policy in policies:
        path = runtime.run_dir.policy(policy)
        path.mkdir(parents=True)
        (path / "FINGERPRINT").write_text("f" * 64)


def test_a_policy_whose_weights_were_removed_is_not_there(make_config):
    runtime = Runtime.start(make_config(iterations=6, training={"keep_policies": 1}))
    written(runtime, 0, 1, 2, 3)
    for policy in (1, 2):
        (runtime.run_dir.policy(policy) / "PRUNED").write_text("")
    assert (
        disk.missing(runtime)["later policies"] == 2 * 4 * runtime.programs.num_parameters
    )  # of three, one lies there


def test_an_average_keeps_every_policy_and_exports_each_and_carried_moments_lie_beside_theirs(make_config):
    average = disk.missing(
        Runtime.start(make_config(iterations=4, training={"keep_policies": 1}, outer={"scheme": "average"}))
    )
    plain = Runtime.start(make_config(iterations=4))
    one = 4 * plain.programs.num_parameters
    assert average["later policies"] == 4 * one
    assert average["export"] == 5 * one // 2
    carried = disk.missing(Runtime.start(make_config(iterations=4, optimizer={"carry": True})))
    assert 4 * 3 * one <= carried["later policies"] <= 4 * 3.1 * one


@pytest.mark.parametrize("kind", [SftConfig, RewardConfig])
def test_other_trainings_are_refused_as_well_before_they_read_weights(kind, small_folder, tmp_path, monkeypatch):
    row = {"prompt": "bam bas", "response": "dom", "chosen": "dom fen", "rejected": "kos les ket"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": small_tree(small_folder)["model"] | {"chat_template": str(tmp_path / "chat.jinja")},
        "data" if kind is SftConfig else "pairs": {"path": str(tmp_path / "rows.jsonl"), "max_length": 24},
        "training": {"batch_size": 8, "keep_states": 1},
    }
    runtime = Runtime.start(parse_config(kind, tree, place="test"))
    wanted = disk.missing(runtime)
    assert 2 * 12 * runtime.programs.num_parameters <= wanted["training states"]
    free = sum(wanted.values()) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    for module in (sft, reward):
        monkeypatch.setattr(module, "read_checkpoint", None)
    with pytest.raises(DnoError, match=r"are free on its disk, and .* \(training states .*, export .*another run_dir"):
        (sft if kind is SftConfig else reward).run(runtime)
    assert not (tmp_path / "run").exists()
    state = tmp_path / "run" / "states" / "5"  # of a training that was interrupted
    state.mkdir(parents=True)
    assert disk.missing(runtime)["training states"] == wanted["training states"] // 2
