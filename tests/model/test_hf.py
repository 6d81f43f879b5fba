from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.cache import init_cache
from dno_jax.model.decoder import Decoder, logits
from tests.model.checkpoints import edit_config, same, torch_logits
from tests.model.conftest import hf_config, random_params, run, write_json


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"auto_map": {"AutoModel": "x.y"}}, "key 'auto_map'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"attention_dropout": 2}, "attention_dropout is 2; expected a share"),
        ({"sliding_window": 32}, "sliding_window is 32"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters are both given"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0}}, r"has rope_type = .llama3"),
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
