"""Keys of config.json that do not tell one decoder from another: what may stand there, and what none can have."""

from __future__ import annotations

import math
import re
from typing import Any

from dno_jax.errors import DnoError

# They say nothing about the arithmetic of a forward pass.
HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "cache_implementation",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "initializer_range",
    "is_decoder",
    "model_max_length",
    "model_type",
    "pad_token_id",
    "sep_token_id",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "use_flash_attention",
    "use_flash_attention_2",
    "use_flash_attn",
    # What a forward pass returns beside logits.
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    # Of other models and frameworks: every file of transformers 4 that was written whole has them.
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "prefix",
    "problem_type",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "use_bfloat16",
    # How texts are drawn: generation_config.json of old.
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}
HARMLESS_PREFIXES = ("unsloth_",)
# What transformers writes of the labels that a classifier tells apart. A reward model has one.
LABELS = {"id2label", "label2id", "num_labels", "problem_type"}
# Understood, but only at these values where the family says no more of them: anything else changes the arithmetic, or
# would if transformers read it.
ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_bias": (False, None),
    "attn_logit_softcapping": (None,),
    "chunk_size_feed_forward": (0, None),
    "clip_qkv": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False, None),
    "lm_head_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
    "pruned_heads": ({}, [], None),
    "qk_layernorm": (False, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "use_mrope": (False, None),
    "use_qk_norm": (False, None),
    "use_sliding_window": (False, None),
}
# Shares that training would drop at random. Nothing is dropped here, where log-probabilities are compared.
DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "embd_dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "mlp_dropout",
    "resid_dropout",
    "resid_pdrop",
    "residual_dropout",
)
# Several times what the largest published models have. Beyond, shapes alone would not fit into memory.
LIMITS = {
    "vocab_size": 1 << 23,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 22,
    "moe_intermediate_size": 1 << 22,
    "shared_intermediate_size": 1 << 22,
    "num_hidden_layers": 2_000,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "linear_num_key_heads": 1 << 14,
    "linear_num_value_heads": 1 << 14,
    "linear_key_head_dim": 1 << 14,
    "linear_value_head_dim": 1 << 14,
    "linear_conv_kernel_dim": 1 << 10,
    "conv_L_cache": 1 << 10,
    "block_multiple_of": 1 << 22,
    "num_experts": 1 << 13,
    "num_local_experts": 1 << 13,
    "max_position_embeddings": 1 << 40,
}
MAX_EXPERTS = 1 << 17  # over all layers
MAX_NUMBER = 1e30  # of any setting: float32 holds it, and its square root and inverse


def is_dropout(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < 1 and math.isfinite(value))


def shown(value: Any) -> str:
    """A value for a message, cut to a length that can be read."""
    if type(value) is int and abs(value) >= 1 << 256:
        return "a number of many digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_class(named: Any, expected: str, *, place: str) -> bool:
    """Whether `architectures` names a class, maybe one wrapped around it (FSDPLlamaForCausalLM), its body, or none."""
    if named in (None, []):
        return True
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise DnoError(f"{place}: architectures is {named!r}; expected a list of names")
    body = re.sub("For[A-Z].*", "Model", expected)
    return all(name.lower().endswith((expected.lower(), body.lower())) for name in named)
