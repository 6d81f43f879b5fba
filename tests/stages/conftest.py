from pathlib import Path

import pytest

from dno_jax.config import RunConfig, parse_config
from tests.small import small_tree


def deep_merge(tree, changes):
    merged = dict(tree)
    for name, value in changes.items():
        merged[name] = deep_merge(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture
def make_config(small_folder, tmp_path):
    """A small configuration with a fresh run directory, changed by nested dicts."""

    def make(**changes) -> RunConfig:
        tree = deep_merge(small_tree(small_folder), {"run_dir": str(tmp_path / "run"), **changes})
        return parse_config(RunConfig, tree, place="test")

    return make
