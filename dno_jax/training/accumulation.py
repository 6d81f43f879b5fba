"""Sums over micro-batches, one after the other, in the memory of one; and over groups of devices, once, at their end.

Along the data axis of a mesh groups of devices hold the same parameters. Left to the compiler, their gradients would be
added up in every micro-batch, since it knows no sum that stays open from one turn of a loop to the next. So each group
goes through its rows of all micro-batches by itself, and only pairs, a few numbers each, are put together on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dno_jax.parallel.sharding import AnyMesh

_GROUPS = "data"


def accumulated(found_of: Callable[[Any], tuple[Any, Any]], parts: Any) -> tuple[Any, Any]:
    """Return (what `found_of` finds first of every micro-batch, added up; what it finds besides, stacked [M, ...]).

    Args:
        parts: a tree of arrays [M, ...], micro-batches along axis 0.
    """
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        total, besides = found_of(first)
        return total, jax.tree.map(lambda leaf: leaf[None], besides)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        found, besides = found_of(part)
        return jax.tree.map(jnp.add, total, found), besides

    summed, _ = jax.eval_shape(found_of, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), summed)
    return jax.lax.scan(add, zeros, parts)


def groups_apart(mesh: AnyMesh | None, *, parts: int) -> tuple[str, ...]:
    """Return the axes along which groups of devices add up `parts` micro-batches apart; none, where that saves nothing.

    Of one micro-batch the compiler adds up each layer's gradients while it computes the next's.
    """
    return (_GROUPS,) if mesh is not None and mesh.shape[_GROUPS] > 1 and parts > 1 else ()


def in_groups(
    function: Callable[..., Any], mesh: AnyMesh, *, axes: tuple[str, ...], in_specs: tuple[Any, ...]
) -> Callable[..., Any]:
    """Return a function that runs in every group apart and returns the same in all; other axes stay the compiler's."""
    # Unchecked, because shard_maps inside cannot be checked (parallel.sharding.map_shards): it sums what it returns.
    return jax.shard_map(
        function, mesh=mesh, axis_names=set(axes), in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def summed_over(tree: Any, axes: tuple[str, ...]) -> Any:
    """Add up over groups what each goes on to compute the same from.

    Backwards nothing is added up: each has the gradient of the whole already, and hands on that of its own share.
    """
    return jax.lax.psum(tree, axes)


summed_over.defvjp(
    lambda tree, axes: (summed_over(tree, axes), None),
    lambda axes, _, cotangent: (cotangent,),
)
