"""Numbers that are held in bfloat16 and moved by less than it can show: rounded up or down at random, right on average.

An update of 5e-7 is lost beside a weight of .02, whose bfloat16 neighbours are 1e-4 away: rounded to the nearest,
training stands still. Rounded up as often as the update is a part of that distance, its mean arrives.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, BFloat16, Float32, Int, UInt16, UInt32

_HALF = 16  # bits of a float32 that a bfloat16 has not


def widened(tree: Any) -> Any:
    """Return a tree with its bfloat16 arrays as float32, exactly; all others as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, tree)


def stored(tree: Any, *, like: Any, key: UInt32[ArrayLike, " 2"] | None, step: Int[ArrayLike, ""]) -> Any:
    """Return a tree in the dtypes of another: float32 becomes bfloat16 at random, and all else stays as it is.

    Args:
        key: Threefry's, of a whole training; step and place in the tree are folded in. None where nothing is rounded.

    Raises:
        ValueError: something is to be rounded and there is no key.
    """

    def one(index: int, leaf: Array, before: Array) -> Array:
        if leaf.dtype == before.dtype:
            return leaf
        if key is None:
            raise ValueError(f"an array is held in {before.dtype}, and there is no key to round it by")
        own = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32"), step)
        bits = jax.random.bits(jax.random.fold_in(own, index), leaf.shape, jnp.uint16)
        return stochastically_rounded(leaf, bits)

    leaves, structure = jax.tree.flatten(tree)
    found = [one(index, *pair) for index, pair in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))]
    return jax.tree.unflatten(structure, found)


def stochastically_rounded(x: Float32[Array, "*shape"], bits: UInt16[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """Round to one of the two neighbours in bfloat16, the nearer one the likelier: the mean over `bits` is x.

    Bits are added to the lower half, which is then cut off: a carry is the step to the neighbour further from 0, also
    from one exponent to the next and among subnormals. What is bfloat16 already stays as it is, -0 too; infinities
    and NaN stay; what is finite stays finite.
    """
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = jax.lax.bitcast_convert_type(((word + bits) >> _HALF).astype(jnp.uint16), jnp.bfloat16)
    down = jax.lax.bitcast_convert_type((word >> _HALF).astype(jnp.uint16), jnp.bfloat16)
    # Of a NaN, only the nearest keeps what makes it one; of the largest numbers, only the lower neighbour is finite.
    return jnp.where(jnp.isfinite(x), jnp.where(jnp.isfinite(up), up, down), x.astype(jnp.bfloat16))
