"""What is particular to each family of models: one entry per model_type, data only.

An entry says which keys of config.json are understood (and what transformers assumes where one is absent), which are
so at some values alone, what the family fixes, and how its files name tensors. The arithmetic is ModelConfig's.
"""

from __future__ import annotations

import math

from dno_jax.model.hf.family import LLAMA_NAMES as _NAMES
from dno_jax.model.hf.family import Family, Meaning, Values
from dno_jax.model.hf.hybrids import HYBRIDS

# The same name means different things: post_attention_layernorm stands before the MLP in Llama, after attention here.
_POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
# Mixtral's w1, w3 and w2 are gate, up and down.
_MIXTRAL_EXPERTS = {
    "router": "block_sparse_moe.gate",
    "gate": "block_sparse_moe.experts.{}.w1",
    "up": "block_sparse_moe.experts.{}.w3",
    "down": "block_sparse_moe.experts.{}.w2",
}
_QWEN_EXPERTS = {"router": "mlp.gate"} | {leaf: f"mlp.experts.{{}}.{leaf}_proj" for leaf in ("gate", "up", "down")}
_SHARED_MLP = dict.fromkeys(("gate", "up"), "shared_mlp.input_linear") | {"down": "shared_mlp.output_linear"}
_FUSED_MLP = dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")
_FUSED = dict.fromkeys("qkv", "self_attn.qkv_proj") | _FUSED_MLP


def _in_all(values: Values, layer: int) -> bool:
    del layer
    return values["sliding_window"] is not None


def _in_upper(values: Values, layer: int) -> bool:
    return values["sliding_window"] is not None and layer >= values["max_window_layers"]


