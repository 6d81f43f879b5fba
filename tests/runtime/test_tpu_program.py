"""The training step as a TPU would run it, compiled by libtpu ahead of time; nothing is run and no TPU is needed."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
LAYER = 4096 * 8 * 128  # numbers of the smallest matrix of a layer, its keys'


def compiled(*arguments):
    """Return what benchmarks/memory.py says of a program."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    script = [sys.executable, "benchmarks/memory.py", *arguments]
    done = subprocess.run(script, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def numbers(shape):
    return math.prod(int(size) for size in re.findall(r"\d+", shape.split("[")[1]))


def test_a_7b_step_with_splash_attention_fits_sixteen_small_tpus():
    """Mistral 7B on a v5e:4x4 slice, two sequences of 2,048 tokens a device: counted in the program, not timed."""
    found = compiled("v5e:4x4", "adamw", "--pairs", "16")
    # Forward, once more for the backward pass (remat), and its two kernels; one call a layer loop.
    assert found["kernel_calls"] == 4
    assert {name.split("_")[2] for name in found["kernels"]} == {"fwd", "dq", "dkv"}
    # A v5e has 16 GB, of which a program gets 15.75 GiB. The float32 weights and moments are 5.1 of them.
    assert 5.0 < found["arguments"] < found["peak"] <= found["arguments"] + found["temporaries"] < 14.0
    # Gradients are summed where they lie: nothing as large as a layer's keys is summed whole.
    assert found["sent"]["all-gather"][0] > 0
    assert numbers(found["sent"]["all-reduce"][2]) < LAYER


def test_between_two_slices_gradients_travel_once_after_the_micro_batches():
    common = ("--slices", "2", "--data", "2", "--layers", "2", "--pairs", "128", "--parts", "4")
    found = compiled("v5e:4x4", "adamw", *common)
    kinds = [(runs, size, numbers(shape)) for runs, size, shape in found["over_data_in_loops"].values()]
    # Of each micro-batch its pairs' log-probabilities, in a tile of the network's.
    assert all(runs <= 4 and largest <= 8192 for runs, _, largest in kinds)
    parameters = found["arguments"] / 3  # and two moments
    assert sum(size for _, size, _ in found["over_data"].values()) < 1.05 * parameters


def test_a_token_copies_no_cache_and_gathers_no_weights():
    """The paper's recipe on v5e:16x16, with the slots of all 32 layers and 2 of them compiled; counted, not timed."""
    from dno_jax.config import RunConfig, load_config
    from dno_jax.parallel.sharding import DECODE
    from dno_jax.plan.hlo import calls, copies
    from dno_jax.plan.run import programs_on
    from dno_jax.plan.shape import shape_of
    from dno_jax.plan.topology import target_of
    from dno_jax.runtime.arguments import decode_call
    from dno_jax.runtime.slots import plan_on, wanted_by_stage

    config = load_config(RunConfig, ROOT / "configs" / "mistral_7b_ultrafeedback.yaml", [])
    target = target_of("v5e:16x16", num_devices=None, memory=None)
    whole = programs_on(config, shape_of(config, "mistral-7b"), target)
    wanted = wanted_by_stage(whole.config, num_prompts=20_000, num_held_out=0)["sample"]
    slots = plan_on(whole, wanted, mesh=whole.decode_mesh, capacity=target.capacity, platform="tpu")
    assert slots.programs.mesh.shape["tensor"] == 2
    model = replace(whole.model_config, num_hidden_layers=2, windows=whole.model_config.windows[:2])
    two = replace(whole, model_config=model)
    decoder = two.model(DECODE, mesh=slots.programs.mesh)
    call = decode_call(two, replace(slots, programs=replace(slots.programs, model=decoder)))
    compiled = call.lowered().compile()
    text = compiled.as_text()
    rows = slots.slots
    keys = rows * 4 * 128 * 2048 * 2  # of a layer, on one device
    assert call.parts["KV cache"] > 4 * keys
    # A scatter would copy all of them; read is at most what texts have reached, and that where it lies.
    assert [shape for shape in copies(text, at_least=keys // 8) if shape.startswith(f"bf16[{rows},")] == []
    assert compiled.memory_analysis().temp_size_in_bytes < keys
    sent = [one for one in calls(text) if one.bytes > 4096]
    gathered = [one.shape for one in sent if one.kind == "all-gather"]
    assert gathered == [f"f32[{rows},32000]"]  # logits
    summed = [one.shape for one in sent if one.kind != "all-gather"]
    # Two sums a layer of hidden states, and the embedding's.
    assert summed == [f"bf16[{rows},1,4096]"] * 5
