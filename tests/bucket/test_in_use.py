"""Run directories in a bucket as the commands meet them: one seam, whoever reads or writes."""

import json
import shutil
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from dno_jax import run_dir as run_dir_module
from dno_jax.annotation.ledger.store import Receipt, VerdictStore
from dno_jax.annotation.question import Verdict
from dno_jax.bucket import store
from dno_jax.bucket.work import bring
from dno_jax.cli import annotations, looking
from dno_jax.config import RunConfig, parse_config
from dno_jax.data.labelled import read_verdicts
from dno_jax.errors import DnoError
from dno_jax.records import ReferenceScore
from dno_jax.run_dir import RunDir
from dno_jax.stages import disk

URL = "memory://pail/runs/mine"
INDEX = f"{URL}/.dno/index.json"


def config(**changes):
    tree = {"run_dir": URL, "model": {"path": "m"}, "prompts": {"path": "p"}, "annotation": {"kind": "openai"}}
    return parse_config(RunConfig, tree | changes, place="test")


def begin(run_dir, *, shards=1):
    """What a stage leaves, with verdicts that were paid for."""
    run_dir.create(config())
    stage = run_dir.stage("score", 0)
    stage.start(config())
    for number in range(shards):
        row = ReferenceScore(pair_id=f"{number}", chosen_logprob=-1.0, rejected_logprob=-2.0)
        stage.write_shard(f"{number:07d}", [row])
    return stage


def test_a_stage_that_is_done_is_uploaded_while_the_run_goes_on(bucket, machine):
    run_dir = RunDir(URL)
    with run_dir.held():
        begin(run_dir).finish(config(), inputs={}, rows=1, seconds=0.1)
        deadline = time.monotonic() + 60
        while not bucket.exists(INDEX):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "iterations/000/reference/MANIFEST.json" in json.loads(bucket.cat_file(INDEX))["files"]
        machine("second")
        other = RunDir(URL)
        assert other.path != run_dir.path
        assert other.load_config() == config()
        assert other.stage("score", 0).require().rows == 1
        assert len(list(other.stage("score", 0).read(ReferenceScore))) == 1


