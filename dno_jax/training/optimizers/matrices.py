"""Matrices in a tree of stacked parameters, for optimisers that look at them.

Our arrays are stacks: [L, D, N, H] is one [D, N*H] matrix of each layer, [L, E, D, F] one of each layer and expert. An
optimiser that took them as they are would factor, clip or orthogonalise over layers and heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Axes = tuple[str, ...]  # names of an array's axes
_STACKED = ("layers", "experts")  # axes along which one array holds many matrices
_WITHIN = "head_dim"  # together with the axis before it, the heads', one side of a matrix


def matrix_shape(shape: tuple[int, ...], axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (how many there are along each stacked axis, the shape of each): two sizes of a matrix, one of a vector.

    Raises:
        ValueError: the stacked axes do not come first, or more than two sides are left.
    """
    count = sum(name in _STACKED for name in axes)
    sides: list[int] = []
    for name, size in zip(axes[count:], shape[count:], strict=True):
        if name == _WITHIN and sides:
            sides[-1] *= size
        else:
            sides.append(size)
    if any(name in _STACKED for name in axes[count:]) or len(sides) > 2:
        raise ValueError(f"axes {axes} of shape {shape} are no stack of matrices or vectors")
    return shape[:count], tuple(sides)


def per_matrix(
    of: Callable[[Axes, int], optax.GradientTransformation], axes: tuple[Axes, ...] | None, *, name: str
) -> optax.GradientTransformation:
    """Return an optimiser that moves every matrix and every vector by itself, with a state of its own.

    Args:
        of: what moves a matrix (2 sides) or a vector (1) of an array with axes of these names.
        axes: of the parameters' leaves, in their order.
        name: of the optimiser, for the message.

    Raises:
        ValueError: there are no axes.
    """
    if axes is None:
        raise ValueError(f"optimizer {name} looks at matrices: give make_optimizer the axes of the parameters")

    def of_each(part: str, names: Axes, *trees: Any, like: jax.Array) -> Any:
        """Call `init` or `update` on a stack of matrices; arrays of `like`'s shape are seen as its matrices."""
        stack, sides = matrix_shape(like.shape, names)
        function = getattr(of(names, len(sides)), part)

        def seen(leaf: jax.Array) -> jax.Array:
            return jnp.reshape(leaf, stack + sides) if leaf.shape == like.shape else leaf

        for _ in stack:
            function = jax.vmap(function)
        return function(*jax.tree.map(seen, trees))

    def init(params: Any) -> Any:
        leaves, tree = jax.tree.flatten(params)
        found = [of_each("init", names, leaf, like=leaf) for names, leaf in zip(axes, leaves, strict=True)]
        return jax.tree.unflatten(tree, found)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(updates)
        moves, states = [], []
        for names, grad, own, param in zip(
            axes, leaves, tree.flatten_up_to(state), jax.tree.leaves(params), strict=True
        ):
            moved, own = of_each("update", names, grad, own, param, like=grad)
            moves.append(jnp.reshape(moved, grad.shape))
            states.append(own)
        return jax.tree.unflatten(tree, moves), jax.tree.unflatten(tree, states)

    return optax.GradientTransformation(init, update)
