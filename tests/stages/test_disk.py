"""Too little disk for a run's checkpoints is said before the start, with what they are."""

import shutil
from types import SimpleNamespace

import pytest

from dno_jax.errors import DnoError
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import disk


def test_what_is_yet_to_be_written_is_counted_and_held_to_what_is_free(make_config, monkeypatch):
    runtime = Runtime.start(make_config(training={"keep_states": 1}))
    parameters = runtime.programs.num_parameters
    wanted = disk.missing(runtime)
    assert wanted["policy 0"] == 4 * parameters
    assert wanted["later policies"] == 2 * 4 * parameters  # of two iterations
    assert 2 * 12 * parameters <= wanted["training states"] <= 2 * 12.1 * parameters  # weights, and Adam's two moments
    free = sum(wanted.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    disk.check(runtime)
    free -= 1
    with pytest.raises(
        DnoError, match=r"are free on its disk, and the run will write .*policy 0 .*training.keep_states=1"
    ):
        disk.check(runtime)

    for policy in (0, 1):  # a restart has these
        path = runtime.run_dir.policy(policy)
        path.mkdir(parents=True)
        (path / "FINGERPRINT").write_text("f" * 64)
    left = disk.missing(runtime)
    assert left["policy 0"] == 0
    assert left["later policies"] == 4 * parameters
    runtime.run_dir.exported_path.write_text("{}")
    assert disk.missing(runtime) == {}


def test_fewer_policies_and_adapters_take_less(make_config):
    kept = disk.missing(Runtime.start(make_config(iterations=5, training={"keep_policies": 1})))
    every = disk.missing(Runtime.start(make_config(iterations=5)))
    assert kept["later policies"] * 5 == every["later policies"] * 3
    adapters = disk.missing(Runtime.start(make_config(iterations=5, adapter={"rank": 2, "targets": "all"})))
    assert adapters["later policies"] < every["later policies"] / 2
    assert adapters["training states"] < every["training states"] / 2
