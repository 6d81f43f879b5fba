"""Models and checkpoints made on the spot, small enough that a test takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.model.cache import MixerState
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.params import init_params


def random_params(config: ModelConfig, *, seed: int = 0, scale: float = 6.0):
    """Weights large enough that attention is far from uniform, norms and biases far from their initial values."""
    params = init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def stir(path, leaf):
        name = str(path[-1].key)
        if "norm" in name or "bias" in name:
            return np.asarray(leaf + 0.3 * rng.standard_normal(leaf.shape), np.float32)
        return np.asarray(leaf * scale, np.float32)

    return jax.tree.map_with_path(stir, params)


def run(config: ModelConfig, params, token, position=None, **kwargs) -> np.ndarray:
    """Logits [B, T, V] of a forward pass without a cache."""
    token = jnp.asarray(token, jnp.int32)
    if position is None:
        position = np.broadcast_to(np.arange(token.shape[1]), token.shape)
    hidden, _ = Decoder(config, **kwargs).apply({"params": params}, token, jnp.asarray(position, jnp.int32))
    return np.asarray(logits(config, params, hidden))


def grow(cache, num_slots):
    """The cache with empty slots at the end, `num_slots` in all."""

    def one(layer):
        if isinstance(layer, MixerState):
            return layer
        more = num_slots - layer.num_slots
        return jax.tree.map(lambda field: jnp.pad(field, [(0, 0)] * (field.ndim - 1) + [(0, more)]), layer)

    return tuple(map(one, cache))


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Every number differs from every other, so that swapped axes cannot hide."""
    return ModelConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        max_position_embeddings=64,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


@pytest.fixture(scope="session")
def params(config: ModelConfig):
    return random_params(config)


def hf_config(config: ModelConfig, **extra) -> dict:
    """A config.json as transformers 5 writes it."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    names += ("attention_bias", "mlp_bias")
    tree = {name: getattr(config, name) for name in names}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **tree,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "dtype": "float32",
        "initializer_range": 0.02,
        "use_cache": True,
        "transformers_version": "5.23.0",
        **extra,
    }


def write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


@pytest.fixture
def checkpoint(tmp_path: Path, config: ModelConfig, params) -> Path:
    """A whole checkpoint on disk, made by our own save from a source that has only the JSON files."""
    from dno_jax.model import hf

    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", hf_config(config))
    write_json(source / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 5]})
    (source / "tokenizer_config.json").write_text("{}")
    path = tmp_path / "checkpoint"
    hf.save(path, config, params, source=source)
    return path
