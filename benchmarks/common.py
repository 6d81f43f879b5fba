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

# hidden_size, intermediate_size, layers, heads, key-value heads, head_dim, tied embeddings; 32,000 words.
_SHAPES = {
    "llama25m": (384, 1024, 8, 6, 6, 64, False),
    "1b": (2048, 8192, 16, 32, 8, 64, True),  # Llama 3.2 1B with fewer words
    "7b": (4096, 14336, 32, 32, 8, 128, False),  # Mistral 7B
}


def load_model(name: str) -> tuple[ModelConfig, Any]:
    """Return a checkpoint directory's model, or one of a shape above with random weights."""
    if name not in _SHAPES:
        config, params = hf.load(name)
        return config, jax.tree.map(jax.numpy.asarray, params)
    hidden, width, layers, heads, kv_heads, head_dim, tied = _SHAPES[name]
    config = ModelConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=1024 if name == "llama25m" else 4096,
        tie_word_embeddings=tied,
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
        "peak_device_mib": None
        if (peak := (device.memory_stats() or {}).get("peak_bytes_in_use")) is None
        else peak >> 20,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "device": f"{device.device_kind} x {jax.device_count()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
    }
    print(json.dumps(line))


def random_ids(rng: np.random.Generator, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.integers(3, vocab_size, size=length).tolist())
