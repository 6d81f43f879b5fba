"""The store: committed on arrival, answers kept for ever, failures never an answer, what was paid never forgotten."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from dno_jax.annotation.ledger import database
from dno_jax.annotation.ledger.store import Receipt, VerdictStore
from dno_jax.annotation.question import Verdict
from dno_jax.annotation.transport.batch_api import BatchStore, OpenBatch
from dno_jax.errors import DnoError

OK = Verdict("ok", (1.0, 6.0), raw="{...}", model="m-1", tries=2, tokens_in=10, tokens_out=5, usd=0.25)
TIE = Verdict("tie", (0.5, 0.5), tries=1)
FAILED = Verdict("failed", detail="HTTP 500", tries=3, tokens_in=1, tokens_out=0, usd=0.5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "annotations.sqlite"


@pytest.fixture
def store(path):
    with closing(VerdictStore(path)) as store:
        yield store


def receipt(verdict: Verdict, *, run: str = ".", model: str = "m", unmetered: int = 0) -> Receipt:
    return Receipt(run, model, verdict.tries, verdict.tokens_in, verdict.tokens_out, verdict.usd, unmetered)


def put_all(store: VerdictStore, verdicts: dict[str, Verdict], *, judge: str = "j", **paid) -> list[Verdict]:
    async def work() -> list[Verdict]:
        puts = (
            store.put(key, verdict, judge=judge, prompt_id="p", paid=receipt(verdict, **paid))
            for key, verdict in verdicts.items()
        )
        return await asyncio.gather(*puts)

    return asyncio.run(work())


def put(store: VerdictStore, key: str, verdict: Verdict, **fields) -> Verdict:
    return put_all(store, {key: verdict}, **fields)[0]


def kept(store: VerdictStore, key: str) -> Verdict:
    """All that is known of a request, a failure included."""
    (row,) = [row for row in store.rows() if row["key"] == key]
    names = ("state", "raw", "detail", "model", "tries", "tokens_in", "tokens_out", "usd")
    scores = None if row["scores"] is None else tuple(row["scores"])
    return Verdict(scores=scores, **{name: row[name] for name in names})


def states(store: VerdictStore) -> dict[str, int]:
    return {tally.state: tally.verdicts for tally in store.tallies()}


@pytest.mark.parametrize("verdict", [OK, TIE], ids=["ok", "tie"])
def test_an_answer_comes_back_as_it_went_in_also_after_reopening(store, path, verdict):
    assert store.get("k") is None
    assert put(store, "k", verdict) == verdict
    assert store.get("k") == verdict
    with closing(VerdictStore(path)) as other:
        assert other.get("k") == verdict


@pytest.mark.parametrize("state", ["refused", "unparsable", "failed"])
def test_what_failed_is_remembered_and_is_no_answer(store, state):
    verdict = Verdict(state, raw="no", detail="why", tries=5)
    assert put(store, "k", verdict) == verdict
    assert store.get("k") is None
    assert kept(store, "k") == verdict


def test_tries_tokens_and_dollars_add_up_over_runs(store):
    put(store, "k", FAILED)
    put(store, "k", FAILED)
    stands = put(store, "k", OK)
    assert stands == replace(OK, tries=8, tokens_in=12, usd=1.25)
    assert kept(store, "k") == stands


@pytest.mark.parametrize("answer", [OK, TIE], ids=["ok", "tie"])
def test_an_answer_is_never_replaced(store, answer):
    put(store, "k", answer)
    for later in (FAILED, Verdict("ok", (6.0, 1.0)), Verdict("tie", (0.5, 0.5), tries=9)):
        assert put(store, "k", later) == answer
    assert store.get("k") == answer


def test_what_was_paid_is_known_by_run_and_model_whichever_verdict_stands(store, path):
    put(store, "k", OK)
    put(store, "k", replace(OK, usd=1.0))  # a second answer is dropped, its price is not
    put(store, "l", FAILED, model="other", unmetered=3)
    put(store, "m", OK, run="../another")
    with closing(VerdictStore(path)) as other:
        assert other.receipts() == [
            Receipt(".", "m", 4, 20, 10, 1.25, 0),
            Receipt(".", "other", 3, 1, 0, 0.5, 3),
            Receipt("../another", "m", 2, 10, 5, 0.25, 0),
        ]
        assert other.spent(".") == 1.75
        assert other.spent("unheard of") == 0.0


def test_a_verdict_without_scores_is_no_answer_and_no_failure_has_scores():
    with pytest.raises(ValueError, match="an answer has scores"):
        Verdict("ok")
    with pytest.raises(ValueError, match="an answer has scores"):
        Verdict("failed", scores=(1.0, 2.0))


def test_it_is_durable_and_open_to_people(store, path):
    put(store, "k", FAILED)
    connection = store._database._writer
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    with closing(sqlite3.connect(path)) as reader:
        row = reader.execute("SELECT judge, prompt_id, state, scores, detail, created_at FROM verdicts").fetchone()
    assert row[:5] == ("j", "p", "failed", None, "HTTP 500")
    assert row[5].endswith("Z")


def test_what_arrives_during_a_commit_shares_the_next_one(store):
    """The lock is held by another while a hundred arrive: two commits bring them all, and none is reported before."""
    commits = []
    store._database._writer.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)

    async def work() -> None:
        with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            puts = [
                asyncio.ensure_future(store.put(str(n), OK, judge="j", prompt_id="p", paid=receipt(OK)))
                for n in range(100)
            ]
            await asyncio.sleep(0.05)
            assert not any(future.done() for future in puts)
            assert store.get("0") is None
            other.execute("ROLLBACK")
            await asyncio.gather(*puts)

    asyncio.run(work())
    assert all(store.get(str(n)) == OK for n in range(100))
    assert len(commits) <= 2


def test_what_arrived_is_committed_though_its_caller_is_gone(store):
    async def work() -> None:
        future = asyncio.ensure_future(store.put("k", OK, judge="j", prompt_id="p", paid=receipt(OK)))
        await asyncio.sleep(0)
        future.cancel()
        await asyncio.gather(future, return_exceptions=True)

    asyncio.run(work())
    put(store, "l", OK)
    assert store.get("k") == OK


WRITER = """
import asyncio, sys
from dno_jax.annotation.ledger.store import Receipt, VerdictStore
from dno_jax.annotation.question import Verdict

