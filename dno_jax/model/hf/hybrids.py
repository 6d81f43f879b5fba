"""Families whose layers do not all attend; see families.py, whose entries these are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dno_jax.model.hf.family import LLAMA_NAMES, Family, Values

_DELTA_NAMES = dict.fromkeys(("delta_q", "delta_k", "delta_v"), "linear_attn.in_proj_qkv")
_DELTA_NAMES |= dict.fromkeys(("delta_q_conv", "delta_k_conv", "delta_v_conv"), "linear_attn.conv1d")
_DELTA_NAMES |= {
    "delta_gate": "linear_attn.in_proj_z",
    "delta_strength": "linear_attn.in_proj_b",
    "delta_decay": "linear_attn.in_proj_a",
    "delta_rate": "linear_attn.A_log",
    "delta_shift": "linear_attn.dt_bias",
    "delta_norm": "linear_attn.norm",
    "delta_out": "linear_attn.out_proj",
}
_LFM2_NAMES = {
    "attention_norm": "operator_norm",
    "mlp_norm": "ffn_norm",
    "o": "self_attn.out_proj",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
    **dict.fromkeys(("conv_in_gate", "conv_out_gate", "conv_value"), "conv.in_proj"),
    "conv_taps": "conv.conv",
    "conv_out": "conv.out_proj",
}
# How weights are drawn at the start, and what the first files repeat.
_LFM2_HARMLESS = frozenset({"block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init"})
_LFM2_HARMLESS |= {"conv_use_xavier_init", "theta"}
_LFM2_THETA = 1_000_000.0


def _every(values: Values) -> list[str]:
    interval = values["full_attention_interval"]
    return [
        "full_attention" if (layer + 1) % interval == 0 else "linear_attention"
        for layer in range(values["num_hidden_layers"])
    ]


def _listed(values: Values) -> list[str]:
    listed, count = values["full_attn_idxs"], values["num_hidden_layers"]
    if listed is None:
        return ["full_attention"] * count
    if not isinstance(listed, list) or not all(type(layer) is int and 0 <= layer < count for layer in listed):
        raise ValueError(f"full_attn_idxs is {listed!r:.80}; expected numbers of {count} layers, from 0")
    return ["full_attention" if layer in listed else "conv" for layer in range(count)]


def _lfm2_sizes(values: Values) -> dict[str, Any]:
    """What LFM2's class makes of the MLP's width."""
    ropes = [values.get("rope_parameters"), values.get("rope_scaling"), values, {"rope_theta": _LFM2_THETA}]
    theta = next(rope["rope_theta"] for rope in ropes if isinstance(rope, Mapping) and "rope_theta" in rope)
    if values.get("theta") not in (None, theta):
        raise ValueError(f"theta is {values['theta']!r}, but rope_theta is {theta!r}; make them equal")
    width, factor, multiple = (
        values[name] for name in ("intermediate_size", "block_ffn_dim_multiplier", "block_multiple_of")
    )
    if type(values["block_auto_adjust_ff_dim"]) is not bool:
        raise ValueError(f"block_auto_adjust_ff_dim is {values['block_auto_adjust_ff_dim']!r}; expected bool")
    if not values["block_auto_adjust_ff_dim"]:
        return {}
    if type(factor) not in (int, float) or not 0 < factor < 1e6:
        raise ValueError(f"block_ffn_dim_multiplier is {factor!r}; expected a positive number")
    return {"intermediate_size": -(-int(factor * int(2 * width / 3)) // multiple) * multiple}


HYBRIDS: dict[str, Family] = {
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        reward="Qwen3_5TextForSequenceClassification",
        keys={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "partial_rotary_factor": 0.25,
            "layer_types": None,
            "full_attention_interval": 4,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
        },
        only={"hidden_act": ("silu",), "attn_output_gate": (True,), "mlp_only_layers": ([], None)},
        harmless=frozenset({"mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}),
        meaning=(
            ("linear_conv_kernel_dim", "conv_kernel", int, None),
            *(
                (name, name, int, None)
                for name in (
                    "linear_num_key_heads",
                    "linear_num_value_heads",
                    "linear_key_head_dim",
                    "linear_value_head_dim",
                )
            ),
        ),
        fixed={"qk_norm": "head", "norm_offset": 1.0, "attention_gate": True},
        # Of a text all three positions are one, however they are spread over dimensions.
        rope_extra=frozenset({"mrope_section", "mrope_interleaved"}),
        mixers={"full_attention": "attention", "linear_attention": "gated_delta"},
        kinds=_every,
        carried="mtp.",
        names=LLAMA_NAMES | _DELTA_NAMES,
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        keys={
            "num_key_value_heads": 8,
            "max_position_embeddings": 128_000,
            "tie_word_embeddings": True,
            "norm_eps": 1e-5,
            "conv_L_cache": 3,
            "conv_bias": False,
            "layer_types": None,
            "full_attn_idxs": None,
            "block_auto_adjust_ff_dim": True,
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 256,
        },
        only={"block_use_swiglu": (True,), "use_pos_enc": (True,), "hidden_act": ("silu",)},
        harmless=_LFM2_HARMLESS,
        instead={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
        same={
            "block_dim": "hidden_size",
            "block_norm_eps": "norm_eps",
            "conv_dim": "hidden_size",
            "conv_dim_out": "hidden_size",
            "num_heads": "num_attention_heads",
        },
        meaning=(
            ("norm_eps", "rms_norm_eps", float, None),
            ("conv_L_cache", "conv_kernel", int, None),
            ("conv_bias", "conv_bias", bool, None),
        ),
        fixed={"qk_norm": "head"},
        mixers={"full_attention": "attention", "conv": "short_conv"},
        kinds=_listed,
        derived=_lfm2_sizes,
        theta=_LFM2_THETA,
        final_norm="embedding_norm",
        names=LLAMA_NAMES | _LFM2_NAMES,
    ),
}
