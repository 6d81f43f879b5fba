"""Devices that need not be here, and what is said where they cannot be planned for."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from dno_jax.cli.quantities import read_bytes
from dno_jax.config import MeshSection, RunConfig, load_config
from dno_jax.errors import DnoError
from dno_jax.parallel.chips import CHIPS, chip_of
from dno_jax.plan import topology
from dno_jax.plan.run import Asked, plan_run
from dno_jax.plan.search import refuse, search
from dno_jax.plan.shape import shape_of
from dno_jax.plan.tables import as_json, command_of
from dno_jax.plan.topology import target_of
from dno_jax.plan.totals import totals
from tests.plan.test_recipes import CONFIGS

PAPER = CONFIGS / "mistral_7b_ultrafeedback.yaml"


def on(name, **options):
    return target_of(name, **{"num_devices": None, "memory": None, "compiled": False} | options)


@pytest.mark.parametrize(
    ("name", "count", "chip"),
    [("v5e:16x16", 256, "v5e"), ("v5e:4x4*2", 32, "v5e"), ("v5p:4x4x4", 64, "v5p"), ("tpu7x:2x2x4", 32, "tpu7x"),
     ("h200:8", 8, "h200"), ("h100:2x8", 16, "h100"), ("a100:8", 8, "a100")],
)  # fmt: skip
def test_a_topology_is_so_many_devices_of_a_chip(name, count, chip):
    target = on(name)
    assert (target.count, target.chip.name) == (count, chip)
    assert target.devices is None
    assert target.capacity.bytes == target.chip.usable <= target.chip.memory
    assert target.mesh(MeshSection(data=1, fsdp=-1)).shape["fsdp"] == count
    assert on(name, memory=2**30).capacity.bytes == 2**30


def test_virtual_devices_of_this_processor_are_compiled_for():
    target = on("cpu:8", compiled=True)
    assert len(target.devices) == target.count == 8
    with pytest.raises(DnoError, match="--topology cpu:64: this process has 8 CPU devices already"):
        on("cpu:64")


@pytest.mark.parametrize("name", ["v5e", "v5e:0x4", "v9:4x4", "v5e:4x4x4x4", "nonsense", "h200:", "v5e:4x4*0"])
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(DnoError) as told:
        on(name)
    for known in (f"--topology is {name!r}", "v5e:16x16", "v5p:4x4x4", "v6e:8x8", "h200:2x8", "cpu:8", "a100"):
        assert known in str(told.value)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("v5p:4x4", "3 sizes, as in v5p:4x4x4"), ("v5e:4x4x4", "2 sizes, as in v5e:4x4"), ("v6e:8", "2 sizes"),
        ("tpu7x:4*2", "3 sizes"), ("h200:2x2x2", "hosts x GPUs"), ("h200:12", "more of them in eights"),
        ("a100:8*2", "GPUs of one host"), ("cpu:8x2", "a number, as in cpu:8"), ("cpu:8*2", "a number"),
    ],
)  # fmt: skip
def test_a_shape_of_another_kind_of_device_is_refused(name, wanted):
    with pytest.raises(DnoError) as told:
        on(name)
    assert f"--topology is {name!r}; expected " in str(told.value)
    assert wanted in str(told.value)


def test_a_mesh_for_decoding_that_does_not_fit_is_named_as_such():
    config = load_config(RunConfig, PAPER, ["sampling.mesh={data: 3, tensor: 2}"])
    with pytest.raises(DnoError, match=r"^sampling\.mesh \(data=3, .* does not divide the 256"):
        plan_run(config, asked=Asked(topology="v5e:16x16", compiled=False, model="mistral-7b", num_prompts=2000))


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(DnoError, match=r"libtpu, the TPU's compiler, is not installed; pip install 'dno_jax\[plan\]'"):
        on("v5e:4x4", compiled=True)
    assert on("v5e:4x4").count == 16


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="CUDA's plugin is here")
def test_without_cudas_compiler_a_plan_is_an_estimate_that_says_so():
    target = on("h200:8", compiled=True)
    assert target.devices is None
    assert "estimated" in target.note
    assert "dno_jax[plan-gpu]" in target.note


def test_a_mesh_that_does_not_fit_the_topology_is_refused():
    config = load_config(RunConfig, PAPER, ["mesh.fsdp=48"])
    with pytest.raises(DnoError, match=r"mesh \(data=1, fsdp=48, .*\) does not divide the 64 planned devices"):
        plan_run(config, asked=Asked(topology="v5p:4x4x4", compiled=False, model="mistral-7b"))
    with pytest.raises(DnoError, match="--devices 4 with --topology v5e:4x4"):
        on("v5e:4x4", num_devices=4)


def test_a_model_that_is_nowhere_is_named_with_what_would_do():
    config = load_config(RunConfig, PAPER)
    with pytest.raises(DnoError, match=r"model.path .*mistral-7b-sft: no config.json.*--model with one of mistral"):
        plan_run(config, asked=Asked(topology="v5p:4x4x4", compiled=False))
    with pytest.raises(DnoError, match=r"--model is 'gpt-9'; known: mistral-7b, llama-3\.1-8b"):
        shape_of(config, "gpt-9")


def test_prompts_that_are_not_here_are_no_reason_to_refuse_a_bundled_shape():
    config = load_config(RunConfig, PAPER)
    asked = Asked(topology="v5p:4x4x4", compiled=False, model="mistral-7b")
    bare = plan_run(config, asked=asked)
    assert not bare.counts
    assert totals(bare) is None
    assert any("--prompts N assumes so many" in note for note in bare.notes)
    priced = Asked(**vars(asked) | {"num_prompts": 3_500, "price_per_hour": 2.0, "mfu": 0.5, "tokens_per_second": 1e5})
    plan = plan_run(config, asked=priced)
    whole = totals(plan)
    assert [count.prompts for count in plan.counts.values()] == [1000, 1000, 1000, 500]
    # Two pairs a prompt; in the later iterations 30 % and 45 % more may be earlier ones.
    assert whole.pairs == 2000 + 2858 + 3637
    assert whole.stages["train"].runs == 32 + 45 + 57
    # Arithmetic at half of what 64 chips can do.
    step = plan.programs["train"].load.needed * 64 / (0.5 * 64 * 459e12)
    assert whole.stages["train"].hours == pytest.approx(134 * step / 3600)
    drawn = 3 * 1000 * 5 * 1024 / 1e5
    assert whole.stages["sample"].hours == pytest.approx(drawn / 3600, rel=0.2)
    assert whole.usd == pytest.approx(2.0 * whole.device_hours) == pytest.approx(2.0 * 64 * whole.hours)
    assert whole.total_usd == pytest.approx(whole.usd + whole.judge_usd)
    assert whole.requests == sum(part.total.requests for part in plan.annotation.parts.values())


def test_what_somebody_measured_is_used_where_the_chip_is_not_known():
    config = load_config(RunConfig, PAPER)
    asked = Asked(num_devices=8, memory=2**37, model="mistral-7b", num_prompts=3500, tokens_per_second=1e4)
    whole = totals(plan_run(config, asked=asked))
    assert whole.stages["sample"].hours == pytest.approx(3 * 1000 * 5 * 1024 / 1e4 / 3600)
    assert whole.stages["train"].hours is None
    with pytest.raises(DnoError, match=r"--mfu 0\.4 is a share of a chip's peak, .* 8 devices is: add --topology"):
        plan_run(config, asked=replace(asked, mfu=0.4))


REFUSED = r"training does not fit: a step takes at least .* of each of 1 device .*80.00 GiB \(--memory\)"


def test_a_run_that_cannot_train_is_refused_with_the_smallest_change_that_fits():
    """The paper's recipe on one card of 80 GB: its state alone is 81 GiB."""
    config = load_config(RunConfig, PAPER)
    asked = Asked(num_devices=1, memory=read_bytes("80GiB", option="-"), model="mistral-7b")
    with pytest.raises(DnoError, match=REFUSED) as told:
        refuse(plan_run(config, asked=asked))
    assert "moments 53.96 GiB" in str(told.value)
    change = str(told.value).partition("the smallest change that fits: ")[2].partition(". More")[0].split()
    assert change
    changed = load_config(RunConfig, PAPER, change)
    plan = plan_run(changed, asked=asked)
    refuse(plan)
    assert plan.training.total < asked.memory
    micro = load_config(RunConfig, PAPER, ["training.micro_batch_size=64", "training.batch_size=64"])
    short = Asked(num_devices=4, memory=read_bytes("42GiB", option="-"), model="mistral-7b")
    plan = plan_run(micro, asked=short)
    assert not plan.programs["train"].fits  # and it is planned: `--search` starts from there
    with pytest.raises(DnoError, match=r"the smallest change that fits: training.micro_batch_size=\d+\."):
        refuse(plan)
    found = search(plan)
    assert found.peak <= short.memory
    with pytest.raises(DnoError, match=r"train does not fit: .*\n.*found by --search, and fits: training.micro_batch"):
        refuse(plan, found)
    command = command_of(plan, found, ["my recipe.yaml", "training.micro_batch_size=64", "seed=1"])
    assert command == f"dno run 'my recipe.yaml' seed=1 {' '.join(found.overrides)}"
    assert as_json(plan, found=found)["search"]["overrides"] == found.overrides


def test_chips_are_found_by_the_names_that_jax_has_for_them():
    assert chip_of("TPU v5 lite").name == "v5e"
    assert chip_of("TPU v5").name == "v5p"
    assert chip_of("NVIDIA H100 PCIe").name == "h100-pcie"
    assert chip_of("NVIDIA H100 80GB HBM3").name == "h100"
    assert chip_of("cpu") is None
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)


def test_a_run_is_refused_before_it_samples(make_config, monkeypatch):
    """On the memory that the devices report, at the start: nothing is sampled that could not be trained on."""
    from dno_jax.runtime.runtime import Runtime
    from dno_jax.sampling.memory import Capacity
    from dno_jax.stages import preflight

    runtime = Runtime.start(make_config())
    monkeypatch.setattr(preflight, "known_capacity", lambda devices: Capacity(10_000, "a small device"))
    with pytest.raises(DnoError, match=r"training does not fit: .* each of 8 devices .*9\.77 KiB \(a small device\)"):
        preflight.check(runtime)
    assert not runtime.run_dir.path.exists()
