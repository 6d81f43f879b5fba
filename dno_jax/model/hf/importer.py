"""Checkpoint files to sharded arrays."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dno_jax.model.config import ModelConfig
from dno_jax.model.hf.config_json import read_config
from dno_jax.model.hf.files import TensorFiles
from dno_jax.model.hf.tensors import Tensor, tensor_table


def load(path: str | Path, *, shardings: Any = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        path: directory with config.json and model.safetensors, or its index and shards (bfloat16, float16 or float32).
        shardings: tree of jax.sharding.Sharding like the parameters; each device's slice is then read from the files
            alone, so that no host ever holds the model. None returns numpy arrays.

    Returns:
        (config, params), params float32 in the tree of decoder.abstract_params(config).

    Raises:
        DnoError: a file is missing, truncated or corrupt; a tensor is missing, unexpected, or of another shape or dtype
            than config.json says; or config.json is not understood.
    """
    path = Path(path)
    config = read_config(path)
    table = tensor_table(config)
    with contextlib.closing(TensorFiles(path)) as files:
        files.check(table, tied=config.tie_word_embeddings, place=path)
        params: dict[str, Any] = {}
        for tensor in table:
            shape = tensor.stack + tensor.shape
            if shardings is None:
                array: Any = tensor.read(files, (slice(None),) * len(shape))
            else:
                sharding = tree_leaf(shardings, tensor.path)
                read = _Reader(tensor, files)
                array = jax.make_array_from_callback(shape, sharding, read)
                array.block_until_ready()
            _put(params, tensor.path, array)
    return config, params


@dataclass(frozen=True)
class _Reader:
    tensor: Tensor
    files: TensorFiles

    def __call__(self, index: Any) -> np.ndarray:
        return self.tensor.read(self.files, index)


def tree_leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
