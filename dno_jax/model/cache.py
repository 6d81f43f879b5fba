"""The key-value cache: an explicit value, in and out of the decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dno_jax.model.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, all layers stacked.

    All rows share one cursor: a call with T tokens writes the slots length .. length + T - 1 of every row, padding
    included. What a slot holds is said by `position` alone, so a padded slot is a hole that nobody sees.

    The fields are annotated loosely because the same structure carries axis names, shapes and shardings.

    Attributes:
        key: [L, B, K, H, S] in the compute dtype, rotated by position already.
        value: [L, B, K, S, H] in the compute dtype.
        position: [B, S] int32, -1 in empty and padded slots.
        length: scalar int32, slots written so far.
    """

    key: Any
    value: Any
    position: Any
    length: Any

    @property
    def num_slots(self) -> int:
        return self.position.shape[1]


def init_cache(config: ModelConfig, *, batch_size: int, num_slots: int, dtype: Any = jnp.float32) -> KVCache:
    """Return an empty cache; `dtype` is the decoder's compute dtype."""
    L, K, H = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    return KVCache(
        key=jnp.zeros((L, batch_size, K, H, num_slots), dtype),
        value=jnp.zeros((L, batch_size, K, num_slots, H), dtype),
        position=jnp.full((batch_size, num_slots), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def cache_axes(config: ModelConfig) -> KVCache:
    """Return the axis names of every field, in a KVCache of tuples."""
    del config  # every family so far caches the same axes
    return KVCache(
        key=("layers", "batch", "kv_heads", "head_dim", "slots"),
        value=("layers", "batch", "kv_heads", "slots", "head_dim"),
        position=("batch", "slots"),
        length=(),
    )


def repeat_cache(cache: KVCache, k: int) -> KVCache:
    """Return a cache in which row b has become the rows b*k .. b*k + k - 1, to share one prefill among k samples."""
    return replace(
        cache,
        key=_repeat(cache.key, k, axis=1),
        value=_repeat(cache.value, k, axis=1),
        position=_repeat(cache.position, k, axis=0),
    )


def grow_cache(cache: KVCache, num_slots: int) -> KVCache:
    """Return the cache with empty slots added at the end, `num_slots` in all.

    Raises:
        ValueError: the cache has more slots already.
    """
    more = num_slots - cache.num_slots
    if more < 0:
        raise ValueError(f"the cache has {cache.num_slots} slots; it cannot grow to {num_slots}")
    return replace(
        cache,
        key=jnp.pad(cache.key, [(0, 0)] * 4 + [(0, more)]),
        value=jnp.pad(cache.value, [(0, 0)] * 3 + [(0, more), (0, 0)]),
        position=jnp.pad(cache.position, [(0, 0), (0, more)], constant_values=-1),
    )


def _repeat(array: jax.Array, k: int, *, axis: int) -> jax.Array:
    # Broadcast and merge, not jnp.repeat: a gather would lose the sharding of the rows.
    shape = array.shape
    wide = jnp.broadcast_to(jnp.expand_dims(array, axis + 1), (*shape[: axis + 1], k, *shape[axis + 1 :]))
    return wide.reshape(*shape[:axis], shape[axis] * k, *shape[axis + 1 :])
