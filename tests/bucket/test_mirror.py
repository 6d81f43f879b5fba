"""A folder and a bucket kept the same: what is sent, in which order, and what a machine that is behind does."""

import json
import shutil
import sqlite3
import threading
from contextlib import closing

import pytest

from dno_jax.bucket import local, mirror, store
from dno_jax.bucket.mirror import INDEX
from dno_jax.bucket.work import Bucket, bring, of_path
from dno_jax.errors import DnoError

URL = "memory://pail/runs/mine"
BIG = b"0123456789abcdef" * (1 << 15)  # more than what counts as light


def write(bucket, **files):
    for name, content in files.items():
        path = bucket.folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in local.signs(folder)}


def objects(files):
    """What lies in the bucket, but for the index."""
    start = "/pail/runs/mine/"
    found = {name.removeprefix(start): file.getvalue() for name, file in files.store.items() if name.startswith(start)}
    return {name: content for name, content in found.items() if not name.startswith(".")}


def calls(bucket, monkeypatch, *names):
    """Note what is asked of the bucket from here on, as (method, name)."""
    noted = []
    kept = bucket._mirror.store

    def noting(method, original):
        def called(name, *rest, **options):
            noted.append((method, name))
            return original(name, *rest, **options)

        return called

    for method in names:
        monkeypatch.setattr(kept, method, noting(method, getattr(kept, method)))
    return noted


def iteration(bucket):
    """Files as stages write them."""
    write(
        bucket,
        **{
            "config.yaml": "a: 1\n",
            "metrics.jsonl": '{"step": 0}\n',
            "iterations__000__rollouts__0000000.jsonl": "{}\n",
            "iterations__000__rollouts__MANIFEST.json": "{}",
            "policies__000__params__d__0": BIG,
            "policies__000__FINGERPRINT": "0" * 64,
        },
    )


def test_what_one_machine_has_made_another_one_finds(bucket, machine):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
    made = contents(one.folder)
    assert objects(bucket) == made
    machine("second")
    two = Bucket.of(URL)
    assert two.folder != one.folder
    with two.working(weights=True):
        assert contents(two.folder) == made
        write(two, metrics__x="")
        (two.folder / "metrics" / "x").unlink()
        write(two, **{"metrics.jsonl": '{"step": 0}\n{"step": 1}\n', "report.html": "<p>"})
        (two.folder / "iterations/000/rollouts/MANIFEST.json").unlink()
    machine("first")
    with Bucket.of(URL).working(weights=True):
        assert contents(one.folder) == contents(two.folder)
    assert objects(bucket) == contents(two.folder)


def test_marks_and_the_index_come_last(bucket, machine, monkeypatch):
    """At every moment the bucket shows no manifest whose shards are not there, nor an index of files that are not."""
    one = Bucket.of(URL)
    seen = []

    def look(name, *rest, _original=one._mirror.store.upload):
        _original(name, *rest)
        seen.append((name, set(objects(bucket))))

    monkeypatch.setattr(one._mirror.store, "upload", look)
    with one.working(weights=True):
        iteration(one)
    order = [name for name, _ in seen]
    assert len(order) == 6
    marks = [name for name in order if local.is_mark(name)]
    assert order[-2:] == marks
    for name, there in seen:
        if name in marks:
            assert {"iterations/000/rollouts/0000000.jsonl", "policies/000/params/d/0", "metrics.jsonl"} <= there


def test_an_upload_that_is_cut_changes_nothing_for_readers_and_sends_nothing_twice(bucket, machine, monkeypatch):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
    before = json.loads(bucket.cat_file(f"{URL}/{INDEX}"))
    sent = one._mirror.store.sent_bytes
    write(one, iterations__000__pairs__a="a", iterations__000__pairs__b=BIG, iterations__000__pairs__z="z")
    kept = one._mirror.store.upload

    def dies(name, path):
        if name.endswith("z"):
            raise store.Unreachable("gone")
        kept(name, path)

    monkeypatch.setattr(one._mirror.store, "upload", dies)
    with pytest.raises(store.Unreachable), one.working(weights=True):
        pass
    assert json.loads(bucket.cat_file(f"{URL}/{INDEX}")) == before
    machine("second")
    reader = Bucket.of(URL)
    reader.fetch()
    assert "iterations/000/pairs/a" not in contents(reader.folder)
    machine("first")
    again = Bucket.of(URL)  # a new process
    noted = calls(again, monkeypatch, "upload")
    with again.working(weights=True):
        pass
    assert noted == [("upload", "iterations/000/pairs/z")]
    assert objects(bucket) == contents(one.folder)
    assert sent > len(BIG)


