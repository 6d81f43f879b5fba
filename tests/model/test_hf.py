from __future__ import annotations

import dataclasses
import filecmp
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.cache import init_cache
from dno_jax.model.decoder import Decoder, abstract_params, logits
from dno_jax.model.hf import exporter
from tests.model.conftest import hf_config, random_params, run, write_json


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edit_config(path, **changes):
    tree = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            tree.pop(key, None)
        else:
            tree[key] = value
    write_json(path / "config.json", tree)


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def torch_logits(path, token):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(token))).logits.numpy()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_parity_with_transformers(tmp_path, config, bias, tied):
    """Random weights of our tree, written by save, read by transformers: names, layout, rotation, biases, tying.

    5e-6: logits are of order one here (weights of deviation 0.08), forty tokens, three layers of float32.
    """
    biases = dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), bias)
    config = dataclasses.replace(config, tie_word_embeddings=tied, **biases)
    params = random_params(config, scale=4.0)
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", hf_config(config))
    hf.save(tmp_path / "out", config, params, source=source)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in names) == (not tied)
    token = np.random.default_rng(1).integers(config.vocab_size, size=(2, 40))
    expected = torch_logits(tmp_path / "out", token)
    loaded_config, loaded = hf.load(tmp_path / "out")
    assert loaded_config == config
    same(loaded, params)
    np.testing.assert_allclose(run(config, loaded, token), expected, atol=5e-6)
    assert np.abs(expected).max() > 0.3


def test_mistral_without_a_window_is_the_same_arithmetic(tmp_path, config):
    config = dataclasses.replace(config, attention_bias=False, output_bias=False, mlp_bias=False, family="mistral")
    tree = hf_config(config, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        del tree[key]
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", tree)
    params = random_params(config, scale=4.0)
    hf.save(tmp_path / "out", config, params, source=source)
    token = np.random.default_rng(1).integers(config.vocab_size, size=(2, 30))
    # 5e-6: as test_parity_with_transformers.
    np.testing.assert_allclose(run(config, params, token), torch_logits(tmp_path / "out", token), atol=5e-6)
    edit_config(tmp_path / "out", sliding_window=...)
    assert hf.load(tmp_path / "out")[0].windows == (4096,) * 3  # the default of an absent key


def test_round_trip_is_bit_equal_and_deterministic(tmp_path, config, params, checkpoint):
    loaded_config, loaded = hf.load(checkpoint)
    assert loaded_config == config
    same(loaded, params)
    assert shape_tree(loaded) == shape_tree(abstract_params(config))
    hf.save(tmp_path / "again", config, jax.tree.map(jnp.asarray, loaded), source=checkpoint)
    names = sorted(p.name for p in checkpoint.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"]
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == names
    assert filecmp.cmpfiles(checkpoint, tmp_path / "again", names, shallow=False)[0] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "checkpoint", "source"]  # no temporary left
    assert hf.read_end_token_ids(checkpoint) == (2, 5)
    (checkpoint / "generation_config.json").unlink()
    assert hf.read_end_token_ids(checkpoint) == (2,)


def shape_tree(tree):
    return jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), tree)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_source_dtypes_and_shards(tmp_path, config, params, checkpoint, dtype):
    """An index with two shards, as large checkpoints come; narrow floats widen exactly."""
    tensors = {name: a.astype(dtype) for name, a in load_file(checkpoint / "model.safetensors").items()}
    (checkpoint / "model.safetensors").unlink()
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        save_file({n: a for n, a in tensors.items() if weight_map[n] == shard}, checkpoint / shard)
    write_json(checkpoint / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _, loaded = hf.load(checkpoint)
    same(loaded, jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), params))
    (checkpoint / shards[1]).unlink()
    with pytest.raises(DnoError, match=r"model-00002-of-00002\.safetensors: no such file"):
        hf.load(checkpoint)


def test_bfloat16_file_names_its_dtype(tmp_path, config, params, checkpoint):
    hf.save(tmp_path / "half", config, params, source=checkpoint, dtype=ml_dtypes.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    _, loaded = hf.load(tmp_path / "half")
    same(loaded, jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), params))


def test_sharded_load_gives_every_device_its_slice(config, checkpoint):
    """Every axis of every parameter is split in turn, head_dim included."""
    _, whole = hf.load(checkpoint)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    for axis in range(4):

        def sharding(leaf, axis=axis):
            split = axis < leaf.ndim and leaf.shape[axis] % 2 == 0
            parts = ["x" if split and i == axis else None for i in range(leaf.ndim)]
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts))

        shardings = jax.tree.map(sharding, whole)
        _, placed = hf.load(checkpoint, shardings=shardings)
        assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, placed, shardings))
        same(jax.tree.map(np.asarray, placed), whole)


