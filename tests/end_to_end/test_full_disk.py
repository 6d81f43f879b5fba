"""A disk that is full, or may not be written: one message in whatever stage, and nothing that was finished is lost."""

import contextlib
import os
import subprocess
import time

import pytest

from dno_jax.run_dir import RunDir
from tests.end_to_end.processes import Done, begin, start
from tests.end_to_end.test_resume import contents, finish, write_config

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(900)]
STAGES = ("sample", "annotate", "pair", "score", "train", "evaluate")
ROOM = "16m"
TRAINING = {"save_every": 2, "batch_size": 8, "keep_states": 9}


@contextlib.contextmanager
def disk(place, size):
    """A file system of its own, so large; yields what makes it larger, or mounts it otherwise."""
    place.mkdir(exist_ok=True)

    def mount(*options):
        return subprocess.run(["mount", *options, str(place)], capture_output=True, check=False).returncode

    if os.geteuid() or mount("-t", "tmpfs", "-o", f"size={size}", "none"):
        pytest.skip("needs to mount a file system")
    try:
        yield lambda option: mount("-o", f"remount,{option}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.soak
def test_a_run_ends_the_same_however_often_its_disk_is_full(tmp_path):
    finish(write_config(tmp_path, "whole", iterations=1, training=TRAINING))
    path = write_config(tmp_path, "disk/run", iterations=1, training=TRAINING)
    stages = set()
    run_dir, said = RunDir(tmp_path / "disk" / "run"), tmp_path / "stderr"
    with disk(tmp_path / "disk", ROOM) as change:
        report = (tmp_path / "whole" / "report.html").stat().st_size // 1024
        for size in ("250k", f"{report + 950}k"):  # at the first report, and amid the states or at the next
            assert change(f"size={ROOM}") == 0  # as it is looked at before the start
            said.write_text("")
            process = begin("run", path, stderr=said)
            while run_dir.holder() is None:
                assert process.exitcode is None, said.read_text()[-3000:]
                time.sleep(0.002)
            assert change(f"size={size}") == 0  # by then others have filled it
            process.join(600)
            done = Done(process.exitcode, said.read_text())
            assert done.returncode in (0, 2), done.stderr[-3000:]
            assert "Traceback" not in done.stderr
            if done.returncode:
                assert "cannot be written" in done.stderr
                assert "No space left on device" in done.stderr
                stages.add(next(name for name in STAGES if run_dir.stage(name, 0).manifest() is None))
        assert len(stages) > 1, stages  # it was full in more than one of them
        assert change(f"size={ROOM}") == 0
        finish(path)
        assert contents(run_dir, iterations=1) == contents(RunDir(tmp_path / "whole"), iterations=1)
        assert change("ro") == 0
        refused = start("run", path)
        assert refused.returncode == 2
        assert f"{run_dir.path}: cannot be written" in refused.stderr
        assert start("status", run_dir.path).returncode == 0
