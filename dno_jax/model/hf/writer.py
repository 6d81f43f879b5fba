"""Which tensor goes into which file in which dtype, and a safetensors file written as its tensors come.

The library's own save_file wants a whole shard in memory. The bytes are the same: see its format,
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.hf.config_json import carried_names, has_tower, read_json
from dno_jax.model.hf.files import (
    EMBED,
    HEAD,
    INDEX_FILE,
    SINGLE_FILE,
    Header,
    read_headers,
    read_whole,
)
from dno_jax.model.hf.tensors import Tensor, stored_tensors, tensor_table

# In the order in which the library lays out tensors of several dtypes.
DTYPES = {
    "I64": np.dtype(np.int64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """One tensor of the files.

    Attributes:
        parts: the parameters whose rows it holds, in order, each with the index of one layer (empty: not stacked).
        carried: where the source has it, if it is no parameter of the language model but of a tower beside it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[tuple[Tensor, tuple[int, ...]], ...]
    carried: Header | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def compose(self, layers: Sequence[np.ndarray]) -> np.ndarray:
        """Return the tensor in the layout and dtype of the file, from one array a part."""
        if self.carried is not None:
            return read_whole(self.carried)
        # Narrowed first, then moved as integers: less to move, and faster than a dtype that numpy does not know.
        bits = np.dtype(f"u{self.dtype.itemsize}")
        narrow = (np.ascontiguousarray(layer).astype(self.dtype, copy=False).view(bits) for layer in layers)
        parts = [tensor.to_hf(layer) for (tensor, _), layer in zip(self.parts, narrow, strict=True)]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)
        return np.ascontiguousarray(whole).view(self.dtype)


def plan_tensors(config: ModelConfig, *, source: Path, dtype: Any) -> list[Planned]:
    """Return every tensor of the export, layer by layer; with `dtype` None each as the source has it.

    A tied head is left out, unless the source has one.
    """
    headers = _source_headers(source)
    twice = config.head == "logits" and {HEAD, EMBED} <= headers.keys()
    if config.tie_word_embeddings and HEAD in headers:
        headers.setdefault(EMBED, headers[HEAD])
    named = _named_dtype(source)
    widest: dict[str, np.dtype] = {}
    for tensor in tensor_table(config):
        # One dtype a parameter: its layers are one array of ours.
        codes = {headers[name].dtype for name in tensor.names if name in headers}
        found = next((kind for code, kind in DTYPES.items() if code in codes), named)
        widest |= dict.fromkeys(tensor.names, found)
    tower, carried = has_tower(source), carried_names(source)
    if tower and not headers:
        raise DnoError(f"{source}: a model with a tower beside it, whose weights are not here to be carried along")

    def name_of(name: str) -> str:
        return headers[name].name if tower and name in headers else name

    plan = []
    for stored in stored_tensors(config):
        kind = widest[stored.name] if dtype is None else np.dtype(dtype)
        plan.append(Planned(name_of(stored.name), stored.shape, kind, stored.parts))
        if stored.name == EMBED and config.tie_word_embeddings and twice:
            plan.append(replace(plan[-1], name=name_of(HEAD)))
    for name, header in headers.items():
        if carried is not None and carried.match(name):
            plan.append(Planned(name, header.shape, _dtype_of(header), (), header))
    return sorted(plan, key=lambda planned: _natural(planned.name))


def _dtype_of(header: Header) -> np.dtype:
    if header.dtype not in DTYPES:
        raise DnoError(f"{header.file}: tensor {header.name} has dtype {header.dtype}; expected {', '.join(DTYPES)}")
    return DTYPES[header.dtype]


def _source_headers(source: Path) -> dict[str, Header]:
    if (source / SINGLE_FILE).exists() or (source / INDEX_FILE).exists():
        return read_headers(source)
    return {}  # training from random weights


def _named_dtype(source: Path) -> np.dtype:
    _, tree = read_json(source, "config.json")
    names = {dtype.name: dtype for dtype in DTYPES.values()}
    return names.get(str(tree.get("dtype", tree.get("torch_dtype"))), np.dtype(np.float32))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def plan_shards(plan: Sequence[Planned], *, max_bytes: int) -> dict[str, list[Planned]]:
    """Return {file name: its tensors in the order of the file}; a tensor above `max_bytes` has a file of its own."""
    groups: list[list[Planned]] = [[]]
    room = max_bytes
    for planned in plan:
        if planned.num_bytes > room and groups[-1]:
            groups.append([])
            room = max_bytes
        groups[-1].append(planned)
        room -= planned.num_bytes
    order = list(DTYPES.values())
    groups = [sorted(group, key=lambda planned: (order.index(planned.dtype), planned.name)) for group in groups]
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    stem = SINGLE_FILE.removesuffix(".safetensors")
    return {f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


class ShardFile:
    """A safetensors file of known tensors, which come one after the other."""

    def __init__(self, path: Path, tensors: Sequence[Planned]) -> None:
        self._path = path
        self._left = list(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in tensors:
            offsets = [end, end := end + tensor.num_bytes]
            header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def append(self, tensor: Planned, array: np.ndarray) -> None:
        """Write the next tensor."""
        expected = self._left.pop(0)
        if expected != tensor or array.shape != tensor.shape or array.dtype != tensor.dtype:
            raise DnoError(f"{self._path}: {tensor.name} {array.dtype}{array.shape} came where {expected} was due")
        self._file.write(array.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        self._file.close()