def test_missing_files_are_named(tmp_path, checkpoint):
    with pytest.raises(DnoError, match="nowhere: no such directory"):
        hf.load(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").rename(tmp_path / "model")
    with pytest.raises(DnoError, match="only safetensors"):
        hf.load(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(DnoError, match=r"config\.json: not valid JSON"):
        hf.load(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(DnoError, match=r"config\.json: no such file"):
        hf.read_config(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files_are_refused(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DnoError, match="truncated or corrupt"):
        hf.load(checkpoint)


def test_wrong_tensors_are_named(checkpoint):
    original = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"

    def reset(tensors):
        tensors.clear()
        tensors.update(original)

    def transposed(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    def integers(tensors):
        tensors[name] = tensors[name].astype(np.int32)

    cases = [
        (lambda t: t.pop(name), f"tensor {name} is missing"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[name]}), "unexpected tensor model.layers.3"),
        (transposed, rf"{name} has shape \(36, 16\)"),
        (integers, f"{name} has dtype I32"),
    ]
    for edit, words in cases:
        edit_tensors(checkpoint, edit)
        with pytest.raises(DnoError, match=words):
            hf.load(checkpoint)
        edit_tensors(checkpoint, reset)
    edit_tensors(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f4")}))
    hf.load(checkpoint)  # an old checkpoint's buffer


def test_a_second_copy_of_a_tied_head_must_be_the_same(tmp_path, config):
    config = dataclasses.replace(config, tie_word_embeddings=True)
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", hf_config(config))
    path = tmp_path / "tied"
    hf.save(path, config, random_params(config), source=source)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    hf.load(path)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(DnoError, match=r"lm_head\.weight differs"):
        hf.load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"partial_rotary_factor": 0.5}, "key 'partial_rotary_factor'"),
        ({"auto_map": {"AutoModel": "x.y"}}, "key 'auto_map'"),
        ({"final_logit_softcapping": 30.0}, "key 'final_logit_softcapping'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"sliding_window": 32}, "sliding_window is 32"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters are both given"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, r"has rope_type = .llama3"),
        ({"rope_theta": 1.0}, "rope_parameters has rope_theta"),
        ({"hidden_size": "40"}, "hidden_size is '40'"),
        ({"vocab_size": ...}, "'vocab_size' is missing"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"attention_bias": False}, r"unexpected tensor model\.layers\.0\.self_attn"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight differs"),
        ({"vocab_size": 128}, r"has shape \(97, 36\)"),
    ],
)
def test_configs_not_understood_are_refused(checkpoint, changes, words):
    edit_config(checkpoint, **changes)
    with pytest.raises(DnoError, match=words):
        hf.load(checkpoint)


def test_both_spellings_of_transformers_are_read(checkpoint, config):
    edit_config(checkpoint, rope_parameters=..., rope_theta=5000.0, rope_scaling=None, dtype=..., torch_dtype="float32")
    assert hf.read_config(checkpoint) == config
    edit_config(checkpoint, num_key_value_heads=..., head_dim=..., hidden_size=48)
    assert hf.read_config(checkpoint).num_key_value_heads == 6
    assert hf.read_config(checkpoint).head_dim == 8


def test_save_refuses_what_is_wrong(tmp_path, config, params, checkpoint):
    with pytest.raises(DnoError, match="exists already"):
        hf.save(checkpoint, config, params, source=checkpoint)
    before = (checkpoint / "model.safetensors").read_bytes()
    moved = {**params, "final_norm": params["final_norm"] + 1}
    hf.save(checkpoint, config, moved, source=checkpoint, overwrite=True)
    assert (checkpoint / "model.safetensors").read_bytes() != before
    target = tmp_path / "target"
    cases = [
        (dataclasses.replace(config, rms_norm_eps=1e-6), params, "rms_norm_eps is 1e-05"),
        (config, {k: v for k, v in params.items() if k != "head"}, "parameter head is missing"),
        (config, {**params, "extra": params["head"]}, "parameter extra is unexpected"),
        (config, {**params, "head": params["head"].T}, "parameter head has shape"),
        (config, {**params, "head": params["head"] * np.float32("nan")}, "Nothing was put in place"),
    ]
    for c, p, words in cases:
        with pytest.raises(DnoError, match=words):
            hf.save(target, c, p, source=checkpoint)
    with pytest.raises(DnoError, match="float16"):
        hf.save(target, config, params, source=checkpoint, dtype=np.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "source"]


def test_a_writer_that_errs_puts_nothing_in_place(tmp_path, config, params, checkpoint, monkeypatch):
    """The check after writing is what stands between a wrong table and a published checkpoint."""
    write = exporter._write_tensors

    def swap(file, *args, **kwargs):
        write(file, *args, **kwargs)
        tensors = load_file(file)
        names = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight")
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
        save_file(tensors, file)

    monkeypatch.setattr(exporter, "_write_tensors", swap)
    with pytest.raises(DnoError, match="layers/k"):
        hf.save(tmp_path / "target", config, params, source=checkpoint)
    assert not (tmp_path / "target").exists()


@pytest.fixture(scope="session")
def tiny_llama(shared_data):
    return shared_data / "tiny_llama"


def test_tiny_llama_logits_and_export(tmp_path, tiny_llama):
    config, params = hf.load(tiny_llama)
    token = np.random.default_rng(0).integers(config.vocab_size, size=(2, 60))
    expected = torch_logits(tiny_llama, token)
    # 1e-4: logits reach 18, where float32 resolves 2e-6; five layers.
    np.testing.assert_allclose(run(config, params, token), expected, atol=1e-4)
    hf.save(tmp_path / "out", config, params, source=tiny_llama)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tiny_llama / "config.json").read_bytes()
    np.testing.assert_array_equal(torch_logits(tmp_path / "out", token), expected)
    shutil.rmtree(tmp_path / "out")


def test_tiny_llama_writes_the_same_story_as_transformers(tiny_llama):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config, params = hf.load(tiny_llama)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    start = torch.tensor([[1]])
    with torch.no_grad():
        expected = theirs.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=200,
            min_new_tokens=200,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
    model = Decoder(config)

    @jax.jit
    def decode(params):
        cache = init_cache(config, batch_size=1, num_slots=201)

        def step(carry, position):
            token, cache = carry
            hidden, cache = model.apply({"params": params}, token, jnp.full((1, 1), position, jnp.int32), cache)
            token = jnp.argmax(logits(config, params, hidden), axis=-1).astype(jnp.int32)
            return (token, cache), token[0, 0]

        first = (jnp.ones((1, 1), jnp.int32), cache)
        return jax.lax.scan(step, first, jnp.arange(200, dtype=jnp.int32))[1]

    assert [1, *np.asarray(decode(params)).tolist()] == expected
