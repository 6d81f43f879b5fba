"""Real processes of this machine, under the environment that each launcher would give them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_stops import free_port
from tests.parallel.test_launchers import metadata_server

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.soak, pytest.mark.timeout(600)]


def started(environments, task="", *, devices=1, **variables):
    common = {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **variables,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.meeting_process", *filter(None, [task])],
            cwd=ROOT, env=common | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for environment in environments
    ]  # fmt: skip


def found(processes):
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), [end[1][-2000:] for end in ends]
    return [json.loads(end[0].strip().splitlines()[-1]) for end in ends]


def slurm(index, *, tasks=1, port):
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "127.0.0.1,other", "SLURM_PROCID": str(index),
        "SLURM_STEP_NUM_TASKS": str(2 * tasks), "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)",
        "SLURM_LOCALID": str(index % tasks), "SLURM_NODEID": str(index // tasks), "SLURM_GPUS_ON_NODE": "8",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "JAX_COORDINATOR_PORT": port,
    }  # fmt: skip


def test_slurm_gives_a_process_every_gpu_of_its_node():
    port = str(free_port())
    one, two = found(started([slurm(index, port=port) for index in range(2)], devices=8))
    assert one["processes"] == two["processes"] == 2
    assert one["local"] == two["local"] == 8
    assert one["line"] == "16 devices of 2 processes on 1 host, mesh data 1 x fsdp 16"
    assert one["visible"] == "all"


def test_slurms_tasks_of_one_node_share_its_gpus_out():
    port = str(free_port())
    every = found(started([slurm(index, tasks=2, port=port) for index in range(4)], devices=4))
    assert [one["visible"] for one in every] == ["0,1,2,3", "4,5,6,7"] * 2
    assert {one["line"] for one in every} == {"16 devices of 4 processes on 1 host, mesh data 1 x fsdp 16"}


def test_a_node_of_which_jax_sees_no_gpu_is_refused():
    port = str(free_port())
    processes = started([slurm(index, port=port) for index in range(2)], devices=1)
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert any("names 8 accelerators for this process, and jax sees 1 cpu device" in end[1] for end in ends)


def test_pods_of_an_indexed_job_meet():
    address = f"127.0.0.1:{free_port()}"
    pods = [
        {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"dno-{index}",
            "JAX_NUM_PROCESSES": "4", "JAX_COORDINATOR_ADDRESS": address,
        }
        for index in range(4)
    ]  # fmt: skip
    assert [(one["processes"], one["index"]) for one in found(started(pods))] == [(4, index) for index in range(4)]


def test_tpu_vms_meet_by_their_metadata():
    ends = "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.1"
    with (
        metadata_server({"agent-worker-number": "0", "worker-network-endpoints": ends}) as one,
        metadata_server({"agent-worker-number": "1", "worker-network-endpoints": ends}) as two,
    ):
        hosts = [{"GCE_METADATA_IP": host, "JAX_COORDINATOR_PORT": "0"} for host in (one, two)]
        port = str(free_port())
        hosts = [{**host, "JAX_COORDINATOR_PORT": port} for host in hosts]
        assert [one["processes"] for one in found(started(hosts, devices=4))] == [2, 2]


def test_mpirun():
    uri, port = "1531576320.0;tcp://127.0.0.1:34911", str(free_port())
    tasks = [
        {
            "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_MCA_orte_hnp_uri": uri, "JAX_COORDINATOR_PORT": port,
        }
        for index in range(2)
    ]  # fmt: skip
    assert [one["processes"] for one in found(started(tasks))] == [2, 2]


def kill(processes):
    """End what is left of them, and their pipes."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        process.stdout.close()
        process.stderr.close()


def flags():
    address = f"127.0.0.1:{free_port()}"
    return [
        {"MEETING_FLAGS": json.dumps({"coordinator": address, "num_processes": 2, "process_id": index})}
        for index in range(2)
    ]


def at_work(process):
    """Wait until a process has met the others; return what it says."""
    for line in process.stdout:
        if line.startswith("{"):  # gloo writes there too
            return json.loads(line)
    raise AssertionError(process.communicate()[1][-2000:])


@pytest.mark.parametrize("task", ["computing", "collective", "waiting"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "dies"])
def test_whatever_the_others_do_when_one_is_lost(task, victim, number):
    processes = started(flags(), task, MEETING_HEARTBEAT="10")
    try:
        for process in processes:
            at_work(process)
        processes[victim].send_signal(number)
        other = processes[1 - victim]
        _, said = other.communicate(timeout=120)
    finally:
        kill(processes)
    assert other.returncode == 75, said[-2000:]
    assert said.strip().splitlines()[-1].startswith(f"dno: process {victim} on ")
    assert "stack trace" not in said  # jax's


@pytest.mark.parametrize("read", [True, False])
def test_a_process_that_fails_ends_the_others_with_its_status(read):
    """They are not to be started again: the same error would come. Who reads what it says may have gone."""
    processes = started(flags(), "failing", MEETING_HEARTBEAT="60")
    if not read:
        at_work(processes[1])
        processes[1].stderr.close()
        processes[1].stderr = None
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert not read or "ValueError: of its own" in ends[1][1]
    assert "process 1 on " in ends[0][1]
    assert "has failed (exit status 1): see what it has said" in ends[0][1]