class Killed(BaseException):
    """As by kill -9: nothing of ours is done after it."""


@pytest.mark.parametrize("written", [True, False])
def test_a_kill_as_the_index_is_written_costs_nothing(bucket, machine, monkeypatch, capsys, written):
    one = Bucket.of(URL)
    kept = one._mirror.store.write

    def dies(name, data, **options):
        if name == INDEX:
            if written:
                kept(name, data, **options)
            raise Killed
        kept(name, data, **options)

    def works():
        iteration(one)
        monkeypatch.setattr(one._mirror.store, "write", dies)

    with pytest.raises(Killed), one.working(weights=True):
        works()
    assert bucket.exists(f"{URL}/{INDEX}") == written
    machine("first")
    again = Bucket.of(URL)
    noted = calls(again, monkeypatch, "upload", "download")
    with again.working(weights=True):
        pass
    assert not noted
    assert objects(bucket) == contents(one.folder)
    assert "elsewhere" not in capsys.readouterr().err


def test_folders_that_are_empty_elsewhere_go_here_too(bucket, machine):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
        write(one, policies__001__params__d=BIG, policies__001__FINGERPRINT="1")
    machine("second")
    with Bucket.of(URL).working(weights=True):
        shutil.rmtree(Bucket.of(URL).folder / "policies" / "001")
    machine("first")
    Bucket.of(URL).fetch()
    assert not (one.folder / "policies" / "001").exists()
    assert (one.folder / "policies" / "000").exists()


def test_a_damaged_store_of_verdicts_is_said_and_all_else_uploaded(bucket, machine):
    one = Bucket.of(URL)
    iteration(one)
    write(one, **{"annotations.sqlite": "no database at all" * 99})
    said = r"annotations\.sqlite: file is not a database; it cannot be uploaded"
    with pytest.raises(DnoError, match=said), one.working(weights=True):
        pass
    assert "iterations/000/rollouts/0000000.jsonl" in objects(bucket)


