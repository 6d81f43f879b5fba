"""Writing one token a row into the key-value cache of a TPU, where it lies.

XLA scatters columns in another layout than the one that attention's products read, and so copies a layer's whole cache
at every token, there and back. This kernel reads the tile that a column is in, puts it in, and writes the tile back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dno_jax.model.cache import KVCache, quantised

_LANES = 128  # columns of a tile
_KNOWN = ("float32", "bfloat16", "int8")  # what the kernel's arithmetic takes


def writes_columns(cache: KVCache, *, length: int) -> bool:
    """Whether a call of so many tokens a row can be written so."""
    return length == 1 and cache.key.dtype.name in _KNOWN


def write_columns(
    cache: KVCache,
    *,
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    position_BT: Int[Array, "B T"],
    interpret: bool = False,
) -> KVCache:
    """Return what `write_layer` returns of calls of one token a row.

    Args:
        interpret: run the kernel on devices that are no TPUs.
    """
    column = position_BT[:, 0]

    def write(field: Array, new: Array) -> Array:
        return _written(field, new[:, 0, ..., None], column, interpret=interpret)

    (key, key_scale), (value, value_scale) = quantised(k_BTKH, cache.key.dtype), quantised(v_BTKH, cache.value.dtype)
    cache = replace(cache, key=write(cache.key, key), value=write(cache.value, value))
    if key_scale is None or value_scale is None:
        return cache
    return replace(
        cache, key_scale=write(cache.key_scale, key_scale), value_scale=write(cache.value_scale, value_scale)
    )


def _written(field: Array, new: Array, column: Array, *, interpret: bool) -> Array:
    """Put new [B, ..., 1] into the column of each row of field [B, ..., S], in place."""
    # Imported here: Pallas takes a second to load, and only TPUs use it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, *middle, columns = field.shape
    lanes = min(_LANES, columns)
    zeros = (0,) * len(middle)

    def put(column: Any, new: Any, old: Any, out: Any) -> None:
        at = column[pl.program_id(0)]
        held = old[...].astype(jnp.float32)
        lane = jax.lax.broadcasted_iota(jnp.int32, held.shape, held.ndim - 1)
        chosen = (lane == at % lanes) & (at >= 0)
        out[...] = jnp.where(chosen, new[...].astype(jnp.float32), held).astype(out.dtype)

    def tile(row: Any, column: Any) -> tuple[Any, ...]:
        return (row, *zeros, jnp.maximum(column[row], 0) // lanes)

    block = pl.BlockSpec((1, *middle, lanes), tile)
    out_shape = jax.ShapeDtypeStruct(field.shape, field.dtype)
    if not interpret:  # else the compiler moves a cache that has room in a chip's vector memory there and back
        field, out_shape = pltpu.with_memory_space_constraint(field, pltpu.HBM), pltpu.HBM(field.shape, field.dtype)
    return pl.pallas_call(
        put,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows,),
            in_specs=[pl.BlockSpec((1, *middle, 1), lambda row, column: (row, *zeros, 0)), block],
            out_specs=block,
        ),
        out_shape=out_shape,
        input_output_aliases={2: 0},  # the scalars count
        interpret=interpret,
    )(column, new, field)
