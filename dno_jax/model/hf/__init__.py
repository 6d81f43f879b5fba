"""Hugging Face checkpoints in and out: safetensors files to and from our parameter tree."""

from dno_jax.model.hf.config_json import read_config, read_end_token_ids
from dno_jax.model.hf.exporter import save
from dno_jax.model.hf.importer import load

__all__ = ["load", "read_config", "read_end_token_ids", "save"]
