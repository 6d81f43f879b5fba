"""The demo, shortened, under each launcher's environment: stopped by its signals, hung, and none the worse for it."""

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from dno_jax.run_dir import RunDir
from tests.end_to_end.processes import begin, patience
from tests.end_to_end.test_resume import contents
from tests.end_to_end.test_stops import free_port
from tests.parallel.test_launchers import metadata_server

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.soak, pytest.mark.timeout(3600)]


def slurm(port):
    """One task for each of two nodes with eight devices."""
    common = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "127.0.0.1,other", "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    return [common | {"SLURM_PROCID": str(n), "SLURM_NODEID": str(n), "JAX_COORDINATOR_PORT": port} for n in range(2)]


def indexed_job(port):
    common = {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JAX_NUM_PROCESSES": "4", "NVIDIA_VISIBLE_DEVICES": "all",
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1", "JAX_COORDINATOR_PORT": port,
    }  # fmt: skip
    return [common | {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"dno-{index}"} for index in range(4)]


def tpu_vm(port, metadata):
    return [{"GCE_METADATA_IP": host, "JAX_COORDINATOR_PORT": port} for host in metadata]


def open_mpi(port):
    common = {
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "JAX_COORDINATOR_PORT": port,
    }  # fmt: skip
    return [common | {"OMPI_COMM_WORLD_RANK": str(index)} for index in range(2)]


# What a launcher says to each process, devices of a process, and the line with which the run begins.
LAUNCHERS = {
    "slurm": (slurm, 8, "16 devices of 2 processes on 1 host, mesh data 16 x fsdp 1"),
    "indexed-job": (indexed_job, 1, "4 devices of 4 processes on 1 host, mesh data 4 x fsdp 1"),
    "tpu-vm": (tpu_vm, 4, "8 devices of 2 processes on 1 host, mesh data 8 x fsdp 1"),
    "open-mpi": (open_mpi, 2, "4 devices of 2 processes on 1 host, mesh data 4 x fsdp 1"),
}


@pytest.fixture(scope="module")
def metadata():
    """The metadata servers of two TPU VMs."""
    ends = "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.1"
    with ExitStack() as servers:
        yield [
            servers.enter_context(
                metadata_server({"agent-worker-number": str(index), "worker-network-endpoints": ends})
            )
            for index in range(2)
        ]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_demo_is_hung_and_preempted_and_ends_as_if_it_had_not_been(tmp_path, metadata, name):
    environments, devices, line = LAUNCHERS[name]

    def run(path, point=None):
        """Run all processes to their ends; the last of them gets a signal at a point."""
        port = str(free_port())
        told = environments(port, metadata) if environments is tpu_vm else environments(port)
        said = [path.with_suffix(f".{number}.log") for number in range(len(told))]
        for file in said:
            file.write_text("")
        processes = [
            begin(
                "run", path, stderr=file, environment=environment, devices=devices,
                point=point if number == len(told) - 1 else None,
            )
            for number, (file, environment) in enumerate(zip(said, told, strict=True))
        ]  # fmt: skip
        for process in processes[:-1] if point and point.endswith("SIGSTOP") else processes:
            process.join(1200)
        processes[-1].kill()  # where it is stopped, SIGTERM would be held
        processes[-1].join(30)
        return [process.exitcode for process in processes], [file.read_text() for file in said]

    whole, broken = shortened(tmp_path, "whole"), shortened(tmp_path, "broken")
    statuses, said = run(whole)
    count = len(said)
    assert statuses == [0] * count, [text[-2000:] for text in said]
    assert line in said[0]

    statuses, said = run(broken, "after-shard-sample:1@SIGSTOP")
    assert statuses == [75] * (count - 1) + [-signal.SIGKILL], [text[-2000:] for text in said]
    for text in said[:-1]:
        assert text.strip().splitlines()[-1].startswith(f"dno: process {count - 1} on ")
    statuses, said = run(broken, "step:2@SIGTERM")
    assert statuses == [75] * count, [text[-2000:] for text in said]
    assert not [text for text in said if "Traceback" in text or "stack trace" in text]
    assert RunDir(tmp_path / "broken").stage("train", 0).manifest() is None
    statuses, said = run(broken)
    assert statuses == [0] * count, [text[-2000:] for text in said]
    assert contents(RunDir(tmp_path / "broken"), iterations=1) == contents(RunDir(tmp_path / "whole"), iterations=1)


def shortened(folder, name):
    """The demo of one iteration, of 48 of its prompts."""
    demo = ROOT / "configs" / "demo"
    for file, count in (("prompts.jsonl", 48), ("held_out.jsonl", 8)):
        rows = (demo / file).read_text().splitlines()[:count]
        (folder / file).write_text("\n".join(rows) + "\n")
    tree = {
        "base": str(ROOT / "configs" / "demo.yaml"),
        "run_dir": name,
        "iterations": 1,
        "heartbeat_seconds": patience(60.0),
        "prompts": {"path": "prompts.jsonl", "held_out_path": "held_out.jsonl"},
        "sampling": {"max_new_tokens": 24, "shard_prompts": 12},
        "pairing": {"max_pairs_per_prompt": 2},
        "evaluation": {"num_samples": 1},
        "training": {"batch_size": 16, "num_epochs": 3, "save_every": 1000},
        "report": {"tensorboard": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
