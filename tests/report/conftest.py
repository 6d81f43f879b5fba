"""A made-up run, written once; tests that change it take a copy."""

from __future__ import annotations

import shutil

import pytest

from dno_jax.run_dir import RunDir
from tests.report.synthetic import build


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What draws the plots is made once for all of this room; the user's cache is left alone."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A finished run and its configuration, to be read."""
    return build(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copied(whole, tmp_path):
    """The same, to be changed; its held-out prompts lie where they lay."""
    config, run_dir = whole
    shutil.copytree(run_dir.path, tmp_path / "run", copy_function=shutil.copy)
    return config, RunDir(tmp_path / "run")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A run in which every word of others tries to act."""
    return build(tmp_path_factory.mktemp("hostile"), hostile=True, prompts=14, held_out=14, iterations=1)
