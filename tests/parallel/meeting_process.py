"""`python -m tests.parallel.meeting_process [TASK]`: one process that meets others by its environment, and says so."""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace

import jax

from dno_jax.cli import joining, process


def main(task: str = "") -> int:
    def command(**_: object) -> int:
        flags = json.loads(os.environ.get("MEETING_FLAGS", "{}"))
        settings = SimpleNamespace(heartbeat_seconds=float(os.environ.get("MEETING_HEARTBEAT", "100")))
        joining.join(settings, flags.get("coordinator"), flags.get("num_processes"), flags.get("process_id"))  # type: ignore[arg-type]
        from dno_jax.config import MeshSection
        from dno_jax.parallel.cluster import barrier, described, wait_until
        from dno_jax.parallel.mesh import make_mesh

        found = {
            "processes": jax.process_count(),
            "index": jax.process_index(),
            "local": jax.local_device_count(),
            "visible": jax.config.read("jax_cuda_visible_devices"),
            "line": described(make_mesh(MeshSection(data=1, fsdp=-1))),
        }
        print(json.dumps(found), flush=True)
        if task == "collective":
            for step in range(10**9):
                barrier(str(step))
        if task == "waiting":
            wait_until(lambda: False)
        if task == "failing" and jax.process_index() == 1:
            time.sleep(1.0)
            raise ValueError("of its own")
        if task in ("failing", "computing"):
            while True:
                time.sleep(0.1)
        return 0

    failure = None
    try:
        status = process.run(command)
    except Exception as error:
        status, failure = 1, error
    joining.leave(status, failure)
    return status


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
