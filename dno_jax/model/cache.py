"""What layers keep of the texts so far: an explicit value, in and out of the decoder.

Attention keeps keys and values. A token lies in the column of its position.

So every row has a length of its own, and what a row's query sees needs no bookkeeping: the columns up to its own
position. What a former text left behind it is overwritten before anybody can see it.

A layer's keys are an array of their own. Products take their operands whole: of a stack of layers, each would be copied
out before it is read, which for the small products of a decoding step costs as much as the products.

Other mixers keep a state of fixed size, and the last inputs of a convolution. A token at position 0 begins anew there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dno_jax.model.config import Mixer, ModelConfig

# The largest magnitude of a stored key or value, by the dtypes that need a scale.
_QUANTISED = {"int8": 127.0, "float8_e4m3fn": 448.0}
# Attention reads the cache up to one of so many ends, in multiples of so many columns: the rest, which no row has
# reached, may be most of it.
_NUM_REACHES, _REACH_STEP = 8, 64


@flax.struct.dataclass
class KVCache:
    """Keys and values of one layer, of the tokens seen so far; column s holds the token at position s.

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


@flax.struct.dataclass
class MixerState:
    """What a layer that is no attention keeps of B texts, in float32 whatever the cache's dtype.

    Attributes:
        tails: the last inputs of each of its convolutions, [B, W - 1, heads, head_dim] or [B, W - 1, channels].
        recurrent: [B, V, H, P] state of the delta rule; None of a short convolution.
    """

    tails: tuple[Any, ...]
    recurrent: Any = None


LayerCache = KVCache | MixerState
# One a layer.
Cache = tuple[LayerCache, ...]


def num_slots_of(cache: Cache) -> int | None:
    """Columns of the layers that have some; None where no layer attends."""
    return next((layer.num_slots for layer in cache if isinstance(layer, KVCache)), None)


@runtime_checkable
class WriteCache(Protocol):
    """Puts the keys and values of a call into a layer's cache, each in the column of its position."""

    def __call__(self, cache: KVCache, *, k_BTKH: Any, v_BTKH: Any, position_BT: Any) -> KVCache:
        """Return the cache with tokens [B, T] written; padding (position -1) is written nowhere."""
        ...


def init_cache(config: ModelConfig, *, batch_size: int, num_slots: int, dtype: Any = jnp.float32) -> Cache:
    """Return an empty cache, keys and values in float32, bfloat16, int8 or float8_e4m3fn."""
    K, H = config.num_key_value_heads, config.head_dim
    shape = (batch_size, K, H, num_slots)
    scale = (batch_size, K, num_slots) if jnp.dtype(dtype).name in _QUANTISED else None

    def layer(mixer: Mixer) -> LayerCache:
        if mixer != "attention":
            return _init_state(config, mixer, batch_size)
        return KVCache(
            key=jnp.zeros(shape, dtype),
            value=jnp.zeros(shape, dtype),
            key_scale=None if scale is None else jnp.zeros(scale, jnp.float32),
            value_scale=None if scale is None else jnp.zeros(scale, jnp.float32),
        )

    return tuple(map(layer, config.layer_mixers))


def _init_state(config: ModelConfig, mixer: Mixer, batch_size: int) -> MixerState:
    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros((batch_size, *shape), jnp.float32)

    tail = config.conv_kernel - 1
    if mixer == "short_conv":
        return MixerState((zeros(tail, config.hidden_size),))
    key = config.linear_num_key_heads, config.linear_key_head_dim
    value = config.linear_num_value_heads, config.linear_value_head_dim
    return MixerState((zeros(tail, *key), zeros(tail, *key), zeros(tail, *value)), zeros(value[0], key[1], value[1]))


def cache_axes(cache: LayerCache) -> LayerCache:
    """Return the axis names of every field of a layer's cache, in one of tuples."""
    if isinstance(cache, MixerState):
        if cache.recurrent is None:
            return MixerState((("batch", "taps", "channels"),))
        key, value = ("batch", "taps", "kv_heads", "head_dim"), ("batch", "taps", "heads", "head_dim")
        return MixerState((key, key, value), ("batch", "heads", "head_dim", "head_dim"))
    wide, scale = ("batch", "kv_heads", "head_dim", "slots"), ("batch", "kv_heads", "slots")
    return KVCache(
        key=wide,
        value=wide,
        key_scale=None if cache.key_scale is None else scale,
        value_scale=None if cache.value_scale is None else scale,
    )


def write_layer(
    cache: KVCache,
    *,
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    position_BT: Int[Array, "B T"],
) -> KVCache:
    """Return a layer's cache with the tokens of a call; padding (position -1) is written nowhere."""
    # A column that does not exist drops what is written there; -1 itself would count from the end.
    column = jnp.where(position_BT >= 0, position_BT, cache.num_slots)

    row = jnp.arange(column.shape[0], dtype=jnp.int32)[:, None]

    def write(field: Array, new: Array) -> Array:
        return field.at[row, ..., column].set(new, mode="drop")

    key, key_scale = quantised(k_BTKH, cache.key.dtype)
    value, value_scale = quantised(v_BTKH, cache.value.dtype)
    cache = replace(cache, key=write(cache.key, key), value=write(cache.value, value))
    if key_scale is None or value_scale is None:
        return cache
    return replace(
        cache,
        key_scale=write(cache.key_scale, key_scale),
        value_scale=write(cache.value_scale, value_scale),
    )


def quantised(x: Float[Array, "B T K H"], dtype: Any) -> tuple[Array, Float[Array, "B T K"] | None]:
    """Round to the cache's dtype, each key or value of a token by its own largest magnitude."""
    largest = _QUANTISED.get(jnp.dtype(dtype).name)
    if largest is None:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)
    # Divided first: a bound below the smallest normal number would be flushed to 0, and 0 / 0 is not a number.
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / largest, jnp.finfo(jnp.float32).tiny)
    x = x / scale[..., None]
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype), scale


def as_stored(x: Float[Array, "B T K H"], dtype: Any) -> Float[Array, "B T K H"]:
    """Return keys or values as a cache of this dtype will give them back: what is attended, read there or not."""
    stored, scale = quantised(x, dtype)
    return (stored if scale is None else stored.astype(jnp.float32) * scale[..., None]).astype(x.dtype)


def read_layer(cache: KVCache, *, num_slots: int) -> KVCache:
    """Return the first columns of a layer's cache."""
    return cache if num_slots == cache.num_slots else jax.tree.map(lambda field: field[..., :num_slots], cache)


def reaches(num_slots: int) -> tuple[int, ...]:
    """Return the numbers of columns that attention may read, ascending, the last of them all of them."""
    step = _REACH_STEP * -(-num_slots // (_REACH_STEP * _NUM_REACHES))
    return (*range(step, num_slots, step), num_slots)


def reach_index(position_BT: Int[Array, "B T"], num_slots: int) -> Int[Array, ""]:
    """Return which of `reaches` is the first that holds every token of a call."""
    ends = jnp.asarray(reaches(num_slots)[:-1], jnp.int32)
    return jnp.sum(jnp.max(position_BT) >= ends).astype(jnp.int32)
