"""What a run fixes about its model before anything is computed."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.model.attention import xla_attention
from dno_jax.model.params import init_params
from dno_jax.parallel.mesh import abstract_mesh
from dno_jax.parallel.sharding import DECODE, TRAIN
from dno_jax.runtime import runtime as runtime_module
from dno_jax.runtime.programs import Programs
from dno_jax.runtime.runtime import Runtime
from dno_jax.training.checkpoint import save_policy
from tests.small import small_tree
from tests.training.conftest import CONFIG as SHAPE


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_longest_text_of_the_run_selects_the_rotation(tmp_path):
    """Prompt and response together, or the judge's where the policy judges itself: one rotation for all stages."""
    tree = small_tree(tmp_path)  # prompts of up to 16 tokens, responses of up to 16
    file = tmp_path / "checkpoint" / "config.json"
    assert Runtime.start(RunConfig.model_validate(tree)).model_config.rope_length is None
    edit(file, max_position_embeddings=8, rope_scaling={"type": "dynamic", "factor": 4.0})
    runtime = Runtime.start(RunConfig.model_validate(tree))
    assert runtime.model_config.rope_length == 32
    judge = {"max_prompt_length": 40, "max_new_tokens": 8}
    changes = {
        "annotation": {"kind": "self", "self_judge": judge},
        "prompts": {**tree["prompts"], "held_out_path": None},
    }
    judged = RunConfig.model_validate({**tree, **changes})
    assert Runtime.start(judged).model_config.rope_length == 48
    bounded = RunConfig.model_validate({**tree, "sampling": {**tree["sampling"], "max_total_tokens": 20}})
    assert Runtime.start(bounded).model_config.rope_length == 20
    # Stretched four times, a context of 7 ends at 28.
    edit(file, max_position_embeddings=7)
    with pytest.raises(DnoError, match="up to 32 tokens exceed the model's context of 28"):
        Runtime.start(RunConfig.model_validate(tree))


def test_the_total_that_a_refused_length_names_fits(make_config):
    wide = {"prompts": {"max_length": 40}, "sampling": {"max_new_tokens": 40}}
    with pytest.raises(DnoError, match=r"up to 80 tokens exceed .* of 64 .*sampling\.max_total_tokens=64$"):
        Runtime.start(make_config(**wide))
    for total in (60, 64):
        wide["sampling"]["max_total_tokens"] = total
        assert Runtime.start(make_config(**wide)).config.max_length == total
    wide["sampling"]["max_total_tokens"] = 65
    with pytest.raises(DnoError, match="up to 65 tokens exceed"):
        Runtime.start(make_config(**wide))
    wide["sampling"]["max_total_tokens"] = 90
    with pytest.raises(DnoError, match="up to 80 tokens exceed"):
        Runtime.start(make_config(**wide))


def test_the_model_attends_as_configured(make_config):
    runtime = Runtime.start(make_config())
    assert runtime.programs.attention_backend == "xla"  # auto, on a CPU
    assert {runtime.programs.model(layout).attention.attention for layout in (TRAIN, DECODE)} == {xla_attention}
    with pytest.raises(DnoError, match=r"model\.attention is 'splash', but it runs on tpus"):
        Runtime.start(make_config(model={"attention": "splash"}))


OWN_MESH = {"mesh": {"data": 1, "fsdp": 8}, "sampling": {"mesh": {"data": -1, "tensor": 2}}}


@pytest.mark.parametrize("meshes", [{"mesh": {"data": 1, "fsdp": 4, "tensor": 2}}, OWN_MESH])
def test_weights_for_decoding_are_the_policy_rounded_to_the_compute_dtype(make_config, tmp_path, monkeypatch, meshes):
    """They are read as they are trained, each part of them once over fsdp, and laid out anew on the devices."""
    runtime = Runtime.start(make_config(model={"dtype": "bfloat16"}, **meshes))
    assert runtime.submesh.mesh.shape["tensor"] == runtime.programs.decode_mesh.shape["tensor"] == 2
    load, read = runtime_module.load_policy, []

    def seen(path, *, shapes, shardings):
        read.append(load(path, shapes=shapes, shardings=shardings))
        return read[0]

    monkeypatch.setattr(runtime_module, "load_policy", seen)
    params = init_params(runtime.model_config, jax.random.key(1))
    policy = epath.Path(tmp_path) / "policy"
    save_policy(policy, params)
    found = runtime.load_for_decoding(policy)
    assert len(found["layers"]) == runtime.model_config.num_hidden_layers
    stacked = {**found, "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *found["layers"])}
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(stacked), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == (jnp.float32 if path[-1].key.endswith("norm") else jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted.astype(leaf.dtype)))
    for leaf, place in zip(*map(jax.tree.leaves, (read[0], runtime.programs.param_shardings(TRAIN))), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert read[0]["layers"]["up"].is_deleted()
    # A layer lies on the devices as its part of the stack does.
    places = runtime.programs.param_shardings(DECODE)
    layer = jax.tree.map(lambda place: NamedSharding(place.mesh, PartitionSpec(*place.spec[1:])), places["layers"])
    places = {**places, "layers": (layer,) * len(found["layers"])}
    for leaf, place in zip(jax.tree.leaves(found), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_packing_is_refused_where_the_attention_cannot_keep_texts_apart():
    tree = {"run_dir": "r", "model": {"path": "m", "attention": "cudnn", "dtype": "bfloat16"}, "prompts": {"path": "p"},
            "annotation": {"kind": "openai"}}  # fmt: skip

    def programs(packing):
        config = parse_config(RunConfig, tree | {"training": {"packing": packing}}, place="test")
        return Programs(config, SHAPE, abstract_mesh(config.mesh, 8))

    with pytest.raises(DnoError, match=r"training\.packing is on, but this run attends by cuDNN"):
        _ = programs("on").packing
    assert not programs("auto").packing.packed
