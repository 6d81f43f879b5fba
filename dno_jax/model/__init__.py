"""The policy: one decoder for every family, its cache, its tokenizer, and Hugging Face checkpoints in and out."""

from dno_jax.model import hf
from dno_jax.model.cache import KVCache, cache_axes, grow_cache, init_cache, repeat_cache
from dno_jax.model.config import ModelConfig, RopeConfig
from dno_jax.model.decoder import (
    Decoder,
    abstract_params,
    head_logprobs,
    init_params,
    logits,
    param_axes,
)
from dno_jax.model.tokenizer import ChatTokenizer, TemplateStrip, template_strip

__all__ = [
    "ChatTokenizer",
    "Decoder",
    "KVCache",
    "ModelConfig",
    "RopeConfig",
    "TemplateStrip",
    "abstract_params",
    "cache_axes",
    "grow_cache",
    "head_logprobs",
    "hf",
    "init_cache",
    "init_params",
    "logits",
    "param_axes",
    "repeat_cache",
    "template_strip",
]