def test_status_takes_the_url_and_says_who_works(bucket, machine, capsys):
    run_dir = RunDir(URL)
    with run_dir.held():
        begin(run_dir).finish(config(), inputs={}, rows=1, seconds=0.1)
        run_dir.bucket._mirror.commit()
        machine("second")
        looking.status(URL, as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert found["run_dir"] == URL
        assert found["in_use_by"].startswith("process ")
        assert [row["stage"] for row in found["stages"] if row["done"]] == ["score"]
        with pytest.raises(DnoError, match="in use by process"), RunDir(URL).written():  # as `dno pair` does
            raise AssertionError("let in")
    looking.status(URL, as_json=True)
    assert json.loads(capsys.readouterr().out)["in_use_by"] is None
    with pytest.raises(DnoError, match=rf"^{URL}-other: no run directory \(it has no config.yaml or its bucket is not"):
        looking.status(f"{URL}-other")
    with pytest.raises(DnoError, match=r"is not judged|nothing has"):
        read_verdicts(RunDir(URL), [0])


def test_a_reader_beside_the_run_on_its_own_machine_leaves_its_files_alone(bucket, machine, monkeypatch):
    run_dir = RunDir(URL)
    with run_dir.held():
        begin(run_dir)
        run_dir.bucket._mirror.commit()
        run_dir.append_metrics({"step": 0})
        begin(run_dir, shards=2)
        machine("first")  # another process of it
        assert RunDir(URL).path == run_dir.path
        RunDir(URL).load_config()
        RunDir(URL).bucket.bring(run_dir.path / "policies")
        assert len(run_dir.read_metrics()) == 1
        assert len(run_dir.stage("score", 0).shard_names()) == 2


def test_who_reads_weights_that_are_here_waits_for_no_upload(bucket, machine, monkeypatch):
    """Nor does who ends a stage: an upload may take as long as a store that does not answer."""
    run_dir, reached, go_on = RunDir(URL), threading.Event(), threading.Event()
    kept = store.Store.upload

    def slow(self, name, path):
        reached.set()
        assert go_on.wait(60)
        kept(self, name, path)

    monkeypatch.setattr(store.Store, "upload", slow)
    with run_dir.held():
        begin(run_dir).finish(config(), inputs={}, rows=1, seconds=0.1)
        assert reached.wait(60)
        bring(run_dir.policy(0))
        run_dir.fetch()
        begin(run_dir, shards=2).finish(config(), inputs={}, rows=2, seconds=0.1)
        run_dir.load_config()
        go_on.set()
    assert "iterations/000/reference/0000001.jsonl" in json.loads(bucket.cat_file(INDEX))["files"]


async def _paid(verdicts):
    paid = Receipt(".", "gpt", requests=1, usd=0.5)
    await verdicts.put("a", Verdict("ok", (6.0, 1.0), tries=1), judge="openai gpt", prompt_id="p", paid=paid)
    await verdicts.put("b", Verdict("refused", tries=1), judge="openai gpt", prompt_id="p", paid=paid)


def test_verdicts_are_listed_exported_and_purged_there(bucket, machine, tmp_path, capsys):
    import asyncio

    run_dir = RunDir(URL)
    with run_dir.held():
        begin(run_dir)
        with closing(VerdictStore(run_dir.annotations_path)) as verdicts:
            asyncio.run(_paid(verdicts))
    machine("second")
    annotations.list_(URL)
    assert "openai gpt" in capsys.readouterr().out
    annotations.export(URL, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 2
    annotations.purge(URL, state="refused", yes=True)
    machine("third")
    annotations.export(URL, tmp_path / "left.jsonl")
    assert (tmp_path / "left.jsonl").read_text().count("\n") == 1


def test_what_stopped_the_work_stands_and_what_was_made_is_uploaded(bucket, machine, monkeypatch, capsys):
    run_dir = RunDir(URL)

    def interrupted(shards):
        begin(run_dir, shards=shards)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), run_dir.held():
        interrupted(1)
    assert "iterations/000/reference/0000000.jsonl" in json.loads(bucket.cat_file(INDEX))["files"]

    def gone(self, name, path):
        raise store.Unreachable("gone for now")

    monkeypatch.setattr(store.Store, "upload", gone)
    with pytest.raises(KeyboardInterrupt), run_dir.held():
        interrupted(2)
    assert "warning: gone for now" in capsys.readouterr().err


@pytest.mark.parametrize("sees", [True, False])
def test_processes_that_do_not_see_one_folder_are_refused(bucket, machine, monkeypatch, sees):
    """Process 0 of two, and process 1: by what they would see of each other."""
    run_dir = RunDir(URL)
    run_dir.path.mkdir(parents=True)
    fake = SimpleNamespace(process_count=lambda: 2, process_index=lambda: 1)
    monkeypatch.setattr(disk, "jax", fake)
    monkeypatch.setattr(disk, "broadcast_from_primary", lambda values: 7)
    monkeypatch.setattr(disk, "barrier", lambda name: None)
    monkeypatch.setattr(disk, "is_primary", lambda: False)
    if sees:
        (run_dir.path / ".processes-7").write_text("")
        disk.refuse_apart(run_dir)
        return
    with pytest.raises(DnoError, match=rf"run_dir {URL}: process 1 does not see .*set DNO_SCRATCH"):
        disk.refuse_apart(run_dir)
    monkeypatch.setattr(disk, "is_primary", lambda: True)
    disk.refuse_apart(run_dir)
    assert not list(run_dir.path.glob(".processes-*"))


def test_nobody_can_annotate_apart_there():
    judge = {"kind": "openai", "apart": True, "store": "/tmp/a.sqlite"}
    with pytest.raises(DnoError, match=r"annotation\.apart=true with run_dir=memory://"):
        config(annotation=judge)


def test_metrics_go_up_in_parts_of_which_one_grows(bucket, machine, tmp_path, monkeypatch):
    """What an upload sends does not grow with the run, and other machines read one sequence."""
    monkeypatch.setattr(run_dir_module, "_METRICS_BYTES", 1 << 11)
    run_dir, written = RunDir(URL), []

    def step(number):
        written.append({"iteration": number // 200, "stage": "train", "step": number % 200, "loss": 0.1 * number})
        run_dir.append_metrics(written[-1])

    with run_dir.held():
        run_dir.create(config())
        objects, sizes = run_dir.bucket._mirror.store, []
        for number in range(300):
            step(number)
            if number % 25 == 24:
                before = objects.sent_objects, objects.sent_bytes
                run_dir.bucket._mirror.commit()
                sizes.append((objects.sent_objects - before[0], objects.sent_bytes - before[1]))
        assert all(count <= 3 for count, _ in sizes[1:])
        assert max(sent for _, sent in sizes[1:]) < (1 << 11) + 26 * 80
        assert sum(path.stat().length for path in run_dir.metrics_paths()) > 8 * (1 << 11)
        assert run_dir.read_metrics() == written
        run_dir.forget_metrics(iteration=1, stage="train", from_step=7)  # as a restart does, across files
        del written[207:]
        step(207)
    machine("second")
    other = RunDir(URL)
    other.fetch()
    assert other.read_metrics() == written
    assert len(other.metrics_paths()) > 3
    with other.held():
        other.append_metrics({"iteration": 2, "step": 0})
        assert other.read_metrics() == [*written, {"iteration": 2, "step": 0}]
    copied = RunDir(shutil.copytree(other.path, tmp_path / "copied"))  # a folder of a file system goes on in its last
    copied.append_metrics({"iteration": 3, "step": 0})
    assert copied.read_metrics()[-2:] == [{"iteration": 2, "step": 0}, {"iteration": 3, "step": 0}]
    assert copied.metrics_paths() == [copied.path / path.relative_to(other.path) for path in other.metrics_paths()]
