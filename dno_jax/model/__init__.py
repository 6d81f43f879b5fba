"""The policy: a Llama-family decoder, its cache, its tokenizer, and the way to and from Hugging Face checkpoints."""

from dno_jax.model import hf
from dno_jax.model.cache import KVCache, cache_axes, grow_cache, init_cache, repeat_cache
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import (
    Decoder,
    abstract_params,
    init_params,
    logits,
    output_head,
    param_axes,
)
from dno_jax.model.templates import Finding, TemplateStrip, lint, template_strip
from dno_jax.model.tokenizer import ChatTokenizer
from dno_jax.model.truncation import shorten_chat

__all__ = [
    "ChatTokenizer",
    "Decoder",
    "Finding",
    "KVCache",
    "ModelConfig",
    "TemplateStrip",
    "abstract_params",
    "cache_axes",
    "grow_cache",
    "hf",
    "init_cache",
    "init_params",
    "lint",
    "logits",
    "output_head",
    "param_axes",
    "repeat_cache",
    "shorten_chat",
    "template_strip",
]
