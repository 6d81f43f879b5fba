"""Checkpoint files to sharded arrays, in pieces: no process holds more than its devices' slices and a few pieces."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dno_jax.errors import DnoError
from dno_jax.model.config import Head, ModelConfig
from dno_jax.model.hf.config_json import read_config
from dno_jax.model.hf.files import ITEM_BYTES, TensorFiles
from dno_jax.model.hf.tensors import Tensor, tensor_table

Progress = Callable[[int, int], None]
Start = tuple[int, ...]
# Elements that a process reads at once, over all its devices. Small enough to stay far below one tensor of a large
# model, large enough that calls cost nothing.
_PIECE = 1 << 21
# Rows of a file's matrix that are transposed at once: what they touch stays in the processor's cache.
_ROWS = 64
THREADS = min(8, os.cpu_count() or 1)


def load(
    path: str | Path,
    *,
    head: Head = "logits",
    shardings: Any = None,
    dtype: Any = np.float32,
    progress: Progress | None = None,
    finite: bool = True,
    change: Callable[[tuple[str, ...], Any], Any] | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        path: directory with config.json and model.safetensors, or its index and shards (bfloat16, float16 or float32).
        head: what the checkpoint must be; see `read_config`.
        shardings: tree of jax.sharding.Sharding like the parameters; each process then reads the slices of its own
            devices alone, piece by piece, so that no host ever holds the model. None returns numpy arrays.
        dtype: of the parameters; or a tree of dtypes like the parameters.
        progress: called with (bytes just read, bytes that this process reads in all).
        finite: refuse weights that are NaN or infinite.
        change: called with the path and the value of each parameter once it is read; what it returns takes its place.

    Returns:
        (config, params), params in the tree of params.abstract_params(config).

    Raises:
        DnoError: a file is missing, truncated or corrupt; a tensor is missing, unexpected, or of another shape or dtype
            than config.json says; one holds NaN or infinity; or config.json is not understood.
    """
    path = Path(path)
    config = read_config(path, head=head)
    table = tensor_table(config)
    total = 0

    def count(num_bytes: int) -> None:
        if progress is not None:
            progress(num_bytes, total)

    with contextlib.closing(TensorFiles(path, progress=count)) as files, ThreadPoolExecutor(THREADS) as pool:
        files.check(table, tied=config.tie_word_embeddings, place=path)
        leaves = [_Leaf(tensor, None if shardings is None else tree_leaf(shardings, tensor.path)) for tensor in table]
        total = sum(leaf.num_bytes(files) for leaf in leaves)
        params: dict[str, Any] = {}
        for leaf in leaves:
            wanted = tree_leaf(dtype, leaf.tensor.path) if isinstance(dtype, dict) else dtype
            value = leaf.read(Reader(files, pool, np.dtype(wanted), finite=finite))
            put_leaf(params, leaf.tensor.path, value if change is None else change(leaf.tensor.path, value))
    return config, params


def check(path: str | Path, *, head: Head = "logits") -> tuple[Path, ...]:
    """Compare a checkpoint's files with its config.json, and read nothing but their headers.

    Returns:
        The files that hold its weights.

    Raises:
        DnoError: as `load`.
    """
    path = Path(path)
    config = read_config(path, head=head)
    with contextlib.closing(TensorFiles(path)) as files:
        files.check(tensor_table(config), tied=config.tie_word_embeddings, place=path)
        return tuple(dict.fromkeys(header.file for header in files.headers.values()))


