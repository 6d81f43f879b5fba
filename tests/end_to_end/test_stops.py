"""SIGTERM and Ctrl-C in every stage: what can be saved is, and the same command ends as if nothing had been."""

import signal
import socket
import time

import pytest

from dno_jax.run_dir import RunDir
from tests.end_to_end.processes import begin, start
from tests.end_to_end.test_resume import contents, finish, write_config

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


def test_a_run_that_is_stopped_in_every_stage_ends_bit_for_bit_the_same(folder, whole):
    path = write_config(folder, "stopped", iterations=1, training=NEVER)
    run_dir = RunDir(folder / "stopped")
    for number, point in enumerate(POINTS):
        sent = "SIGINT" if number % 3 == 1 else "SIGTERM"
        ended = start("run", path, point=f"{point}@{sent}")
        assert ended.returncode == (130 if sent == "SIGINT" else 75), f"{point}:\n{ended.stderr[-3000:]}"
        assert "Traceback" not in ended.stderr
        if point.startswith("step:"):  # asked while it took its second step, before which there was no state
            assert states(run_dir) == [2]
        if point.startswith("policy:"):  # all steps are taken: the policy is what is to be saved
            assert run_dir.stage("train", 0).manifest() is not None
            assert states(run_dir) == []
    finish(path)
    assert contents(run_dir, iterations=1) == contents(whole, iterations=1)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def processes(path, count, *, overrides=()):
    """Start a run of several processes; return them and where they write."""
    port = free_port()
    said = [path.with_suffix(f".{number}.log") for number in range(count)]
    for file in said:
        file.touch()
    there = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", count)
    return [
        begin("run", path, *overrides, *there, "--process-id", number, stderr=file) for number, file in enumerate(said)
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
