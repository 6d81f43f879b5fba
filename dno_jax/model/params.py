"""The parameter tree of a model, and that of adapters beside it: fresh, as shapes, and as names of axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dno_jax.model.adapters import LEAVES, AdapterConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder
from dno_jax.model.stack import stacked_groups


def _without_mesh() -> Any:
    # Under a mesh, flax would take our axis names for mesh axes and constrain the fresh arrays by them.
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


@partial(jax.jit, static_argnums=0)
def _init(config: ModelConfig, key: jax.Array) -> Any:
    return _variables(config, key)["params"]


def _variables(config: ModelConfig, key: jax.Array, adapter: AdapterConfig | None = None) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config, adapter=adapter).init(key, token, token)


@lru_cache(maxsize=64)
def _boxed(config: ModelConfig, adapter: AdapterConfig | None = None) -> Any:
    """The tree as shapes in boxes that name axes; that of the adapters, where they are given. Callers unbox a copy.

    Kept, since it traces the whole model, and a run asks for it dozens of times.
    """
    with _without_mesh():
        found = jax.eval_shape(lambda: _variables(config, jax.random.key(0), adapter))
    return found["params" if adapter is None else "adapters"]


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Return fresh float32 parameters: matrices normal (deviation 0.02, truncated), norms neutral, biases 0."""
    with _without_mesh():
        return nn.unbox(_init(config, key))


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Return the parameter tree as jax.ShapeDtypeStruct, without making arrays."""
    with _without_mesh():
        return nn.unbox(_boxed(config))


def computing_params(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Return `abstract_params` as they are computed with in a dtype, so that to hold them so changes no result.

    Matrices and biases are cast where they are used. Norms take their scales in float32, as training leaves them, and
    so does the decay of a delta rule: in bfloat16 they would be another policy's.
    """

    def held(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = path[-1].key
        whole = name.endswith("norm") or name in ("delta_rate", "delta_shift")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if whole else dtype)

    return jax.tree.map_with_path(held, abstract_params(config))


def param_axes(config: ModelConfig) -> dict[str, Any]:
    """Return the parameter tree as tuples of axis names, such as ("layers", "embed", "heads", "head_dim")."""
    with _without_mesh():
        specs = nn.get_partition_spec(_boxed(config))
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def abstract_adapters(config: ModelConfig, adapter: AdapterConfig) -> dict[str, Any]:
    """Return the tree of a model's adapters as jax.ShapeDtypeStruct."""
    with _without_mesh():
        return nn.unbox(_boxed(config, adapter))


def adapter_axes(config: ModelConfig, adapter: AdapterConfig) -> dict[str, Any]:
    """Return the tree of a model's adapters as tuples of axis names, such as ("layers", "embed", "rank")."""
    with _without_mesh():
        specs = nn.get_partition_spec(_boxed(config, adapter))
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def init_adapters(config: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Any]:
    """Return fresh adapters, which change nothing yet: A is 0, B normal.

    B's deviation is 1 over the root of its outputs: the gradient that comes to A through it keeps its size.
    """

    def fresh(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        *above, name = (part.key for part in path)
        name, _, half = name.rpartition("_")
        if half == "a":
            return jnp.zeros(leaf.shape, leaf.dtype)
        own = jax.random.fold_in(key, LEAVES.index(name))
        for group in above[1:]:  # of models whose layers differ
            own = jax.random.fold_in(own, int(group))
        drawn = jax.random.normal(own, leaf.shape, leaf.dtype)
        return drawn * math.prod(leaf.shape[2:]) ** -0.5

    return jax.tree.map_with_path(fresh, abstract_adapters(config, adapter))


def unstack_layers(params: Mapping[str, Any], *, donate: bool = False) -> dict[str, Any]:
    """Return parameters whose "layers" are a tuple of one tree per layer, as decoding reads them fastest.

    Args:
        params: stacked, or as this returns them.
        give_away: delete each stacked weight as soon as it is taken apart, so that only one is in memory twice.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return dict(params)
    apart: dict[int, Any] = {}
    for group, numbers in stacked_groups(layers):
        leaves, tree = jax.tree.flatten(dict(group))
        split = []
        for leaf in leaves:
            split.append(_split(leaf))
            if donate:
                jax.block_until_ready(split[-1])
                leaf.delete()
        rows = [jax.tree.unflatten(tree, own) for own in zip(*split, strict=True)]
        apart |= dict(zip(numbers or range(len(rows)), rows, strict=True))
    return {**params, "layers": tuple(apart[number] for number in range(len(apart)))}


@jax.jit
def _split(stacked: Any) -> list[Any]:
    return [stacked[index] for index in range(stacked.shape[0])]