@dataclass(frozen=True)
class Reader:
    """Reads parts of parameters by several threads."""

    files: TensorFiles
    pool: ThreadPoolExecutor
    dtype: np.dtype
    finite: bool = False  # refuse NaN and infinities

    def read(self, tensor: Tensor, start: Start, size: Start) -> np.ndarray:
        """Return the part of a parameter that begins at `start`."""
        # Narrowed here, not on a device: those may flush subnormal numbers.
        out = np.empty(size, self.dtype)

        def fill(begin: int) -> None:
            rows = slice(begin, min(begin + step, size[axis]))
            index = list(slices(start, size))
            index[axis] = slice(start[axis] + rows.start, start[axis] + rows.stop)
            part = tensor.read(self.files, tuple(index))
            if self.finite and not np.all(np.isfinite(part)):
                self._refuse(tensor, part, first=[s.start for s in index])
            out[(slice(None),) * axis + (rows,)] = part

        axis = _row_axis(tensor)
        step = max(1, _ROWS // math.prod(tensor.shape[a] for a in tensor.groups[0][1:]))
        list(self.pool.map(fill, range(0, size[axis], step)))
        return out

    def _refuse(self, tensor: Tensor, part: np.ndarray, *, first: list[int]) -> None:
        at = np.argwhere(~np.isfinite(part))[0] + first
        stored = self.files.headers[tensor.name(at[: len(tensor.stack)].tolist())]
        raise DnoError(
            f"{stored.file}: tensor {stored.name} holds NaN or infinity, and no model can be trained from that; fetch "
            "the checkpoint again, or give one of an earlier step of the training that broke"
        )


class _Leaf:
    """One parameter and where its parts go."""

    def __init__(self, tensor: Tensor, sharding: Sharding | None) -> None:
        self.tensor = tensor
        self.sharding = sharding
        self.shape = tensor.stack + tensor.shape
        self._starts: dict[Any, Start] = {}  # device -> where its shard begins
        self._local = self.shape
        if sharding is not None:
            self._local = sharding.shard_shape(self.shape)
            for device, index in sharding.addressable_devices_indices_map(self.shape).items():
                assert index is not None
                self._starts[device] = tuple(part.indices(n)[0] for part, n in zip(index, self.shape, strict=True))

    def num_bytes(self, files: TensorFiles) -> int:
        """Bytes of the file that this process reads: what several of its devices share comes once."""
        parts = len(set(self._starts.values())) or 1
        return parts * math.prod(self._local) * ITEM_BYTES[files.headers[self.tensor.names[0]].dtype]

    def read(self, reader: Reader) -> Any:
        """Return the parameter, piece after piece."""
        if self.sharding is None:
            out = np.empty(self.shape, reader.dtype)
            for start, size in pieces(self.tensor, self.shape):
                out[slices(start, size)] = reader.read(self.tensor, start, size)
            return out
        # The local shards as one array over the local devices, so that one small program serves all of them.
        mesh = Mesh(np.array(list(self._starts)), ("local",))
        place = NamedSharding(mesh, PartitionSpec("local"))
        array = _zeros((len(self._starts) * self._local[0], *self._local[1:]), reader.dtype, place)
        for start, size in pieces(self.tensor, self._local, shares=len(set(self._starts.values()))):
            piece = self._piece(reader, start, size, place=place)
            # The read ran alongside the last write; without this wait pieces would pile up.
            array.block_until_ready()
            array = _write(array, piece, np.asarray(start, np.int32), mesh=mesh)
        array.block_until_ready()
        shards = {shard.device: shard.data for shard in array.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, [shards[device] for device in self._starts]
        )

    def _piece(self, reader: Reader, start: Start, size: Start, *, place: NamedSharding) -> jax.Array:
        read: dict[Start, np.ndarray] = {}
        for origin in self._starts.values():
            if origin not in read:
                begin = tuple(a + b for a, b in zip(origin, start, strict=True))
                read[origin] = reader.read(self.tensor, begin, size)
        parts = [jax.device_put(read[origin], device) for device, origin in self._starts.items()]
        return jax.make_array_from_single_device_arrays((len(parts) * size[0], *size[1:]), place, parts)


def _zeros(shape: Start, dtype: np.dtype, place: NamedSharding) -> jax.Array:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=place)(shape, dtype)


@partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def _write(array: jax.Array, piece: jax.Array, start: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Write each device's part of `piece` into its part of `array`, in place."""
    local, everywhere = PartitionSpec("local"), PartitionSpec()
    update = jax.shard_map(
        lambda a, p, s: jax.lax.dynamic_update_slice(a, p, tuple(s)),
        mesh=mesh,
        in_specs=(local, local, everywhere),
        out_specs=local,
    )
    return update(array, piece, start)


def _row_axis(tensor: Tensor) -> int:
    """Our axis along which the rows of the file's matrix run: cut along it, a piece is one stretch of the file."""
    return len(tensor.stack) + tensor.groups[0][0]


def pieces(tensor: Tensor, shape: Sequence[int], *, shares: int = 1) -> Iterator[tuple[Start, Start]]:
    """Cut (a shard of) a parameter into (start, size): several tensors of the stack, or part of one, to pass by.

    Args:
        shape: of the parameter or its shard, in our order.
        shares: how many shards this process reads side by side.
    """
    step = list(shape)
    for cut in (*range(len(tensor.stack)), _row_axis(tensor)):
        step[cut] = max(1, min(shape[cut], _PIECE // shares * step[cut] // max(math.prod(step), 1)))
    for start in np.ndindex(*(-(-n // by) for n, by in zip(shape, step, strict=True))):
        begin = tuple(i * by for i, by in zip(start, step, strict=True))
        yield begin, tuple(min(by, n - b) for by, n, b in zip(step, shape, begin, strict=True))


def slices(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))


def tree_leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def put_leaf(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
