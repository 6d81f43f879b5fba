"""The store: committed on arrival, answers kept for ever, failures never an answer."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from dno_jax.annotation import store as store_module
from dno_jax.annotation.store import Verdict, VerdictStore
from dno_jax.errors import DnoError

OK = Verdict("ok", scores=(1, 6), raw="{...}", model="m-1", tries=2, tokens_in=10, tokens_out=5)
FAILED = Verdict("failed", detail="HTTP 500", tries=3, tokens_in=1, tokens_out=0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "annotations.sqlite"


@pytest.fixture
def store(path):
    store = VerdictStore(path)
    yield store
    store.close()


def put(store: VerdictStore, key: str, verdict: Verdict) -> Verdict:
    return store.put(key, verdict, judge="j", prompt_id="p")


def test_an_answer_comes_back_as_it_went_in_also_after_reopening(store, path):
    assert store.get("k") is None
    assert put(store, "k", OK) == OK
    assert store.get("k") == OK
    other = VerdictStore(path)
    assert other.get("k") == OK
    other.close()


@pytest.mark.parametrize("state", ["refused", "unparsable", "failed"])
def test_what_failed_is_remembered_and_is_no_answer(store, state):
    verdict = Verdict(state, raw="no", detail="why", tries=5)
    assert put(store, "k", verdict) == verdict
    assert store.get("k") is None
    assert store.look("k") == verdict


def test_tries_add_up_over_runs(store):
    put(store, "k", FAILED)
    put(store, "k", FAILED)
    put(store, "k", OK)
    assert (store.look("k").tries, store.look("k").tokens_in) == (8, 12)
    assert store.totals() == {"ok": 1, "tries": 8, "tokens_in": 12, "tokens_out": 5}


def test_an_answer_is_never_replaced(store):
    put(store, "k", OK)
    assert put(store, "k", FAILED) == OK
    assert put(store, "k", Verdict("ok", scores=(6, 1))) == OK
    assert store.get("k") == OK


def test_a_verdict_without_scores_is_no_answer_and_no_failure_has_scores():
    with pytest.raises(ValueError, match="an answer has scores"):
        Verdict("ok")
    with pytest.raises(ValueError, match="an answer has scores"):
        Verdict("failed", scores=(1, 2))


def test_it_is_durable_and_open_to_people(store, path):
    put(store, "k", FAILED)
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    reader = sqlite3.connect(path)
    row = reader.execute("SELECT judge, prompt_id, state, scores, detail, created_at FROM verdicts").fetchone()
    reader.close()
    assert row[:5] == ("j", "p", "failed", None, "HTTP 500")
    assert row[5].endswith("Z")


WRITER = """
import sys
from dno_jax.annotation.store import Verdict, VerdictStore
store = VerdictStore(sys.argv[1])
for number in range(int(sys.argv[3])):
    store.put(f"{sys.argv[2]}-{number}", Verdict("ok", scores=(number, 6), tries=1), judge="j", prompt_id="p")
    print(number, flush=True)
store.close()
"""


def writer(path, name: str, rows: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(rows)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_create_and_fill_it_at_once(path):
    writers = [writer(path, name, 60) for name in ("a", "b", "c")]
    for process in writers:
        process.communicate(timeout=60)
    assert [process.returncode for process in writers] == [0, 0, 0]
    store = VerdictStore(path)
    assert store.totals()["ok"] == 180
    store.close()


def test_kill_9_loses_nothing_that_was_reported(path):
    with writer(path, "a", 1_000_000) as process:
        for _ in range(200):
            reported = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        reported = int(([str(reported), *process.stdout.read().split("\n")[:-1]])[-1])
    store = VerdictStore(path)
    assert all(store.get(f"a-{number}") is not None for number in range(reported + 1))
    assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.close()


def test_a_file_that_is_no_database_is_refused_with_the_fix(path):
    path.write_text("these are not the verdicts you look for" * 100)
    with pytest.raises(DnoError, match=r"not a sound database.*move it away"):
        VerdictStore(path)
    assert path.read_text().startswith("these")


def test_a_damaged_file_is_reported_when_it_is_read(path):
    store = VerdictStore(path)
    for number in range(200):
        put(store, str(number), Verdict("ok", scores=(1, 2), raw="x" * 500))
    store.close()
    data = bytearray(path.read_bytes())
    data[8192:] = b"\xff" * (len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(DnoError, match="salvage it"), closing(VerdictStore(path)) as broken:
        [broken.get(str(number)) for number in range(200)]


def test_a_row_of_someone_elses_is_refused(store):
    put(store, "k", OK)
    store._connection.execute("UPDATE verdicts SET scores = '[1, \"six\"]'")
    with pytest.raises(DnoError, match="never wrote"):
        store.get("k")


def test_another_version_is_refused(store, path):
    store._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(DnoError, match="version 99"):
        VerdictStore(path)


def test_a_held_lock_is_reported_with_the_fix(store, path, monkeypatch):
    monkeypatch.setattr(store_module, "_LOCK_SECONDS", 0.05)
    second = VerdictStore(path)
    store._connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(DnoError, match="another process"):
        put(second, "k", OK)
    store._connection.execute("ROLLBACK")
    assert put(second, "k", OK) == OK
    second.close()


@pytest.mark.parametrize("where", ["no/such/directory/a.sqlite", "."])
def test_a_path_that_cannot_be_opened(tmp_path, where):
    with pytest.raises(DnoError, match="can be written"):
        VerdictStore(tmp_path / where)


def test_an_object_store_is_refused():
    with pytest.raises(DnoError, match="object store"):
        VerdictStore("gs://bucket/annotations.sqlite")
