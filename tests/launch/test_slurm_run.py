"""launch/slurm.sbatch through a whole run: two tasks as SLURM would start them, told to stop, requeued, ended."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dno_jax.run_dir import RunDir
from tests.end_to_end.test_resume import contents, write_config
from tests.end_to_end.test_stops import free_port, steps_taken

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.soak, pytest.mark.timeout(4000)]

# Two nodes of two devices each, one task a node; SIGTERM goes to every process of every task, as SLURM sends it.
SRUN = """#!/usr/bin/env bash
set -m
while [ "${1#--}" != "$1" ]; do shift; done
tasks=()
for index in 0 1; do
  env SLURM_STEP_ID=0 SLURM_STEP_NODELIST=127.0.0.1,other SLURM_STEP_NUM_TASKS=2 "SLURM_STEP_TASKS_PER_NODE=1(x2)" \\
    SLURM_PROCID=$index SLURM_LOCALID=0 SLURM_NODEID=$index SLURM_GPUS_ON_NODE=2 "$@" &
  tasks+=($!)
  echo $! >>tasks
done
trap 'for task in "${tasks[@]}"; do kill -TERM -- "-$task" 2>/dev/null; done' TERM
highest=0
for task in "${tasks[@]}"; do
  while :; do
    status=0
    wait "$task" || status=$?
    kill -0 "$task" 2>/dev/null || break
  done
  [ "$status" -le "$highest" ] || highest=$status
done
exit "$highest"
"""


@pytest.fixture
def batch(tmp_path):
    """Start the batch script on a configuration."""
    commands = {
        "srun": SRUN,
        "scontrol": f'#!/usr/bin/env bash\necho "$@" >>{tmp_path}/requeued\n',
        "dno": f'#!/usr/bin/env bash\nexec {sys.executable} -m dno_jax "$@"\n',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)

    started = []

    def start(path):
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "SLURM_JOB_ID": "11", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": str(free_port()),
        }  # fmt: skip
        process = subprocess.Popen(
            [str(ROOT / "launch" / "slurm.sbatch"), str(path)], start_new_session=True,
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:  # with its tasks, which the stub puts into groups of their own
        for task in (tmp_path / "tasks").read_text().split() if (tmp_path / "tasks").exists() else ():
            with suppress(ProcessLookupError):
                os.killpg(int(task), signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_job_that_is_told_to_stop_is_requeued_and_ends_as_if_it_had_not_been(batch, tmp_path):
    small = {"iterations": 1, "training": {"batch_size": 8, "save_every": 1000}}
    whole, stopped = (write_config(tmp_path, name, **small) for name in ("whole", "stopped"))
    process = batch(whole)
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, said[-3000:]
    assert "4 devices of 2 processes on 1 host, mesh data 4 x fsdp 1" in said

    process = batch(stopped)
    deadline = time.monotonic() + 1500
    while steps_taken(RunDir(tmp_path / "stopped")) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 11\n"

    process = batch(stopped)
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, said[-3000:]
    assert contents(RunDir(tmp_path / "stopped"), iterations=1) == contents(RunDir(tmp_path / "whole"), iterations=1)
