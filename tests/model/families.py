"""Tiny configs of every family and rope type, in words that both transformers and we read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dno_jax.model.config import ModelConfig
from dno_jax.model.hf.config_json import parse_config

# The window is passed within the short text, the original context of stretched rotations in the long one only.
SHORT, LONG, WINDOW, ORIGINAL = 64, 112, 12, 80

SIZES = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 320,
    "rms_norm_eps": 1e-2,  # so large that another one shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Sizes that differ from each other, and an odd number of heads.
DELTA = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 20,
}
FACTORS = [1.0 + 0.3 * i for i in range(6)]


@dataclass(frozen=True)
class Case:
    """A config.json, in words that both transformers and we read, without the sizes that all have.

    Where projections are multiplied with each other, rounding shows `rougher` times as much: transformers' two forms of
    one delta rule differ by 4e-6 to 6e-6 in these models.
    """

    model_type: str
    tree: dict[str, Any] = field(default_factory=dict)

    @property
    def rougher(self) -> float:
        return 2.0 if self.model_type in ("qwen3_5_text", "lfm2") else 1.0

    @property
    def config_json(self) -> dict[str, Any]:
        sizes = {k: v for k, v in SIZES.items() if k != "rms_norm_eps" or self.model_type != "olmo"}
        return {"model_type": self.model_type, **sizes, **self.tree}

    def config(self, length: int | None = None) -> ModelConfig:
        return parse_config(self.config_json, place="case", rope_length=length)


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **numbers}}


CASES = {
    "llama": Case("llama", {"attention_bias": True, "mlp_bias": True, "rope_theta": 5000.0}),
    "llama_gelu": Case("llama", {"hidden_act": "gelu", "tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama3": Case(
        "llama",
        rope(
            "llama3", factor=8.0, low_freq_factor=1.5, high_freq_factor=5.0, original_max_position_embeddings=ORIGINAL
        ),
    ),
    "linear": Case("llama", rope("linear", factor=4.0)),
    "dynamic": Case("llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": ORIGINAL}),
    "yarn": Case(
        "llama", rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, beta_fast=4.0, beta_slow=0.25)
    ),
    "yarn_exact": Case(
        "qwen2",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=ORIGINAL,
            truncate=False,
            mscale=2.0,
            mscale_all_dim=0.5,
        ),
    ),
    "mistral": Case("mistral", {"sliding_window": WINDOW, "head_dim": 12}),
    "nemo": Case("mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": Case("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": Case(
        "qwen3",
        {
            "head_dim": 20,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 3,
        },
    ),
    "gemma": Case("gemma", {"head_dim": 20, "num_key_value_heads": 1}),
    "gemma2": Case(
        "gemma2",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "final_logit_softcapping": 1.5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": Case("phi3", {"sliding_window": WINDOW, "partial_rotary_factor": 0.5}),
    "phi4": Case(
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": ORIGINAL,
            **rope(
                "longrope",
                partial_rotary_factor=0.75,
                short_factor=FACTORS,
                long_factor=[2.0 * x for x in FACTORS],
                original_max_position_embeddings=ORIGINAL,
            ),
        },
    ),
    "olmo": Case("olmo", {"clip_qkv": 0.5}),
    "olmo2": Case("olmo2", {"rope_theta": 5000.0}),
    "olmo3": Case(
        "olmo3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 5000.0,
                    "original_max_position_embeddings": ORIGINAL,
                    "attention_factor": 1.3,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    "smollm3": Case("smollm3", {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layer_interval": 2}),
    "smollm3_biased": Case("smollm3", {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [0, 1, 1, 0]}),
    "ministral3": Case(
        "ministral3",
        {
            "head_dim": 16,
            "sliding_window": None,
            **rope(
                "yarn",
                type="yarn",
                factor=4.0,
                original_max_position_embeddings=ORIGINAL,
                max_position_embeddings=320,
                beta_fast=4.0,
                beta_slow=0.25,
                mscale=1.0,
                mscale_all_dim=0.5,
                llama_4_scaling_beta=0.5,
            ),
        },
    ),
    "granite4": Case(
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 56,
            "intermediate_size": 40,
            "layer_types": ["full_attention"] * 4,
            "position_embedding_type": "rope",
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.4,
            "logits_scaling": 1.7,
            "rope_theta": 5000.0,
            "mamba_n_heads": 4,
            "mamba_d_head": 48,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.4,
            "logits_scaling": 1.7,
            "attention_bias": True,
        },
    ),
    "seed_oss": Case("seed_oss", {"head_dim": 20, "attention_out_bias": True, "rope_theta": 5000.0}),
    "exaone4": Case("exaone4", {"sliding_window": WINDOW, "rope_theta": 5000.0}),
    "exaone4_small": Case(
        "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True}
    ),
    "ernie4_5": Case("ernie4_5", {"head_dim": 20, "use_bias": True}),
    "glm": Case("glm", {"head_dim": 20, "partial_rotary_factor": 0.6, "rope_theta": 5000.0}),
    "glm4": Case("glm4", {"head_dim": 16, "attention_bias": False}),
    "qwen3_5": Case(
        "qwen3_5_text",
        {
            "head_dim": 16,
            **DELTA,
            **rope("default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
        },
    ),
    "qwen3_5_odd": Case(
        "qwen3_5_text",
        {
            "head_dim": 24,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "layer_types": [f"{kind}_attention" for kind in ("full", "linear", "linear", "full")],
            **DELTA,
            "linear_num_key_heads": 5,
            "linear_num_value_heads": 5,
            "linear_conv_kernel_dim": 3,
        },
    ),
    "lfm2": Case("lfm2", {"norm_eps": 1e-2, "full_attn_idxs": [2], "conv_bias": True, "block_multiple_of": 8}),
    "lfm2_plain": Case(
        "lfm2",
        {
            "norm_eps": 1e-2,
            "layer_types": ["full_attention", "conv", "full_attention", "conv"],
            "conv_L_cache": 5,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
}
