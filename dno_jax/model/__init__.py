"""The policy: one decoder for every family, its cache, its tokenizer, and Hugging Face checkpoints in and out."""

from dno_jax.model import hf
from dno_jax.model.cache import KVCache, cache_axes, init_cache
from dno_jax.model.config import ModelConfig, RopeConfig
from dno_jax.model.decoder import Decoder, head_logprobs, logits
from dno_jax.model.params import abstract_params, init_params, param_axes, unstack_layers
from dno_jax.model.text.templates import Finding, TemplateStrip, lint, template_strip
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.model.text.truncation import shorten_chat

__all__ = [
    "ChatTokenizer",
    "Decoder",
    "Finding",
    "KVCache",
    "ModelConfig",
    "RopeConfig",
    "TemplateStrip",
    "abstract_params",
    "cache_axes",
    "head_logprobs",
    "hf",
    "init_cache",
    "init_params",
    "lint",
    "logits",
    "param_axes",
    "shorten_chat",
    "template_strip",
    "unstack_layers",
]