async def work(store):
    for first in range(0, int(sys.argv[3]), 4):
        group = range(first, first + 4)
        await asyncio.gather(*(
            store.put(f"{sys.argv[2]}-{n}", Verdict("ok", (n, 6.0), tries=1), judge="j", prompt_id="p",
                      paid=Receipt("r", "m", requests=1, usd=1.0))
            for n in group
        ))
        print(group[-1], flush=True)

store = VerdictStore(sys.argv[1])
asyncio.run(work(store))
store.close()
"""


def writer(path, name: str, rows: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(rows)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_create_and_fill_it_at_once(path):
    writers = [writer(path, name, 60) for name in ("a", "b", "c")]
    for process in writers:
        process.communicate(timeout=300)
    assert [process.returncode for process in writers] == [0, 0, 0]
    with closing(VerdictStore(path)) as store:
        assert states(store) == {"ok": 180}
        assert store.receipts() == [Receipt("r", "m", requests=180, usd=180.0)]


def test_opened_by_many_in_the_same_moment_it_waits(tmp_path):
    # sqlite's own timeout does not hold for a file's first change of its journal
    together = threading.Barrier(6)

    def make(number: int) -> None:
        together.wait()
        VerdictStore(tmp_path / f"{number}.sqlite").close()

    with ThreadPoolExecutor(6) as pool:
        for number in range(40):
            assert list(pool.map(make, [number] * 6)) == [None] * 6


def test_kill_9_loses_nothing_that_was_reported(path):
    with writer(path, "a", 1_000_000) as process:
        for _ in range(60):
            reported = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        reported = int(([str(reported), *process.stdout.read().split("\n")[:-1]])[-1])
    with closing(VerdictStore(path)) as store:
        assert all(store.get(f"a-{number}") is not None for number in range(reported + 1))
        # what was paid is known to the cent: verdicts and receipts are of the same transactions
        assert store.spent("r") == states(store)["ok"]
        assert store._database.read("PRAGMA integrity_check") == [("ok",)]


V1 = """
    CREATE TABLE verdicts (
        key TEXT PRIMARY KEY, judge TEXT NOT NULL, prompt_id TEXT NOT NULL, state TEXT NOT NULL, scores TEXT,
        raw TEXT NOT NULL, detail TEXT NOT NULL, model TEXT NOT NULL, tries INTEGER NOT NULL,
        tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, created_at TEXT NOT NULL
    );
    INSERT INTO verdicts VALUES ('k', 'j', 'p', 'ok', '[1, 6]', '{...}', '', 'm-1', 2, 10, 5, '2024-04-04T00:00:00Z');
    INSERT INTO verdicts VALUES ('l', 'j', 'p', 'failed', NULL, '', 'HTTP 500', '', 3, 1, 0, '2024-04-04T00:00:00Z');
