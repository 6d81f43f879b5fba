"""Sums over micro-batches, one after the other, in the memory of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulated(found_of: Callable[[Any], Any], parts: Any, *, combine: Callable[[Any, Any], Any] | None = None) -> Any:
    """Return what `found_of` finds of every micro-batch, added up.

    Args:
        parts: a tree of arrays [M, ...], micro-batches along axis 0.
        combine: (sum so far, next) -> sum; None adds leaf to leaf.
    """
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return found_of(first)
    add = (lambda total, found: jax.tree.map(jnp.add, total, found)) if combine is None else combine
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(found_of, first))
    total, _ = jax.lax.scan(lambda total, part: (add(total, found_of(part)), None), zeros, parts)
    return total
