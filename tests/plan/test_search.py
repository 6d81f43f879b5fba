"""What is advised fits: the smallest change, and the fastest settings, each compiled for 8 CPU devices."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.plan.run import Asked, plan_programs, plan_run, programs_on
from dno_jax.plan.search import MOST_COMPILES, refuse, search
from dno_jax.runtime.training_memory import overridden
from dno_jax.sampling.memory import Capacity
from tests.configured import deep_merge
from tests.small import small_tree


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def plan(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("search")
    changes = {"training": {"batch_size": 64}, "mesh": {"data": 1, "fsdp": 8}, "model": {"remat": "none"}}
    config = parse_config(RunConfig, deep_merge(small_tree(folder), changes), place="test")
    return plan_run(config, asked=Asked(topology="cpu:8", memory=2**32, cache=cache))


def with_memory(plan, size):
    """The same plan on devices of so much memory."""
    programs = {name: replace(one, fits=one.figures.peak <= size) for name, one in plan.programs.items()}
    target = replace(plan.target, capacity=Capacity(size, "--memory"))
    return replace(plan, target=target, asked=replace(plan.asked, memory=size), programs=programs)


def trained(plan, overrides):
    """What the train step takes, compiled anew: nothing is remembered."""
    programs = programs_on(overridden(plan.config, overrides), plan.shape, plan.target)
    asked = replace(plan.asked, cache=None)
    found = plan_programs(programs, {}, plan.target, asked=asked, num_rows=plan.num_rows, only=("train",))
    return found["train"].figures


@pytest.mark.soak
def test_a_program_that_does_not_fit_is_reported_with_a_change_that_does(plan):
    refuse(plan)
    peak = plan.programs["train"].figures.peak
    # Between what decoding and what training take.
    room = int(0.8 * peak)
    tight = with_memory(plan, room)
    with pytest.raises(DnoError) as told:
        refuse(tight)
    assert f"train does not fit: {peak / 2**20:.2f} MiB of a device's {room / 2**20:.2f} MiB (--memory)" in str(
        told.value
    )
    way = str(told.value).partition("the smallest change that fits, compiled: ")[2].split("\n")[0].split()
    assert re.fullmatch(r"training.micro_batch_size=\d+", way[0])
    assert trained(plan, way).peak <= room


@pytest.mark.soak
def test_a_search_finds_what_fits_in_few_compilations(plan):
    wide = search(plan)
    assert wide.overrides[:2] == ["training.micro_batch_size=64", "model.remat=none"]
    assert wide.compiles == 1
    tight = with_memory(plan, int(0.6 * plan.programs["train"].figures.peak))
    found = search(tight)
    assert found.peak <= tight.target.capacity.bytes
    assert found.compiles <= MOST_COMPILES
    assert found.overrides[:2] != wide.overrides[:2]
    assert trained(plan, found.overrides).peak == found.peak
    with pytest.raises(DnoError, match=r"--search: no micro batch and remat fits 1\.00 KiB"):
        search(with_memory(plan, 1024))
