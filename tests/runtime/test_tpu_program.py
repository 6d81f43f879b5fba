"""The training step as a TPU would run it, compiled by libtpu ahead of time; nothing is run and no TPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install libtpu)")
def test_a_7b_step_with_splash_attention_fits_sixteen_small_tpus():
    """Mistral 7B on a v5e:4x4 slice, two sequences of 2,048 tokens a device: counted in the program, not timed."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    script = [sys.executable, "benchmarks/attention.py", "--aot", "v5e:4x4", "--backends", "splash"]
    done = subprocess.run(script, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    # Forward, once more for the backward pass (remat), and its two kernels; one call a layer loop.
    assert found["kernel_calls"] == 4
    assert {name.split("_")[2] for name in found["kernels"]} == {"fwd", "dq", "dkv"}
    # A v5e has 16 GB, of which a program gets 15.75 GiB. The float32 weights and moments are 5.1 of them.
    assert 5.0 < found["arguments_gib"] < found["peak_gib"] <= found["arguments_gib"] + found["temporary_gib"] < 14.0
    # Gradients are summed where they lie: nothing as large as the smallest matrix, a layer's keys, is summed whole.
    assert found["collectives"]["all-gather"] > 0
    assert found["largest_all_reduce"] < 4096 * 8 * 128
