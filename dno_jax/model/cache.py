"""The key-value cache: an explicit value, in and out of the decoder. A token lies in the column of its position.

So every row has a length of its own, and what a row's query sees needs no bookkeeping: the columns up to its own
position. What a former text left behind it is overwritten before anybody can see it.

A layer's keys are arrays of their own, each of a run of columns. Products take their operands whole: of a stack of
layers, or of the columns that texts have reached so far, a copy would be made before it is read, which for the small
products of a decoding step costs as much as the products and more. So columns that no row has reached are whole blocks,
which are left alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dno_jax.model.config import ModelConfig

# The largest magnitude of a stored key or value, by the dtypes that need a scale.
_QUANTISED = {"int8": 127.0, "float8_e4m3fn": 448.0}
# What the columns of a block are a multiple of, and the most blocks that a layer has. Each is two products more, in
# every program that reads it; joined, they are read by two.
_COLUMNS, _NUM_BLOCKS, _NUM_JOINED_BLOCKS = 64, 4, 8
# Numbers of a column, K * H, below which blocks are joined into a copy to be read: products as small as theirs cost
# more than it (docs/benchmarks.md). No matter of the number of rows: another order of sums is another rounding.
_SMALL_COLUMN = 128


@flax.struct.dataclass
class KVCache:
    """Keys and values of one block of a layer: column s holds the token at the block's s-th position.

    The fields are annotated loosely because the same structure carries axis names, shapes and shardings.

    Attributes:
        key: [B, K, H, S] in the cache's dtype, rotated by position already.
        value: [B, K, H, S].
        key_scale, value_scale: [B, K, S] float32, what a column is multiplied by; None where the dtype needs none.
    """

    key: Any
    value: Any
    key_scale: Any = None
    value_scale: Any = None

    @property
    def num_slots(self) -> int:
        return self.key.shape[-1]


# Blocks of one layer, side by side.
LayerCache = tuple[KVCache, ...]
Cache = tuple[LayerCache, ...]


@runtime_checkable
class WriteCache(Protocol):
    """Puts the keys and values of a call into a block, each in the column of its position."""

    def __call__(self, cache: KVCache, *, k_BTKH: Any, v_BTKH: Any, position_BT: Any) -> KVCache:
        """Return the block with tokens [B, T] written; what lies outside it (as padding does) is written nowhere.

        Args:
            position_BT: as the block counts them: 0 is its first column.
        """
        ...


def block_size(config: ModelConfig, num_slots: int) -> int:
    """Return how many columns a block has of a cache that is to have so many."""
    small = config.num_key_value_heads * config.head_dim < _SMALL_COLUMN
    return _COLUMNS * -(-num_slots // (_COLUMNS * (_NUM_JOINED_BLOCKS if small else _NUM_BLOCKS)))


def init_cache(
    config: ModelConfig, *, batch_size: int, num_slots: int, dtype: Any = jnp.float32, block: int | None = None
) -> Cache:
    """Return an empty cache of float32, bfloat16, int8 or float8_e4m3fn.

    Args:
        block: columns of a block, of which the last may have fewer; None leaves it to `block_size`.
    """
    K, H = config.num_key_value_heads, config.head_dim
    block = block or block_size(config, num_slots)

    def empty(columns: int) -> KVCache:
        shape, scaled = (batch_size, K, H, columns), jnp.dtype(dtype).name in _QUANTISED
        return KVCache(
            key=jnp.zeros(shape, dtype),
            value=jnp.zeros(shape, dtype),
            key_scale=jnp.zeros((batch_size, K, columns), jnp.float32) if scaled else None,
            value_scale=jnp.zeros((batch_size, K, columns), jnp.float32) if scaled else None,
        )

    return tuple(
        tuple(empty(min(block, num_slots - first)) for first in range(0, num_slots, block))
        for _ in range(config.num_hidden_layers)
    )


def num_slots(cache: LayerCache) -> int:
    """Return the columns of a layer's blocks together."""
    return sum(block.num_slots for block in cache)


def cache_axes(cache: KVCache) -> KVCache:
    """Return the axis names of every field of a block, in a KVCache of tuples."""
    wide, scale = ("batch", "kv_heads", "head_dim", "slots"), ("batch", "kv_heads", "slots")
    return KVCache(
        key=wide,
        value=wide,
        key_scale=None if cache.key_scale is None else scale,
        value_scale=None if cache.value_scale is None else scale,
    )


def grow_cache(cache: Cache, num_slots: int) -> Cache:
    """Return the cache with a block of empty slots added to every layer, `num_slots` in all.

    Raises:
        ValueError: the cache has more slots already.
    """
    had = sum(block.num_slots for block in cache[0])
    if num_slots < had:
        raise ValueError(f"the cache has {had} slots; it cannot grow to {num_slots}")
    if num_slots == had:
        return cache

    def empty(field: Array) -> Array:
        return jnp.zeros((*field.shape[:-1], num_slots - had), field.dtype)

    return tuple((*layer, jax.tree.map(empty, layer[0])) for layer in cache)


def write_layer(cache: LayerCache, write: WriteCache, **tokens: Any) -> LayerCache:
    """Return a layer's blocks with the tokens of a call, `k_BTKH`, `v_BTKH` and their `position_BT`."""
    position, first, written = tokens.pop("position_BT"), 0, []
    for block in cache:
        written.append(write(block, **tokens, position_BT=position - first))
        first += block.num_slots
    return tuple(written)


def write_block(
    cache: KVCache,
    *,
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    position_BT: Int[Array, "B T"],
) -> KVCache:
    """The `WriteCache` of one device."""
    # A column that does not exist drops what is written there; -1 itself would count from the end.
    column = jnp.where(position_BT >= 0, position_BT, cache.num_slots)

    row = jnp.arange(column.shape[0], dtype=jnp.int32)[:, None]

    def write(field: Array, new: Array) -> Array:
        return field.at[row, ..., column].set(new, mode="drop")

    key, key_scale = _quantised(k_BTKH, cache.key.dtype)
    value, value_scale = _quantised(v_BTKH, cache.value.dtype)
    cache = replace(cache, key=write(cache.key, key), value=write(cache.value, value))
    if key_scale is None or value_scale is None:
        return cache
    return replace(
        cache,
        key_scale=write(cache.key_scale, key_scale),
        value_scale=write(cache.value_scale, value_scale),
    )


def _quantised(x: Float[Array, "B T K H"], dtype: Any) -> tuple[Array, Float[Array, "B T K"] | None]:
    """Round to the cache's dtype, each key or value of a token by its own largest magnitude."""
    largest = _QUANTISED.get(jnp.dtype(dtype).name)
    if largest is None:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), jnp.finfo(jnp.float32).tiny) / largest
    x = x / scale[..., None]
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype), scale


def read_layer(cache: LayerCache, *, blocks: int) -> LayerCache:
    """Return the first blocks as they are to be read: as they lie, or as one."""
    own = cache[:blocks]
    _, heads, size, _ = own[0].key.shape
    if len(own) == 1 or heads * size >= _SMALL_COLUMN:
        return own
    return (jax.tree.map(lambda *fields: jnp.concatenate(fields, axis=-1), *own),)


def reach(position_BT: Int[Array, "B T"], cache: LayerCache) -> Int[Array, ""]:
    """Return the number of blocks, less one, that hold every token of a call."""
    ends = jnp.cumsum(jnp.asarray([block.num_slots for block in cache], jnp.int32))[:-1]
    return jnp.sum(jnp.max(position_BT) >= ends).astype(jnp.int32)
