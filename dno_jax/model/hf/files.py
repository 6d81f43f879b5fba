"""The safetensors files of a checkpoint: found, compared with what config.json promises, and read slice by slice."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from dno_jax.errors import DnoError
from dno_jax.model.hf.config_json import read_json
from dno_jax.model.hf.tensors import Tensor

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = ("F32", "F16", "BF16")
# Buffers that old checkpoints carry; they follow from config.json.
_IGNORED_SUFFIXES = (".self_attn.rotary_emb.inv_freq",)


class TensorFiles:
    """The safetensors files of a checkpoint, open for reading slices."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._tensor_file: dict[str, Any] = {}
        self._place: dict[str, Path] = {}
        self._stack = contextlib.ExitStack()
        for file in _shards(path):
            try:
                opened = self._stack.enter_context(safe_open(str(file), framework="numpy"))
            except FileNotFoundError:
                self.close()
                raise DnoError(f"{file}: no such file; the checkpoint is incomplete, fetch it again") from None
            except (SafetensorError, OSError) as error:
                self.close()
                raise DnoError(f"{file}: truncated or corrupt safetensors file ({error}); fetch it again") from None
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in self._place:
                    self.close()
                    raise DnoError(f"{file}: tensor {name} stands in {self._place[name].name} too")
                self._tensor_file[name], self._place[name] = opened, file

    def close(self) -> None:
        self._stack.close()

    def check(self, table: list[Tensor], *, tied: bool, place: Path) -> None:
        """Compare names, shapes and dtypes of everything before anything is read."""
        expected = {name: tensor.hf_shape for tensor in table for name in tensor.names}
        for name in sorted(expected.keys() - self._place.keys()):
            raise DnoError(f"{place}: tensor {name} is missing; expected shape {expected[name]}")
        for name in sorted(self._place.keys() - expected.keys()):
            if tied and name == "lm_head.weight":
                self._check_tied()
            elif not name.endswith(_IGNORED_SUFFIXES):
                raise DnoError(
                    f"{self._place[name]}: unexpected tensor {name}; config.json describes a model without it "
                    "(biases are declared by attention_bias and mlp_bias, a head by tie_word_embeddings)"
                )
        for name, shape in expected.items():
            view = self._tensor_file[name].get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise DnoError(
                    f"{self._place[name]}: tensor {name} has shape {tuple(view.get_shape())}; config.json says {shape}"
                )
            if view.get_dtype() not in _DTYPES:
                raise DnoError(
                    f"{self._place[name]}: tensor {name} has dtype {view.get_dtype()}; expected {', '.join(_DTYPES)}"
                )

    def _check_tied(self) -> None:
        # Some exporters write the tied head a second time; a head that differs would be dropped in silence.
        name, file = "lm_head.weight", self._tensor_file["lm_head.weight"]
        embed = self._tensor_file["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight")
        if not np.array_equal(file.get_tensor(name), embed):
            raise DnoError(
                f"{self._place[name]}: tie_word_embeddings is true but {name} differs from model.embed_tokens.weight; "
                "set tie_word_embeddings to false in config.json or remove the tensor"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._tensor_file[name].get_slice(name)[index].astype(np.float32)


def _shards(path: Path) -> list[Path]:
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    if not (path / INDEX_FILE).exists():
        raise DnoError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors checkpoints can be read")
    file, tree = read_json(path, INDEX_FILE)
    weight_map = tree.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DnoError(f"{file}: no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise DnoError(f"{file}: shard {name!r} is not a file name in this directory")
    return [path / name for name in names]
