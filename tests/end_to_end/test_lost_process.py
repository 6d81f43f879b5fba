"""A process that hangs or dies in any stage: the others end within the heartbeat, say why, and the run goes on."""

import signal

import pytest

from dno_jax.run_dir import RunDir
from tests.end_to_end.processes import begin, patience
from tests.end_to_end.test_resume import contents, write_config
from tests.end_to_end.test_stops import free_port

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.soak, pytest.mark.timeout(1800)]
HEARTBEAT = patience(45.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lost")


def both(path, *, victim=None, point=None):
    """Start the run by two processes, one of which gets a signal at a point; return them and where they write."""
    said = [path.with_suffix(f".{number}.log") for number in range(2)]
    for file in said:
        file.write_text("")
    there = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2)
    return [
        begin("run", path, *there, "--process-id", n, stderr=file, point=point if n == victim else None)
        for n, file in enumerate(said)
    ], said


def finish(path):
    processes, said = both(path)
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0], [file.read_text()[-2000:] for file in said]
    assert "2 devices of 2 processes on 1 host, mesh data 2 x fsdp 1" in said[0].read_text()


@pytest.fixture(scope="module")
def whole(folder):
    path = write_config(folder, "whole", iterations=1, heartbeat_seconds=HEARTBEAT)
    finish(path)
    return contents(RunDir(folder / "whole"), iterations=1)


@pytest.mark.parametrize(
    ("stage", "victim", "point"),
    [
        ("sampling", 1, "shard-sample:1@SIGSTOP"),
        ("training", 1, "step:2@SIGSTOP"),
        ("training-0", 0, "step:2@SIGSTOP"),
        ("waiting", 0, "finish-annotate:1@SIGSTOP"),  # the other polls for the manifest
        ("killed", 1, "step:2@SIGKILL"),  # jax raises an error of its connection first
        ("killed-0", 0, "step:2@SIGKILL"),  # with it jax's coordinator ends
    ],
)
def test_the_others_end_with_one_sentence_and_the_run_goes_on(folder, whole, stage, victim, point):
    path = write_config(folder, stage, iterations=1, heartbeat_seconds=HEARTBEAT)
    processes, said = both(path, victim=victim, point=point)
    other, lost = processes[1 - victim], processes[victim]
    other.join(600)
    lost.kill()  # SIGTERM is held by a process that is stopped
    lost.join(30)
    assert lost.exitcode == -signal.SIGKILL
    text = said[1 - victim].read_text()
    assert other.exitcode == 75, text[-3000:]
    sentence = text.strip().splitlines()[-1]
    assert sentence.startswith(f"dno: process {victim} on ")
    assert "the same command goes on from what is saved" in sentence
    assert "Traceback" not in text
    assert "stack trace" not in text  # jax's
    finish(path)
    assert contents(RunDir(folder / stage), iterations=1) == whole
