"""Two hosts, each a network namespace of its own, and the cable between them: where it is cut both end, and say so."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dno_jax.run_dir import RunDir
from tests.end_to_end.test_resume import contents, write_config
from tests.end_to_end.test_stops import steps_taken
from tests.parallel.test_meeting import at_work, kill

ROOT = Path(__file__).parents[2]
PORT = "29500"
FLAGS = ("coordinator", "num_processes", "process_id")
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.soak, pytest.mark.timeout(1800)]


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


class Hosts:
    """Names of the two namespaces, and their addresses."""

    def __init__(self):
        self.names = [f"dno{os.getpid()}{side}" for side in "ab"]
        self.addresses = ["10.213.7.1", "10.213.7.2"]
        self.links = [f"dv{os.getpid() % 10**6}{side}" for side in "ab"]

    def open(self):
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for up in (link, "lo"):
                ip("-n", name, "link", "set", up, "up")
            hosts = Path("/etc/netns") / name / "hosts"  # which `ip netns exec` puts over /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")

    def cut(self):
        ip("-n", self.names[0], "link", "set", self.links[0], "down")

    def mend(self):
        ip("-n", self.names[0], "link", "set", self.links[0], "up")

    def close(self):
        for name in self.names:
            ip("netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def start(self, arguments, **variables):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
        environment.pop("XLA_FLAGS", None)
        there = f"{self.addresses[0]}:{PORT}"
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, *arguments(there, index)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment | {"MEETING_FLAGS": json.dumps(dict(zip(FLAGS, (there, 2, index), strict=True)))},
            )
            for index, name in enumerate(self.names)
        ]  # fmt: skip


@pytest.fixture
def hosts():
    found = Hosts()
    try:
        found.open()
    except (OSError, subprocess.CalledProcessError) as error:
        found.close()
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield found
    found.close()


@pytest.mark.parametrize("task", ["computing", "collective", "waiting"])
def test_both_end_when_the_cable_is_cut(hosts, task):
    processes = hosts.start(lambda there, index: ("-m", "tests.parallel.meeting_process", task), MEETING_HEARTBEAT="15")
    try:
        for process in processes:
            assert at_work(process)["processes"] == 2
        hosts.cut()
        ends = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        kill(processes)
    assert [process.returncode for process in processes] == [75, 75], [said[-1500:] for said in ends]
    for index, said in enumerate(ends):
        assert said.strip().splitlines()[-1].startswith(f"dno: process {1 - index} on ")


def begun(run_dir, stage):
    return steps_taken(run_dir) > 1 if stage == "train" else bool(run_dir.stage(stage, 0).shard_names())


@pytest.mark.parametrize("stage", ["sample", "train"])
def test_a_run_over_both_goes_on_when_the_cable_is_mended(hosts, tmp_path, stage):
    def run(path):
        flags = ("--num-processes", "2", "--process-id")
        command = ("-m", "dno_jax", "run", str(path), "--coordinator")
        return hosts.start(lambda there, index: (*command, there, *flags, str(index)))

    def finish(path):
        processes = run(path)
        ends = [process.communicate(timeout=900)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], [said[-2000:] for said in ends]
        return contents(RunDir(tmp_path / path.stem), iterations=1)

    small = {"iterations": 1, "heartbeat_seconds": 30.0}
    whole = finish(write_config(tmp_path, "whole", **small))
    path = write_config(tmp_path, "cut", **small)
    processes = run(path)
    deadline = time.monotonic() + 600
    while not begun(RunDir(tmp_path / "cut"), stage):
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    hosts.cut()
    ends = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], [said[-2000:] for said in ends]
    hosts.mend()
    assert finish(path) == whole
