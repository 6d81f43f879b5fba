"""Hugging Face checkpoints in and out: safetensors files to and from our parameter tree."""

from dno_jax.model.hf.card import ExportFacts, HeldOutRate
from dno_jax.model.hf.classifiers import head_of, reward_shape
from dno_jax.model.hf.config_json import read_config, read_dropout, read_end_token_ids, read_pad_token_id
from dno_jax.model.hf.exporter import MAX_SHARD_BYTES, check_replaceable, save, stored_shapes
from dno_jax.model.hf.files import weight_files
from dno_jax.model.hf.hub import folder
from dno_jax.model.hf.importer import check, load
from dno_jax.model.hf.rows import untrained_rows

__all__ = [
    "MAX_SHARD_BYTES",
    "ExportFacts",
    "HeldOutRate",
    "check",
    "check_replaceable",
    "folder",
    "head_of",
    "load",
    "read_config",
    "read_dropout",
    "read_end_token_ids",
    "read_pad_token_id",
    "reward_shape",
    "save",
    "stored_shapes",
    "untrained_rows",
    "weight_files",
]
