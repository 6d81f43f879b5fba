"""Whole runs in a bucket of an object store on loopback: machines that die, a store that vanishes."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from dno_jax.bucket import work
from dno_jax.run_dir import RunDir
from tests.bucket.servers import BUCKET, S3, Gcs, free_port, serving
from tests.end_to_end.test_resume import contents
from tests.end_to_end.test_stops import steps_taken
from tests.small import small_tree

pytestmark = [pytest.mark.soak, pytest.mark.multiprocess, pytest.mark.timeout(3000)]


def command(*arguments, scratch, **options):
    environment = os.environ | {"DNO_SCRATCH": str(scratch), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "dno_jax", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(*arguments, scratch, status=0):
    process = command(*arguments, scratch=scratch)
    out, said = process.communicate(timeout=2400)
    assert process.returncode == status, said[-3000:]
    return out, said


def recipe(folder, run_dir, **changes):
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(small_tree(folder) | {"run_dir": str(run_dir), "iterations": 1} | changes))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    """What a run leaves that was let alone, in a file system."""
    finish("run", recipe(folder, folder / "whole"), scratch=folder / "none")
    return contents(RunDir(folder / "whole"), iterations=1)


@pytest.fixture(params=[S3, Gcs], ids=["s3", "gs"])
def server(request, monkeypatch):
    with serving(request.param, monkeypatch) as found:
        yield found
    work._folders.clear()


def test_a_store_keeps_its_objects_while_it_is_stopped(server):
    def files():
        return fsspec.filesystem(server.scheme, use_listings_cache=False, skip_instance_cache=True)

    fsspec = pytest.importorskip("fsspec")
    files().pipe_file(f"{BUCKET}/a", b"1")
    for _ in range(2):
        server.stop()
        server.start()
        assert files().cat_file(f"{BUCKET}/a") == b"1"


def there(run_dir, name):
    """Whether the bucket has a file, as its index says."""
    index = run_dir.bucket._mirror.store.read(".dno/index.json")
    return index is not None and name in json.loads(index)["files"]


def until(run_dir, name, process):
    while not there(run_dir, name):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize("stage", ["judgements", "train"])
def test_a_machine_that_dies_with_its_disk_is_followed_by_another(folder, whole, server, tmp_path, monkeypatch, stage):
    monkeypatch.setenv("DNO_SCRATCH", str(tmp_path / "looking"))
    url = f"{server.scheme}://{BUCKET}/runs/{stage}"
    path, run_dir = recipe(folder, url), RunDir(url)
    first = command("run", path, scratch=tmp_path / "first")
    until(run_dir, f"iterations/000/{stage}/MANIFEST.json", first)
    first.kill()
    first.communicate()
    shutil.rmtree(tmp_path / "first")
    _, said = finish("run", path, scratch=tmp_path / "second")
    assert "taken over from process" in said
    run_dir.fetch()
    assert contents(run_dir, iterations=1) == whole
    assert "stages" in finish("status", url, scratch=tmp_path / "third")[0]
    finish("status", url, "--verify", scratch=tmp_path / "third")
    finish("report", url, scratch=tmp_path / "third")
    finish("export", url, tmp_path / "exported", scratch=tmp_path / "fourth")
    assert "notAkey" not in said
    assert "AKIAEXAMPLE" not in said


@pytest.mark.parametrize("server", [S3], indirect=True, ids=["s3"])
def test_a_machine_that_is_told_to_go_leaves_its_state_there(folder, whole, server, tmp_path, monkeypatch):
    """No state would be saved but the one of the stop, which goes up within the grace."""
    url = f"{server.scheme}://{BUCKET}/runs/told"
    path = recipe(folder, url)
    monkeypatch.setenv("DNO_SCRATCH", str(tmp_path / "first"))
    here = RunDir(url)
    first = command("run", path, scratch=tmp_path / "first")
    while steps_taken(here) < 2:
        assert first.poll() is None, first.communicate()[1][-3000:]
        time.sleep(0.02)
    first.terminate()
    _, said = first.communicate(timeout=600)
    assert first.returncode == 75, said[-3000:]
    steps = [int(state.name) for state in (here.path / "iterations/000/train/states").iterdir()]
    assert there(here, f"iterations/000/train/states/{max(steps)}/_CHECKPOINT_METADATA")
    shutil.rmtree(tmp_path / "first")
    work._folders.clear()
    monkeypatch.setenv("DNO_SCRATCH", str(tmp_path / "second"))
    _, said = finish("run", path, scratch=tmp_path / "second")
    assert "taken over" not in said  # the lock was given back
    assert contents(RunDir(url), iterations=1) == whole
    taken = [row["step"] for row in RunDir(url).read_metrics() if row["stage"] == "train"]
    assert taken == list(range(len(taken)))


def test_a_store_that_vanishes_amid_a_run_costs_nothing(folder, whole, server, tmp_path, monkeypatch):
    monkeypatch.setenv("DNO_SCRATCH", str(tmp_path / "looking"))
    url = f"{server.scheme}://{BUCKET}/runs/vanished"
    path, run_dir = recipe(folder, url), RunDir(url)
    process = command("run", path, scratch=tmp_path / "first")
    until(run_dir, "iterations/000/pairs/MANIFEST.json", process)
    server.stop()
    _, said = process.communicate(timeout=2400)
    assert process.returncode == 2, said[-3000:]
    assert f"run_dir {url}: cannot be reached" in said
    assert "the same command goes on and uploads it" in said
    assert "Traceback" not in said
    server.start()
    finish("run", path, scratch=tmp_path / "first")
    run_dir.fetch()
    assert contents(run_dir, iterations=1) == whole
    assert there(run_dir, "export/config.json")


def pair_of(path, scratches):
    """Two processes of one run, each with a scratch of its own or of both."""
    meet = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    processes = [command("run", path, *meet, number, scratch=scratch) for number, scratch in enumerate(scratches)]
    said = [process.communicate(timeout=2400)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.parametrize("server", [S3], indirect=True, ids=["s3"])
def test_two_processes_work_in_one_folder(folder, whole, server, tmp_path, monkeypatch):
    monkeypatch.setenv("DNO_SCRATCH", str(tmp_path / "looking"))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    url = f"{server.scheme}://{BUCKET}/runs/pair"
    path, run_dir = recipe(folder, url, heartbeat_seconds=60.0), RunDir(url)
    statuses, said = pair_of(path, [tmp_path / "one", tmp_path / "two"])
    assert statuses[1] == 2, said
    assert f"run_dir {url}: process 1 does not see the folder" in said[1]
    assert statuses[0] == 2, said  # process 0 ends with it
    statuses, said = pair_of(path, [tmp_path / "both"] * 2)
    assert statuses == [0, 0], said
    run_dir.fetch()
    rows = contents(run_dir, iterations=1)[0]
    assert rows["annotate", 0] == whole[0]["annotate", 0]
    assert trained_on(rows) == trained_on(whole[0])  # log-probabilities are rounded otherwise on two devices


def trained_on(rows):
    return [(row["pair_id"], row["chosen_text"], row["rejected_text"]) for row in rows["pair", 0]]
