"""The safetensors files of a checkpoint: found, compared with what config.json promises, and read slice by slice."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dno_jax.errors import DnoError
from dno_jax.model.hf.config_json import carried_names, read_json
from dno_jax.model.hf.strangers import refuse_folder, refuse_pointer, wrapper_of
from dno_jax.model.hf.tensors import Tensor

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# Buffers of rotations, by whatever name; they follow from config.json.
_ROTARY = re.compile(r"(^|\.)rotary|inv_freq$|\.(cos|sin)_cached$")
_INSIDE = re.compile(r"(model\.language_model|language_model\.model)\.|language_model\.(?=lm_head\.)")
_COMPARED_BYTES = 1 << 24
# Header bytes of one file: 120 for each of 200,000 tensors. The largest mixtures have a tenth of that, over all files.
_MAX_HEADER_BYTES = 24_000_000
_MAX_LINES = 8  # of a message that names what is wrong


@dataclass(frozen=True)
class Header:
    """What a header says of one tensor, and the name that it has there."""

    file: Path
    name: str
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
        """Compare names, shapes and dtypes of everything before anything is read; one error names all that is wrong.

        Args:
            tied: whether the head is the embedding.
            place: the checkpoint's folder.
        """
        expected = {name: tensor.hf_shape for tensor in table for name in tensor.names}
        if tied and HEAD in self.headers:  # stored under this name alone, it is the embedding
            self.headers.setdefault(EMBED, self.headers[HEAD])
        missing = sorted(expected.keys() - self.headers.keys())
        surplus = sorted(name for name in self.headers.keys() - expected.keys() if not (tied and name == HEAD))
        if (carried := carried_names(place)) is not None:
            surplus = [name for name in surplus if not carried.match(name)]
        if missing and (wrapper := wrapper_of(self.headers)):
            raise DnoError(f"{place}: {wrapper}")
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
        if len(wrong) > _MAX_LINES:
            wrong[_MAX_LINES - 1 :] = [f"and {len(wrong) - _MAX_LINES + 1:,} more"]
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
        stored = self.headers[name]
        return self._open[stored.file].get_slice(stored.name)[index]


_DTYPES = ", ".join(ITEM_BYTES)


def read_headers(path: Path) -> dict[str, Header]:
    """Return what the headers of all files of a checkpoint say, in the order of the files.

    Tensors go by the names that the whole language model has for them, whichever class saved them.

    Raises:
        DnoError: as TensorFiles.
    """
    if (path / SINGLE_FILE).exists():
        return _whole_names(path, read_header(path / SINGLE_FILE))
    if not (path / INDEX_FILE).exists():
        refuse_folder(path)
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
        if (found[name].file.name != shard_of.get(name) if name in found else not _may_be_absent(name))
    ]
    if misplaced:
        more = f" and {len(misplaced) - _MAX_LINES:,} more" if len(misplaced) > _MAX_LINES else ""
        raise DnoError(
            f"{index}: index and files disagree on tensor {', '.join(misplaced[:_MAX_LINES])}{more}; fetch the "
            "checkpoint again"
        )
    return _whole_names(path, found)


def _may_be_absent(name: str) -> bool:
    """Whether an index may name a tensor that no file holds: a tied head, a buffer. A head that is missed is named."""
    return name.endswith(HEAD) or _ROTARY.search(name) is not None


def _whole_names(path: Path, found: dict[str, Header]) -> dict[str, Header]:
    """Drop rotary buffers; give the tensors of a model that was saved without its head the prefix they have with it."""
    carried = carried_names(path)

    def is_carried(name: str) -> bool:
        return carried is not None and carried.match(name) is not None

    kept = {name: stored for name, stored in found.items() if is_carried(name) or _ROTARY.search(name) is None}
    if any(_INSIDE.match(name) for name in kept):
        whole = {name: _INSIDE.sub("model." if "lm_head" not in name else "", name, count=1) for name in kept}
        return {whole[name] if _INSIDE.match(name) else name: stored for name, stored in kept.items()}
    bare = {name for name in kept if name.startswith(("embed_tokens.", "layers.", "norm.", "embedding_norm."))}
    if not bare or any(name.startswith("model.") for name in kept):
        return kept
    return {f"model.{name}" if name in bare else name: stored for name, stored in kept.items()}


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights, by name; [] where it has none."""
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    return [path / name for name in sorted(set(_weight_map(path)[1].values()))] if (path / INDEX_FILE).exists() else []


def _weight_map(path: Path) -> tuple[Path, dict[str, str]]:
    file, tree = read_json(path, INDEX_FILE)
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
        DnoError: the file is missing, truncated or corrupt, or its header is larger than any real one.
    """
    with _opened(file):
        pass
    with file.open("rb") as opened:
        tree = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    tree.pop("__metadata__", None)
    return {name: Header(file, name, entry["dtype"], tuple(entry["shape"])) for name, entry in tree.items()}


def read_whole(header: Header) -> np.ndarray:
    """Return a tensor as it lies in its file."""
    with _opened(header.file) as opened:
        return opened.get_tensor(header.name)


def _opened(file: Path) -> Any:
    """Map a file, to be closed by `with`."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise DnoError(f"{file}: no such file; the checkpoint is incomplete, fetch it again")
    if not file.is_file():
        raise DnoError(f"{file}: not a regular file; expected a safetensors file")
    refuse_pointer(file)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if _MAX_HEADER_BYTES < length < file.stat().st_size:
        raise DnoError(
            f"{file}: a header of {length:,} bytes; expected at most {_MAX_HEADER_BYTES:,}, which is more than any "
            "model's. Fetch it again"
        )
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise DnoError(f"{file}: truncated or corrupt safetensors file ({why:.300}); fetch it again") from None
