"""Buckets in memory, and machines that are folders."""

import pytest

from dno_jax.bucket import lock, place, work


@pytest.fixture
def bucket(monkeypatch):
    """The files of an empty bucket in this process's memory, by their whole names."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setitem(place.EXTRAS, "memory", "none")
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(work, "_folders", {})
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Be on the machine of a name: its scratch is a folder of its own, and it knows of nothing yet."""

    def on(name):
        monkeypatch.setenv("DNO_SCRATCH", str(tmp_path / name))
        work._folders.clear()

    on("first")
    return on
