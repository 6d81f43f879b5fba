"""The safetensors files of a checkpoint: found, compared with what config.json promises, and read slice by slice."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dno_jax.errors import DnoError
from dno_jax.model.hf.config_json import read_json
from dno_jax.model.hf.tensors import Tensor

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# Buffers that old checkpoints carry; they follow from config.json.
_IGNORED_SUFFIXES = (".self_attn.rotary_emb.inv_freq",)
_COMPARED_BYTES = 1 << 24


@dataclass(frozen=True)
class Header:
    """What a header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """The safetensors files of a checkpoint, open for reading slices.

    Raises:
        DnoError: a file is missing, truncated or corrupt, or the index and the files disagree.
    """

    def __init__(self, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        self.headers = read_headers(path)
        self._progress = progress
        self._lock = threading.Lock()
        self._open: dict[Path, Any] = {}
        with contextlib.ExitStack() as stack:
            for file in dict.fromkeys(stored.file for stored in self.headers.values()):
                self._open[file] = stack.enter_context(_opened(file))
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def check(self, table: list[Tensor], *, tied: bool, place: Path) -> None:
        """Compare names, shapes and dtypes of everything before anything is read; one error names all that is wrong."""
        expected = {name: tensor.hf_shape for tensor in table for name in tensor.names}
        missing = sorted(expected.keys() - self.headers.keys())
        extra = [name for name in self.headers.keys() - expected.keys() if not name.endswith(_IGNORED_SUFFIXES)]
        surplus = sorted(name for name in extra if not (tied and name == HEAD))
        wrong = [f"tensor {name} is missing; expected shape {expected[name]}" for name in missing]
        wrong += [f"{self.headers[name].file.name}: unexpected tensor {name}" for name in surplus]
        if surplus:
            wrong[-1] += (
                " (config.json describes a model without it; biases are declared by attention_bias and mlp_bias, "
                "a head by tie_word_embeddings)"
            )
        for name in sorted(expected.keys() & self.headers.keys()):
            stored, shape = self.headers[name], expected[name]
            if stored.shape != shape:
                wrong.append(f"{stored.file.name}: tensor {name} has shape {stored.shape}; config.json says {shape}")
            if stored.dtype not in ITEM_BYTES:
                wrong.append(f"{stored.file.name}: tensor {name} has dtype {stored.dtype}; expected {_DTYPES}")
        if wrong:
            raise DnoError("\n  ".join([f"{place}: files and config.json disagree", *wrong]))
        if tied and HEAD in self.headers:
            self._check_tied(expected)

    def _check_tied(self, expected: dict[str, tuple[int, ...]]) -> None:
        # Some exporters write the tied head a second time; a head that differs would be dropped in silence.
        head, embed = self.headers[HEAD], self.headers[EMBED]
        rows = max(1, _COMPARED_BYTES // (4 * math.prod(expected[EMBED][1:])))
        same = head.shape == embed.shape and head.dtype in ITEM_BYTES
        for start in range(0, embed.shape[0] if same else 0, rows):
            index = (slice(start, min(start + rows, embed.shape[0])), slice(None))
            same = same and np.array_equal(self._slice(HEAD, index), self._slice(EMBED, index))
        if not same:
            raise DnoError(
                f"{head.file}: tie_word_embeddings is true but {HEAD} differs from {EMBED}; "
                "set tie_word_embeddings to false in config.json or remove the tensor"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a part of a tensor as float32, and count the bytes of the part."""
        part = self._slice(name, index)
        if self._progress is not None:
            with self._lock:
                self._progress(part.nbytes)
        return part.astype(np.float32, copy=False)

    def _slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._open[self.headers[name].file].get_slice(name)[index]


_DTYPES = ", ".join(ITEM_BYTES)


def read_headers(path: Path) -> dict[str, Header]:
    """Return what the headers of all files of a checkpoint say, in the order of the files.

    Raises:
        DnoError: as TensorFiles.
    """
    if (path / SINGLE_FILE).exists():
        return read_header(path / SINGLE_FILE)
    if not (path / INDEX_FILE).exists():
        raise DnoError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors checkpoints can be read")
    index, shard_of = _weight_map(path)
    found: dict[str, Header] = {}
    for shard in sorted(set(shard_of.values())):
        for name, stored in read_header(path / shard).items():
            if name in found:
                raise DnoError(f"{stored.file}: tensor {name} stands in {found[name].file.name} too")
            found[name] = stored
    misplaced = [
        f"{name} (the index says {shard_of.get(name, 'nothing')}, it is in "
        f"{found[name].file.name if name in found else 'none of its files'})"
        for name in sorted(shard_of.keys() | found.keys())
        if name not in found or found[name].file.name != shard_of.get(name)
    ]
    if misplaced:
        raise DnoError(
            f"{index}: index and files disagree on tensor {', '.join(misplaced)}; fetch the checkpoint again"
        )
    return found


def _weight_map(path: Path) -> tuple[Path, dict[str, str]]:
    try:
        file, tree = read_json(path, INDEX_FILE)
    except RecursionError:
        raise DnoError(f"{path / INDEX_FILE}: not valid JSON: nested too deeply") from None
    weight_map = tree.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DnoError(f"{file}: no weight_map")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and not set(shard) & set("/\\\0")
        if not plain:
            raise DnoError(f"{file}: shard {shard!r} of tensor {name} is not a file name in this directory")
    return file, weight_map


def read_header(file: Path) -> dict[str, Header]:
    """Return what a safetensors file says it holds; the library compares that with the file's length.

    Raises:
        DnoError: the file is missing, truncated or corrupt.
    """
    with _opened(file) as found:
        parts = {name: found.get_slice(name) for name in found.keys()}  # noqa: SIM118, it is no mapping
        return {name: Header(file, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def _opened(file: Path) -> Any:
    """Map a file, to be closed by `with`."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise DnoError(f"{file}: no such file; the checkpoint is incomplete, fetch it again")
    if not file.is_file():
        raise DnoError(f"{file}: not a regular file; expected a safetensors file")
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise DnoError(f"{file}: truncated or corrupt safetensors file ({why:.300}); fetch it again") from None