def test_a_store_that_is_gone_is_waited_for_once_and_not_for_every_file(bucket, machine, monkeypatch):
    one = Bucket.of(URL)
    asked, cancelled = [], threading.Event()

    class Pool(mirror.ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            if cancel_futures:
                cancelled.set()
            super().shutdown(wait=wait)

    def gone(name, path):
        asked.append(name)
        if len(asked) > 1:
            cancelled.wait(20)  # they hang for as long as the store does
        raise store.Unreachable("gone")

    monkeypatch.setattr(mirror, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(one._mirror.store, "upload", gone)
    write(one, **{f"iterations__000__rollouts__{number:07d}.jsonl": f"{number}" for number in range(100)})
    with pytest.raises(store.Unreachable), one.working(weights=True):
        pass
    assert len(asked) <= 2 * mirror._AT_ONCE


def test_nothing_is_sent_twice_and_what_moves_is_copied(bucket, machine, monkeypatch):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
    noted = calls(one, monkeypatch, "upload", "copy", "remove", "download", "write")
    with one.working(weights=True):
        (one.folder / "policies/000/params/d/0").touch()
    assert noted == [("remove", ".dno/lock.json")]
    noted.clear()
    with one.working(weights=True):
        (one.folder / "policies").rename(one.folder / "aside")
    assert sorted(noted) == [
        ("copy", "policies/000/FINGERPRINT"),
        ("copy", "policies/000/params/d/0"),
        ("remove", ".dno/lock.json"),
        ("remove", "policies/000/FINGERPRINT"),
        ("remove", "policies/000/params/d/0"),
        ("write", INDEX),
    ]
    assert objects(bucket) == contents(one.folder)


def test_what_is_moved_and_made_anew_at_once_keeps_both(bucket, machine):
    """A policy that is set aside and trained again has files of the same names; none is a copy of the wrong one."""
    one = Bucket.of(URL)
    for again in (False, True):
        with one.working(weights=True):
            iteration(one)
            if again:
                (one.folder / "policies").rename(one.folder / "aside")
                write(one, policies__000__params__d__0=BIG[::-1], policies__000__FINGERPRINT="1" * 64)
    assert objects(bucket) == contents(one.folder)
    bucket.rm_file(f"{URL}/aside/000/FINGERPRINT")  # by hand: what is no more there is no source of copies
    with one.working(weights=True):
        (one.folder / "aside").rename(one.folder / "export")
    assert objects(bucket) == contents(one.folder)


def test_weights_are_left_there_until_somebody_reads_them(bucket, machine):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
        write(one, iterations__000__train__states__1__d=BIG, aside__0__policies__000__d=BIG, export__model=BIG)
    machine("second")
    two = Bucket.of(URL)
    two.fetch()
    heavy = {n for n, content in objects(bucket).items() if content == BIG}
    assert len(heavy) == 4
    assert set(contents(two.folder)) == set(objects(bucket)) - heavy
    bring(two.folder / "policies" / "000")
    assert contents(two.folder)["policies/000/params/d/0"] == BIG
    with two.working(weights=False):  # what it has not, is not deleted there
        write(two, suites__a="a")
    assert heavy <= set(objects(bucket))
    assert heavy <= set(json.loads(bucket.cat_file(f"{URL}/{INDEX}"))["files"])
    machine("third")
    with Bucket.of(URL).working(weights=True):
        here = set(contents(Bucket.of(URL).folder))
        assert heavy - here == {"aside/0/policies/000/d", "export/model"}
    assert of_path(two.folder) is None
    assert of_path(Bucket.of(URL).folder / "policies") is Bucket.of(URL)


def test_a_machine_whose_work_was_never_uploaded_keeps_it_aside_when_the_run_has_gone_on(bucket, machine, capsys):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
    write(one, iterations__000__pairs__mine="computed here")  # killed
    with one.working(weights=True):  # nobody else was there: it is ahead
        assert (one.folder / "iterations/000/pairs/mine").exists()
    write(one, iterations__000__pairs__lost="computed here")
    machine("second")
    with Bucket.of(URL).working(weights=True):
        write(Bucket.of(URL), iterations__000__pairs__other="computed there")
    machine("first")
    with Bucket.of(URL).working(weights=True):
        found = contents(one.folder)
        assert "iterations/000/pairs/lost" not in found
        assert "iterations/000/pairs/other" in found
    kept = one.folder.with_name("mine.aside-0")
    assert (kept / "iterations/000/pairs/lost").read_text() == "computed here"
    assert f"they are kept in {kept}" in " ".join(capsys.readouterr().err.split())


def test_who_only_reads_is_no_work_of_its_own(bucket, machine):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
        with closing(sqlite3.connect(one.folder / "annotations.sqlite")) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE verdicts (a)")
    machine("second")
    two = Bucket.of(URL)
    two.fetch()
    write(two, **{"report.html": "<p>", "report__a.csv": "1"})
    with closing(sqlite3.connect(two.folder / "annotations.sqlite")) as connection:
        connection.execute("SELECT * FROM verdicts").fetchall()
    (two.folder / "config.yaml").touch()
    machine("first")
    with Bucket.of(URL).working(weights=True):
        write(Bucket.of(URL), new="1")
    machine("second")
    Bucket.of(URL).fetch()
    assert not two.folder.with_name("mine.aside-0").exists()
    assert "new" in contents(two.folder)
    assert "report.html" not in contents(two.folder)


def test_verdicts_are_uploaded_whole_while_they_are_written(bucket, machine):
    """The database goes up by sqlite's own backup: what is committed, journal and all."""
    one = Bucket.of(URL)
    with one.working(weights=True), closing(sqlite3.connect(one.folder / "annotations.sqlite")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE verdicts (a)")
        connection.executemany("INSERT INTO verdicts VALUES (?)", [(n,) for n in range(100)])
        connection.commit()
        connection.execute("INSERT INTO verdicts VALUES (-1)")  # not committed
        one._mirror.commit()
        machine("second")
        reader = Bucket.of(URL)
        reader.fetch()
        with closing(sqlite3.connect(reader.folder / "annotations.sqlite")) as copy:
            assert copy.execute("SELECT count(*), min(a) FROM verdicts").fetchone() == (100, 0)
            assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not [name for name in objects(bucket) if name.endswith(("-wal", "-shm"))]
    machine("first")


def test_what_is_removed_by_hand_on_one_machine_comes_back(bucket, machine):
    """A cleaner of old files must not clean the bucket."""
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
    made = contents(one.folder)
    (one.folder / "iterations/000/rollouts/0000000.jsonl").unlink()
    with one.working(weights=True):
        assert contents(one.folder) == made
        (one.folder / "iterations/000/rollouts/0000000.jsonl").unlink()  # by the run
    assert "iterations/000/rollouts/0000000.jsonl" not in objects(bucket)


def test_a_fetch_that_is_cut_goes_on_where_it_was(bucket, machine, monkeypatch):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
    machine("second")
    two, noted = Bucket.of(URL), []
    kept = two._mirror.store.download

    def dies(name, path):
        if name.endswith("metrics.jsonl"):
            raise store.Unreachable("gone")
        kept(name, path)

    monkeypatch.setattr(two._mirror.store, "download", dies)
    with pytest.raises(store.Unreachable):
        two.fetch(weights=True)
    assert not any(map(local.is_mark, contents(two.folder)))  # no finished stage either
    monkeypatch.setattr(two._mirror.store, "download", lambda name, path: (noted.append(name), kept(name, path)))
    two.fetch(weights=True)
    assert contents(two.folder) == contents(one.folder)
    assert "policies/000/params/d/0" not in noted
    assert not two.folder.with_name("mine.aside-0").exists()


def test_a_directory_that_was_copied_there_is_taken_as_it_is_listed(bucket, machine):
    for name, content in {"config.yaml": b"a: 1\n", "iterations/000/pairs/a.parquet": b"1"}.items():
        bucket.pipe_file(f"{URL}/{name}", content)
    one = Bucket.of(URL)
    one.fetch()
    assert contents(one.folder) == objects(bucket)
    with one.working(weights=True):
        write(one, new="1")
    assert set(json.loads(bucket.cat_file(f"{URL}/{INDEX}"))["files"]) == set(objects(bucket))


def test_a_bucket_that_was_emptied_is_filled_anew(bucket, machine, capsys):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
    bucket.store.clear()
    with one.working(weights=True):
        pass
    assert objects(bucket) == contents(one.folder)
    assert "uploaded anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"iterations/000/rollouts/0000000.jsonl": b"[]\n"}, "not as it was uploaded"),
        ({"iterations/000/rollouts/0000000.jsonl": b""}, "not as it was uploaded"),
        ({"iterations/000/rollouts/0000000.jsonl": None}, "gone, and the bucket's index names it"),
        ({INDEX: b"{"}, "damaged, or of another version"),
        ({INDEX: b'{"format": 9}'}, "format 9"),
        ({INDEX: b'{"format": 1, "commit": "a", "files": {"../../x": [1, "a"]}}'}, "names '../../x'"),
        ({INDEX: b'{"format": 1, "commit": "a", "files": {"a": 3}}'}, "damaged"),
    ],
)
def test_what_is_not_as_it_was_uploaded_is_refused(bucket, machine, change, said):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
    for name, content in change.items():
        if content is None:
            bucket.rm_file(f"{URL}/{name}")
        else:
            bucket.pipe_file(f"{URL}/{name}", content)
    machine("second")
    with pytest.raises(DnoError, match=said) as caught:
        Bucket.of(URL).fetch()
    assert URL in str(caught.value)


def test_figures_that_an_upload_was_cut_after_are_taken_as_they_are(bucket, machine):
    one = Bucket.of(URL)
    with one.working(weights=True):
        iteration(one)
    bucket.pipe_file(f"{URL}/metrics.jsonl", b'{"step": 0}\n{"step": 1}\n')
    machine("second")
    Bucket.of(URL).fetch()
    assert (Bucket.of(URL).folder / "metrics.jsonl").read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    ("name", "weights", "in_place"),
    [
        ("policies/000/params/d/0", True, False),
        ("iterations/003/train/states/40/default/d/0", True, False),
        ("states/40/default/d/0", True, False),  # of sft and reward
        ("export/model-00001-of-00002.safetensors", True, False),
        ("aside/0/iterations/000/rollouts/0000000.jsonl", True, False),
        ("iterations/000/rollouts/0000000.jsonl", False, False),
        ("iterations/000/pairs/new.parquet", False, False),
        ("annotations.sqlite", False, True),
        ("metrics.jsonl", False, True),
        ("tensorboard/train_000/events.out.tfevents.1", False, True),
        ("report.html", False, True),
    ],
)
def test_what_is_large_and_what_is_written_again(name, weights, in_place):
    assert local.is_weights(name, 1 << 30) == weights
    assert not local.is_weights(name, 10)
    assert local.changes_in_place(name) == in_place


def test_what_is_somebodys_own_stays_here(tmp_path):
    kept = ["a/MANIFEST.json", "policies/000/params/w/.zarray"]
    own = [
        ".lock",
        "a/.b.jsonl.12.tmp",
        "annotations.sqlite-wal",
        "annotations.sqlite-shm",
        ".export.partial/config.json",
    ]
    own += ["policies/001/params.orbax-checkpoint-tmp-1/d/0", ".bucket.json", ".processes-7", ".export.partial/a"]
    for name in [*kept, *own]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert sorted(local.signs(tmp_path)) == kept
