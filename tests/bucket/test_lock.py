"""Who works on a path of a bucket: one at a time, and what a dead one leaves is taken over."""

import json
import os
import threading
import time

import pytest

from dno_jax.bucket import lock, store, work
from dno_jax.bucket.lock import LOCK, Lost
from dno_jax.bucket.work import Bucket
from dno_jax.errors import DnoError

URL = "memory://pail/runs/mine"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(work, "BEAT_SECONDS", 0.05)


def held_by(bucket, *, age, who="process 7 on pod-0"):
    held = {"owner": "o", "who": who, "folder": "/elsewhere", "beat": time.time() - age}
    bucket.pipe_file(f"{URL}/{LOCK}", json.dumps(held).encode())


def test_a_second_one_is_refused_while_the_first_lives(bucket, machine):
    with Bucket.of(URL).working(weights=True):
        machine("second")
        second = Bucket.of(URL)
        assert second.holder().startswith("process ")
        said = rf"run_dir {URL}: in use by process \d+ on .*; wait until it ends"
        with pytest.raises(DnoError, match=said), second.working(weights=True):
            raise AssertionError("let in")
    assert second.holder() is None
    assert not bucket.exists(f"{URL}/{LOCK}")
    with Bucket.of(URL).working(weights=True):
        pass


def test_a_dead_one_is_waited_for_and_taken_over(bucket, machine, monkeypatch, capsys):
    held_by(bucket, age=1000.0)
    with Bucket.of(URL).working(weights=True):
        pass
    assert "taken over from process 7 on pod-0" in capsys.readouterr().err
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    held_by(bucket, age=0.2)
    with Bucket.of(URL).working(weights=True):
        assert "process 7" not in bucket.cat_file(f"{URL}/{LOCK}").decode()
    said = " ".join(capsys.readouterr().err.split())
    assert "waiting whether there is another" in said


def test_one_that_gives_it_back_meanwhile_is_followed_at_once(bucket, machine, capsys):
    held_by(bucket, age=0.0)
    threading.Timer(0.1, bucket.rm_file, [f"{URL}/{LOCK}"]).start()
    with Bucket.of(URL).working(weights=True):
        assert f"process {os.getpid()} on" in bucket.cat_file(f"{URL}/{LOCK}").decode()
    said = capsys.readouterr().err
    assert "held by process 7 on pod-0" in " ".join(said.split())
    assert "taken over" not in said  # nobody waited until it was stale


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"owner": 3, "who": ["\\u001b[31m"], "beat": "x"}'])
def test_a_lock_that_is_no_lock_is_nobodys(bucket, machine, text):
    bucket.pipe_file(f"{URL}/{LOCK}", text)
    with Bucket.of(URL).working(weights=True):
        assert "owner" in json.loads(bucket.cat_file(f"{URL}/{LOCK}"))


def test_of_two_that_take_over_at_once_one_works(bucket, machine, monkeypatch):
    """The store makes objects whatever is there, as emulators do: who reads back another one's, has lost."""
    held_by(bucket, age=1000.0)
    kept = store.Store.write

    def overtaken(self, name, data, **options):
        kept(self, name, data, **options)
        if name == LOCK:
            held_by(bucket, age=0.0, who="process 8 on pod-1")

    monkeypatch.setattr(store.Store, "write", overtaken)
    with pytest.raises(DnoError, match="in use by process 8 on pod-1"), Bucket.of(URL).working(weights=True):
        raise AssertionError("let in")


def test_who_was_taken_over_uploads_nothing_more(bucket, machine, monkeypatch):
    one = Bucket.of(URL)

    def works():
        held_by(bucket, age=0.0)
        (one.folder / "config.yaml").write_text("a: 1\n")
        deadline = time.monotonic() + 20
        while one._lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        one.changed()  # the next stage that ends

    with pytest.raises(Lost, match=r"taken over by process 7 on pod-0") as caught, one.working(weights=True):
        works()
    assert str(one.folder) in str(caught.value)
    assert not bucket.exists(f"{URL}/.dno/index.json")
    assert "pod-0" in bucket.cat_file(f"{URL}/{LOCK}").decode()  # the other's is left alone


def test_an_index_is_written_by_the_holder_alone(bucket, machine, monkeypatch):
    monkeypatch.setattr(work, "BEAT_SECONDS", 1000.0)  # it has not noticed yet
    one = Bucket.of(URL)

    def works():
        (one.folder / "config.yaml").write_text("a: 1\n")
        held_by(bucket, age=0.0)

    with pytest.raises(Lost), one.working(weights=True):
        works()
    assert not bucket.exists(f"{URL}/.dno/index.json")
