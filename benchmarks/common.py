"""What the benchmark scripts share: models by name, and one JSON line out."""

from __future__ import annotations

import json
import platform
import resource
from importlib import metadata
from typing import Any

import jax
import numpy as np

from dno_jax.model import hf
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import init_params


def load_model(name: str) -> tuple[ModelConfig, Any]:
    """Return a checkpoint directory's model, or "llama25m": random weights, hidden 384, 8 layers, vocabulary 32,000."""
    if name != "llama25m":
        config, params = hf.load(name)
        return config, jax.tree.map(jax.numpy.asarray, params)
    config = ModelConfig(
        vocab_size=32000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )
    return config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


def report(bench: str, **figures: Any) -> None:
    """Print one JSON line with the figures, the device and the versions."""
    device = jax.devices()[0]
    line = {
        "bench": bench,
        **{name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in figures.items()},
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "device": f"{device.device_kind} x {jax.device_count()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
    }
    print(json.dumps(line))


def random_ids(rng: np.random.Generator, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.integers(3, vocab_size, size=length).tolist())
