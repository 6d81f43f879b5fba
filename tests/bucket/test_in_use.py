"""Run directories in a bucket as the commands meet them: one seam, whoever reads or writes."""

import json
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

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
    with pytest.raises(DnoError, match="no run directory"):
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