"""


@pytest.mark.parametrize("version", [1, 0], ids=["as it was written", "as it was recovered"])
def test_a_file_of_the_first_version_is_brought_up_to_date_with_all_its_answers(path, version):
    with closing(sqlite3.connect(path)) as old:
        old.executescript(V1 + f"PRAGMA user_version = {version};")
    for _ in range(2):
        with closing(VerdictStore(path)) as store:
            assert store.get("k") == replace(OK, usd=0.0)
            assert (store.get("l"), kept(store, "l").tries) == (None, 3)
            assert store.receipts() == []
    with closing(VerdictStore(path)) as store:
        assert put(store, "l", TIE).tries == 4
        assert store.receipts() == [receipt(TIE)]


def test_bringing_a_file_up_to_date_is_all_or_nothing(path, monkeypatch):
    with closing(sqlite3.connect(path)) as old:
        old.executescript(V1 + "PRAGMA user_version = 1;")
    monkeypatch.setattr("dno_jax.annotation.ledger.store._RECEIPTS", "CREATE TABLE receipts (nonsense")
    with pytest.raises(DnoError):
        VerdictStore(path)
    with closing(sqlite3.connect(path)) as old:
        assert old.execute("PRAGMA user_version").fetchone() == (1,)
        assert "usd" not in {row[1] for row in old.execute("PRAGMA table_info(verdicts)")}
    monkeypatch.undo()
    with closing(VerdictStore(path)) as store:
        assert store.get("k") is not None


def test_a_file_that_is_no_database_is_refused_with_the_fix(path):
    path.write_text("these are not the verdicts you look for" * 100)
    with pytest.raises(DnoError, match=r"not a sound database.*`sqlite3 .* \.recover \| sqlite3 .*; or move it away"):
        VerdictStore(path)
    assert path.read_text().startswith("these")


BATCH = OpenBatch(token="t", url="http://here/v1", keys=("a", "b"))


def damaged(path) -> None:
    with closing(VerdictStore(path)) as store:
        store.remember_batch(BATCH)
        put_all(store, {str(number): replace(OK, raw="x" * 500) for number in range(200)})
    data = bytearray(path.read_bytes())
    data[65536:73728] = b"\xff" * 8192
    path.write_bytes(data)


def test_a_damaged_file_is_reported_when_it_is_read(path):
    damaged(path)
    with pytest.raises(DnoError, match="Recover what is whole"), closing(VerdictStore(path)) as broken:
        [broken.get(str(number)) for number in range(200)]


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="needs sqlite's shell")
@pytest.mark.parametrize("command", [".recover", ".dump | sed 's/^ROLLBACK; -- due to errors$/COMMIT;/'"])
def test_what_sqlite_recovers_of_a_damaged_file_is_a_store(path, command):
    """By the commands of docs/annotation.md."""
    damaged(path)
    recovered = path.with_name("recovered.sqlite")
    found = subprocess.run(
        f"sqlite3 {path} {command} | sqlite3 {recovered}", shell=True, check=False, capture_output=True, text=True
    )
    if "SQL logic error" in found.stderr:
        pytest.skip("this shell of sqlite is built without .recover")
    with closing(VerdictStore(recovered)) as store:
        verdicts = [store.get(str(number)) for number in range(200)]
        assert 100 < sum(verdict is not None for verdict in verdicts) < 200
        assert {verdict for verdict in verdicts if verdict} == {replace(OK, raw="x" * 500)}
        assert store.spent(".") == 200 * OK.usd
        assert store.open_batches() == [BATCH]
        put(store, "new", OK)


def test_a_full_disk_stops_it_and_loses_nothing_that_was_reported(path, store):
    limited = store._database._writer
    (pages,) = limited.execute("PRAGMA page_count").fetchone()
    limited.execute(f"PRAGMA max_page_count = {pages + 20}")
    reported: list[str] = []

    def fill() -> None:
        for number in range(1000):
            put(store, str(number), replace(OK, raw="x" * 2000))
            reported.append(str(number))

    with pytest.raises(DnoError, match=r"is full; see to the disk .*what was committed is kept"):
        fill()
    assert 10 < len(reported) < 100
    assert all(store.get(key) for key in reported)
    assert store.spent(".") == 0.25 * len(reported)
    limited.execute("PRAGMA max_page_count = 100000")  # there is room again, in the same process
    put(store, "later", OK)
    assert states(store) == {"ok": len(reported) + 1}


def test_a_row_of_someone_elses_is_refused(store):
    put(store, "k", OK)
    store._database._writer.execute("UPDATE verdicts SET scores = '[1, \"six\"]'")
    with pytest.raises(DnoError, match="never wrote"):
        store.get("k")


def test_another_version_is_refused(store, path):
    store._database._writer.execute("PRAGMA user_version = 99")
    with pytest.raises(DnoError, match=rf"{path}: a store of version 99"):
        VerdictStore(path)


def test_a_held_lock_is_reported_with_the_fix(store, path, monkeypatch):
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.05)
    with closing(VerdictStore(path)) as second:
        holder = store._database._writer
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(DnoError, match="another process"):
            put(second, "k", OK)
        holder.execute("ROLLBACK")
        assert put(second, "k", OK) == OK


@pytest.mark.parametrize("where", ["no/such/directory/a.sqlite", "."])
def test_a_path_that_cannot_be_opened(tmp_path, where):
    with pytest.raises(DnoError, match="can be written"):
        VerdictStore(tmp_path / where)


def test_an_object_store_is_refused():
    with pytest.raises(DnoError, match="object store"):
        VerdictStore("gs://bucket/annotations.sqlite")


def test_batches_are_remembered_until_they_are_closed(store, path):
    assert isinstance(store, BatchStore)
    other = OpenBatch(token="u", url="http://here/v1", keys=("c",), batch_id="batch-2")
    store.remember_batch(BATCH)
    store.remember_batch(other)
    made = replace(BATCH, batch_id="batch-1", keys=("b",))
    store.remember_batch(made)
    with closing(VerdictStore(path)) as again:
        assert sorted(again.open_batches(), key=lambda batch: batch.token) == [made, other]
        again.close_batch("t")
        again.close_batch("unheard of")
    assert store.open_batches() == [other]


def test_verdicts_are_counted_listed_and_purged_by_judge_and_state(store):
    put_all(store, {"a": OK, "b": FAILED}, judge="openai gpt-1")
    put_all(store, {"c": TIE, "d": FAILED}, judge="openai gpt-2")
    assert [(tally.judge, tally.state, tally.verdicts) for tally in store.tallies(judge="gpt-1")] == [
        ("openai gpt-1", "failed", 1),
        ("openai gpt-1", "ok", 1),
    ]
    assert [row["key"] for row in store.rows()] == ["a", "b", "c", "d"]
    assert [(row["scores"], row["usd"]) for row in store.rows(state="ok")] == [([1.0, 6.0], 0.25)]
    paid = store.receipts()
    assert store.purge(judge="gpt-2", state="failed") == 1
    assert store.purge(judge="gpt_") == 0  # a name, no pattern
    assert states(store) == {"failed": 1, "ok": 1, "tie": 1}
    assert store.purge() == 3
    assert store.receipts() == paid


def test_what_cannot_be_written_takes_no_other_verdict_with_it(store):
    bad = replace(FAILED, detail="a lone \ud800")

    async def work():
        puts = [
            store.put(key, verdict, judge="j", prompt_id="p", paid=receipt(verdict))
            for key, verdict in (("a", OK), ("b", bad), ("c", TIE))
        ]
        return await asyncio.gather(*puts, return_exceptions=True)

    first, second, third = asyncio.run(work())
    assert (first, third) == (OK, TIE)
    assert isinstance(second, UnicodeEncodeError)
    assert states(store) == {"ok": 1, "tie": 1}
