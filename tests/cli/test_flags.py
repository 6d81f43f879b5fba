"""Options of XLA are set for versions that know them, and where somebody has set them they stay."""

from importlib.metadata import PackageNotFoundError

import pytest

from dno_jax.cli import flags
from dno_jax.parallel.chips import CHIPS, GPU_FRACTION

LATENCY = "--xla_gpu_enable_latency_hiding_scheduler"


@pytest.fixture
def installed(monkeypatch):
    found = {}

    def version(package):
        if package not in found:
            raise PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(flags, "version", version)
    return found


SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
OWN = {SHARE: ".9"}


def test_no_option_is_set_without_an_accelerator(installed):
    assert flags.accelerator_flags({"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false", **OWN}) == {}


@pytest.mark.parametrize("own", [SHARE, "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE",
                                 "XLA_PYTHON_CLIENT_ALLOCATOR"])  # fmt: skip
def test_a_gpus_share_is_that_of_the_plan_unless_somebody_has_said_otherwise(installed, own):
    assert flags.accelerator_flags({}) == {SHARE: f"{GPU_FRACTION:g}"}
    assert flags.accelerator_flags({own: "x"}) == {}
    for chip in CHIPS:
        share = 1.0 if chip.platform == "tpu" else float(flags.accelerator_flags({})[SHARE])
        assert chip.usable == int(share * chip.memory)


@pytest.mark.parametrize(
    ("version", "known"), [("0.10.2", True), ("0.12.0.1", True), ("0.9.1", False), ("0.13.0", False), ("1.0", False)]
)
def test_a_version_that_may_not_know_an_option_is_given_none(installed, version, known):
    installed["jax-cuda13-pjrt"] = version
    assert bool(flags.accelerator_flags(OWN)) == known


def test_what_is_set_stays(installed):
    installed |= {"jax-cuda12-pjrt": "0.10.2", "libtpu": "0.0.42.1"}
    own = OWN | {
        "XLA_FLAGS": f"{LATENCY}=false",
        "LIBTPU_INIT_ARGS": "--xla_tpu_enable_data_parallel_all_reduce_opt=false",
    }
    found = flags.accelerator_flags(own)
    assert "XLA_FLAGS" not in found
    assert found["LIBTPU_INIT_ARGS"].split() == [
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
        "--xla_tpu_enable_data_parallel_all_reduce_opt=false",
    ]
    assert flags.accelerator_flags({"XLA_FLAGS": "--xla_dump_to=x"})["XLA_FLAGS"] == f"{LATENCY}=true --xla_dump_to=x"
    assert flags.accelerator_flags(own | found) == {}
