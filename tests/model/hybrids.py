"""Small models whose layers do not all attend: a Qwen 3.5 and an LFM2, of sizes that two tensor devices divide."""

from __future__ import annotations

import jax
import numpy as np

from dno_jax.model.config import ModelConfig
from dno_jax.model.params import abstract_params

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "qk_norm": "head",
}
HYBRIDS = {
    "qwen3_5": ModelConfig(
        **SIZES,
        num_hidden_layers=5,
        rms_norm_eps=1e-2,
        family="qwen3_5_text",
        norm_offset=1.0,
        attention_gate=True,
        rotary_dim=4,
        mixers=("gated_delta", "attention", "gated_delta", "attention", "gated_delta"),
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=12,
        conv_kernel=4,
    ),
    "lfm2": ModelConfig(
        **SIZES,
        num_hidden_layers=4,
        rms_norm_eps=1e-2,
        family="lfm2",
        tie_word_embeddings=True,
        mixers=("short_conv", "short_conv", "attention", "short_conv"),
        conv_kernel=3,
    ),
}


def hybrid_params(name: str):
    """Weights that make every part count; drawn here, which compiles nothing."""
    config, rng = HYBRIDS[name], np.random.default_rng(1)

    def draw(path, leaf):
        key, drawn = path[-1].key, rng.standard_normal(leaf.shape)
        if "norm" in key:
            drawn = 1.0 - config.norm_offset * (key != "delta_norm") + 0.3 * drawn
        elif key.endswith("_conv") or key in ("conv_taps", "delta_rate", "delta_shift"):
            drawn = 0.5 * drawn
        else:
            drawn = 0.1 * drawn
        return drawn.astype(np.float32)

    return jax.tree.map_with_path(draw, abstract_params(config))