_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_EXPERTS: tuple[Meaning, ...] = (
    ("num_local_experts", "num_experts", int, None),
    ("num_experts_per_tok", "num_experts_per_tok", int, None),
)
# The weight of the load-balance loss is the run's to choose, not the checkpoint's.
_ROUTER_LOSS = frozenset({"output_router_logits", "router_aux_loss_coef"})
# Of Granite's recurrent layers, which a dense one has not.
_MAMBA = frozenset(
    f"mamba_{name}"
    for name in (
        "n_heads",
        "n_groups",
        "d_state",
        "d_head",
        "d_conv",
        "expand",
        "chunk_size",
        "conv_bias",
        "proj_bias",
    )
) | {"time_step_limit", "time_step_min", "time_step_max", "layers_block_type"}
_GEMMA = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_GEMMA_2 = {
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": None,
    "sliding_window": 4096,
    "layer_types": None,
}
_GEMMA_ONLY = {"use_bidirectional_attention": (False, None)}
_GEMMA_FIXED = {"norm_offset": 1.0}
_EMBED_SCALE: tuple[Meaning, ...] = (("hidden_size", "embed_scale", int, math.sqrt),)
# Norms of inputs keep Llama's names here; those of outputs have names of their own.
_GLM_4_NORMS = {"attention_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"}
_GLM = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
_OLMO_2 = {"num_key_value_heads": None, "max_position_embeddings": 2048, "attention_bias": False}
_OLMO_2_FIXED = {"pre_norm": False, "post_norm": True, "qk_norm": "all"}
_DENSE: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        reward="LlamaForSequenceClassification",
        keys={
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
        only={"pretraining_tp": (1, None), "sliding_window": (None,), "rope_interleaved": (False,)},
        harmless=frozenset({"is_llama_config"}),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        reward="MistralForSequenceClassification",
        keys={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        sliding=_in_all,
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        reward="Ministral3ForSequenceClassification",
        keys={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        # Queries grow by the first; the second repeats an entry of config.json.
        rope_extra=frozenset({"llama_4_scaling_beta", "max_position_embeddings"}),
        sliding=_in_all,
        theta=1_000_000.0,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        reward="Qwen2ForSequenceClassification",
        keys=_QWEN,
        only={"use_mrope": (False,)},
        fixed={"attention_bias": True},
        sliding=_in_upper,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        reward="Qwen3ForSequenceClassification",
        keys=_QWEN | {"head_dim": 128, "attention_bias": False},
        fixed={"qk_norm": "head"},
        sliding=_in_upper,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        reward="MixtralForSequenceClassification",
        keys={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        only={"router_jitter_noise": (0.0, None)},
        harmless=_ROUTER_LOSS,
        meaning=_EXPERTS,
        sliding=_in_all,
        theta=1_000_000.0,
        names=_NAMES | _MIXTRAL_EXPERTS,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        reward="Qwen3MoeForSequenceClassification",
        keys={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
            "num_experts": None,  # published files; transformers 5 writes num_local_experts
            "num_local_experts": None,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        only={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
        harmless=_ROUTER_LOSS | {"max_window_layers"},  # where it slides, it slides in every layer
        same={"num_local_experts": "num_experts"},
        meaning=(
            *_EXPERTS,
            ("num_experts", "num_experts", int, None),
            ("moe_intermediate_size", "intermediate_size", int, None),
            ("norm_topk_prob", "expert_norm", bool, None),
        ),
        fixed={"qk_norm": "head"},
        sliding=_in_all,
        names=_NAMES | _QWEN_EXPERTS,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        reward="GemmaForSequenceClassification",
        keys=_GEMMA | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
        # The first files say gelu where the tanh is meant; transformers reads both so.
        only=_GEMMA_ONLY
        | {"hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": (None, "gelu_pytorch_tanh")},
        meaning=_EMBED_SCALE,
        fixed=_GEMMA_FIXED | {"hidden_act": "gelu_tanh"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        reward="Gemma2ForSequenceClassification",
        keys=_GEMMA | _GEMMA_2 | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        only=_GEMMA_ONLY,
        harmless=frozenset({"cache_implementation"}),
        same={"sliding_window_size": "sliding_window", "hidden_act": "hidden_activation"},
        meaning=_EMBED_SCALE,
        fixed=_GEMMA_FIXED | {"post_norm": True},
        sliding=lambda values, layer: (layer + 1) % 2 != 0,
        names=_NAMES | _POST_NORMS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        reward="Gemma3TextForSequenceClassification",
        keys=_GEMMA
        | _GEMMA_2
        | {"max_position_embeddings": 131072, "sliding_window_pattern": 6, "rope_local_base_freq": None},
        # transformers reads the soft-cap of scores and does not apply it.
        only=_GEMMA_ONLY | {"attn_logit_softcapping": (None,)},
        harmless=frozenset({"cache_implementation"}),
        same={"_sliding_window_pattern": "sliding_window_pattern", "hidden_act": "hidden_activation"},
        meaning=_EMBED_SCALE,
        fixed=_GEMMA_FIXED | {"post_norm": True, "qk_norm": "head"},
        sliding=lambda values, layer: (layer + 1) % values["sliding_window_pattern"] != 0,
        theta=1_000_000.0,
        local_theta=10_000.0,
        names=_NAMES | _POST_NORMS,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        reward="Phi3ForSequenceClassification",
        keys={
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
        },
        only={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "lm_head_bias": (False,),
            "embd_pdrop": (0, None),
            "resid_pdrop": (0, None),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
        },
        harmless=frozenset({"auto_map"}),  # names Microsoft's own code, which transformers has taken over
        sliding=_in_all,
        names=_NAMES | _FUSED,
    ),
    "olmo": Family(
        "OlmoForCausalLM",
        reward="OlmoForSequenceClassification",
        keys={
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "clip_qkv": None,
        },
        fixed={"norm": "layer", "rms_norm_eps": 1e-5},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        reward="Olmo2ForSequenceClassification",
        keys=_OLMO_2 | {"rms_norm_eps": 1e-5},
        fixed=_OLMO_2_FIXED,
        names=_NAMES | _POST_NORMS,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        reward="Olmo3ForSequenceClassification",
        keys=_OLMO_2 | {"rms_norm_eps": 1e-5, "sliding_window": 4096, "layer_types": None},
        fixed=_OLMO_2_FIXED,
        sliding=lambda values, layer: (layer + 1) % 4 != 0,
        theta=500_000.0,
        local_theta=500_000.0,
        names=_NAMES | _POST_NORMS,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        reward="SmolLM3ForSequenceClassification",
        keys={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        harmless=frozenset({"max_window_layers", "pretraining_tp"}),
        sliding=lambda values, layer: values["sliding_window"] is not None and not values["no_rope_layers"][layer],
        theta=2_000_000.0,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        keys={
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        keys={
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
            "shared_intermediate_size": 1024,
            "position_embedding_type": None,
            "layer_types": None,
        },
        only={"num_local_experts": (0,), "normalization_function": ("rmsnorm",)},
        harmless=_ROUTER_LOSS | _MAMBA | {"num_experts_per_tok", "init_method"},
        meaning=(("shared_intermediate_size", "intermediate_size", int, None),),
        layer_kinds=("attention", "full_attention"),
        names=_NAMES | _SHARED_MLP,
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        reward="SeedOssForSequenceClassification",
        keys={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
        },
        meaning=(("attention_out_bias", "output_bias", bool, None),),
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        reward="Exaone4ForSequenceClassification",
        keys={
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "layer_types": None,
        },
        only={"sliding_window_pattern": (4, "LLLG", 0, None)},
        fixed={"pre_norm": False, "post_norm": True, "qk_norm": "head"},
        sliding=lambda values, layer: values["sliding_window"] is not None and (layer + 1) % 4 != 0,
        rotates_in_windows=True,
        names=_NAMES | _POST_NORMS,
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        keys={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "use_bias": False,
        },
        meaning=tuple(("use_bias", bias, bool, None) for bias in ("attention_bias", "output_bias", "mlp_bias")),
        theta=500_000.0,
        interleaved=True,
    ),
    "glm": Family(
        "GlmForCausalLM",
        reward="GlmForSequenceClassification",
        keys=_GLM,
        fixed={"output_bias": False},
        interleaved=True,
        names=_NAMES | _FUSED_MLP,
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        reward="Glm4ForSequenceClassification",
        keys=_GLM,
        fixed={"output_bias": False, "post_norm": True},
        interleaved=True,
        names=_NAMES | _FUSED_MLP | _GLM_4_NORMS,
    ),
}

FAMILIES = _DENSE | HYBRIDS
