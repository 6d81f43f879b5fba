"""A mixture of experts through the whole of an iteration, its experts split over the mesh."""

import json
import shutil

import jax
import numpy as np
import pytest

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.params import init_params
from dno_jax.records import Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from tests.running import prepare, run_iteration
from tests.small import small_tree


@pytest.fixture(scope="module")
def mixture(small_folder):
    """The small checkpoint's tokenizer with a Mixtral of four experts."""
    dense = small_tree(small_folder)["model"]["path"]
    source = small_folder / "mixture-source"
    shutil.copytree(dense, source)
    (source / "model.safetensors").unlink()
    tree = {
        "model_type": "mixtral", "vocab_size": 76, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1e4,
        "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True, "eos_token_id": 2,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(tree))
    config = hf.read_config(source)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.asarray(leaf * (5.0 if leaf.ndim > 2 else 1.0)), params)
    params["embed"] = params["embed"] * 12.0
    hf.save(small_folder / "mixture", config, params, source=source)
    return str(small_folder / "mixture")


@pytest.mark.soak
def test_an_iteration_on_an_expert_axis(make_config, mixture):
    config = make_config(model={"path": mixture}, mesh={"data": 2, "expert": 2, "tensor": 2})
    prepare(config)
    run_iteration(config, 0)  # training refuses unless step 0 finds the sampler's policy
    run_dir = RunDir(config.run_dir)
    assert len(list(run_dir.stage("sample", 0).read(Rollout))) == 6 * 5
    steps = [row for row in run_dir.read_metrics() if row["stage"] == "train"]
    assert steps
    for row in steps:
        assert 2.0 <= row["load_balance"] <= 4.0  # k when even, E at worst
        assert 0.5 <= row["busiest_expert"] <= 1.0  # k / E when even


def test_a_weight_without_experts_is_refused(make_config):
    with pytest.raises(DnoError, match=r"load_balance_weight is 0\.01, but .* is no mixture of experts; set it to 0"):
        Runtime.start(make_config(loss={"load_balance_weight": 0.01}))
