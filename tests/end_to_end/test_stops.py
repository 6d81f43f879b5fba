"""SIGTERM and Ctrl-C in every stage: what can be saved is, and the same command ends as if nothing had been."""

import json
import signal
import socket
import time

import jax
import numpy as np
import pytest
import yaml

from dno_jax.parallel.sharding import TRAIN
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from tests.end_to_end.processes import begin, start
from tests.end_to_end.test_resume import contents, finish, write_config
from tests.small import small_tree

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(900)]
# In the order in which a run passes them: after each the next start goes on.
POINTS = ["shard-sample:1", "finish-annotate:1", "shard-score:1", "step:2", "policy:1"]  # the soak knows no bounds
NEVER = {"save_every": 1000, "batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(scope="module")
def whole(folder):
    path = write_config(folder, "whole", iterations=1, training=NEVER)
    finish(path)
    return RunDir(folder / "whole")


def states(run_dir):
    path = run_dir.stage("train", 0).path / "states"
    return sorted(int(state.name) for state in path.iterdir() if state.name.isdecimal()) if path.exists() else []


@pytest.mark.soak
def test_a_run_that_is_stopped_in_every_stage_ends_bit_for_bit_the_same(folder, whole):
    path = write_config(folder, "stopped", iterations=1, training=NEVER)
    run_dir = RunDir(folder / "stopped")
    for number, point in enumerate(POINTS):
        sent = "SIGINT" if number % 3 == 1 else "SIGTERM"
        ended = start("run", path, point=f"{point}@{sent}")
        assert ended.returncode == (130 if sent == "SIGINT" else 75), f"{point}:\n{ended.stderr[-3000:]}"
        assert "Traceback" not in ended.stderr
        if point.startswith("finish-"):  # the main thread waited for the one that was at it
            assert run_dir.stage("annotate", 0).manifest() is not None
        if point.startswith("step:"):  # asked while it took its second step, before which there was no state
            assert states(run_dir) == [2]
        if point.startswith("policy:"):  # all steps are taken: the policy is what is to be saved
            assert run_dir.stage("train", 0).manifest() is not None
            assert states(run_dir) == []
    finish(path)
    assert contents(run_dir, iterations=1) == contents(whole, iterations=1)


# Others than the above are stopped where each has done a part of its work.
MIDDLES = ["shard-annotate:2", "pairs:1", "shard-score:1"]


@pytest.mark.soak
def test_sigterm_in_the_middle_of_annotating_pairing_and_scoring(folder, whole):
    path = write_config(folder, "middles", iterations=1, training=NEVER)
    run_dir = RunDir(folder / "middles")
    for point in MIDDLES:
        ended = start("run", path, point=f"{point}@SIGTERM")
        assert ended.returncode == 75, f"{point}:\n{ended.stderr[-3000:]}"
        assert "Traceback" not in ended.stderr
        assert run_dir.stage("train", 0).manifest() is None
    finish(path)
    assert contents(run_dir, iterations=1) == contents(whole, iterations=1)


@pytest.mark.soak
def test_sigterm_in_the_middle_of_supervised_training(folder):
    tree = small_tree(folder)
    words = ["bam", "dom", "fen", "kos"]
    rows = [{"prompt": f"{a} {b}", "response": f"{a} {a} {a}"} for a in words for b in words]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exported = []
    for name, point in (("straight", None), ("stopped", "step:3@SIGTERM")):
        config = folder / f"sft-{name}.yaml"
        data = {"path": str(folder / "sft.jsonl"), "max_length": 32}
        training = {"batch_size": 4, "num_epochs": 2, "save_every": 1000}
        run = {"run_dir": str(folder / f"sft-{name}"), "model": tree["model"], "data": data, "training": training}
        config.write_text(yaml.safe_dump(run))
        if point:
            ended = start("sft", config, point=point)
            assert ended.returncode == 75, ended.stderr[-3000:]
            assert "Traceback" not in ended.stderr
            assert [int(path.name) for path in (folder / "sft-stopped" / "states").iterdir()] == [3]
            assert not (folder / "sft-stopped" / "export").exists()
        ended = start("sft", config)
        assert ended.returncode == 0, ended.stderr[-3000:]
        exported.append((folder / f"sft-{name}" / "export" / "model.safetensors").read_bytes())
    assert exported[0] == exported[1]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def processes(path, count, *, overrides=(), points=()):
    """Start a run of several processes, some with a point (crash.py); return them and where they write."""
    port = free_port()
    said = [path.with_suffix(f".{number}.log") for number in range(count)]
    for file in said:
        file.touch()
    there = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", count)
    return [
        begin("run", path, *overrides, *there, "--process-id", number, stderr=file, point=dict(points).get(number))
        for number, file in enumerate(said)
    ], said


def steps_taken(run_dir):
    return len([row for row in run_dir.read_metrics() if row["stage"] == "train"])


@pytest.mark.soak
def test_two_processes_stop_at_the_same_step_and_one_goes_on(folder):
    path = write_config(folder, "two", iterations=1, training=NEVER | {"num_epochs": 100})
    run_dir = RunDir(folder / "two")
    both, said = processes(path, 2)
    deadline = time.monotonic() + 300
    while steps_taken(run_dir) < 3:
        assert all(process.exitcode is None for process in both), [file.read_text()[-2000:] for file in said]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    both[1].terminate()  # only one of them is asked
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [75, 75], [file.read_text()[-2000:] for file in said]
    assert not [file for file in said if "Traceback" in file.read_text()]
    (saved,) = states(run_dir)
    assert saved == steps_taken(run_dir)  # the last step that was taken
    assert start("run", path, point="step:1").returncode == -signal.SIGKILL  # by one process, and from there


@pytest.mark.soak
def test_what_two_processes_began_one_ends_with_the_same_numbers(folder):
    """Sums over processes and over devices differ in rounding, and in nothing else."""
    training = NEVER | {"num_epochs": 6}
    path, alone = (write_config(folder, name, iterations=1, training=training) for name in ("begun", "alone"))
    run_dir, whole = RunDir(folder / "begun"), RunDir(folder / "alone")
    both, said = processes(path, 2, points={1: "step:2@SIGTERM"})
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [75, 75], [file.read_text()[-2000:] for file in said]
    finish(alone)
    (saved,) = states(run_dir)
    assert 2 <= saved < steps_taken(whole)
    finish(path)
    rows, expected = ([row for row in run.read_metrics() if row["stage"] == "train"] for run in (run_dir, whole))
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    found, wanted = (read_policy(run) for run in (run_dir, whole))
    for (name, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=jax.tree_util.keystr(name))


def read_policy(run_dir):
    runtime = Runtime.start(run_dir.load_config())
    return jax.tree.map(np.asarray, runtime.load_policy(run_dir.policy(1), TRAIN))


@pytest.mark.soak
def test_a_run_whose_coordinator_dies_ends_and_one_process_goes_on(folder):
    path = write_config(folder, "orphan", iterations=1, training=NEVER | {"num_epochs": 100, "save_every": 2})
    run_dir = RunDir(folder / "orphan")
    both, said = processes(path, 2)
    deadline = time.monotonic() + 300
    while steps_taken(run_dir) < 5:
        assert all(process.exitcode is None for process in both), [file.read_text()[-2000:] for file in said]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    both[0].kill()
    both[1].join(200)
    assert both[1].exitcode not in (None, 0)
    whole = states(run_dir)
    ended = start("run", path, point="step:1@SIGTERM")
    assert ended.returncode == 75, ended.stderr[-3000:]
    assert max(states(run_dir)) == max(whole) + 1
