"""The parameter tree of a model: fresh, as shapes, and as names of axes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder


def _without_mesh() -> Any:
    # Under a mesh, flax would take our axis names for mesh axes and constrain the fresh arrays by them.
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


@partial(jax.jit, static_argnums=0)
def _init(config: ModelConfig, key: jax.Array) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, token, token)["params"]


def _boxed(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


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

    Matrices and biases are cast where they are used. Norms take their scales in float32, as training leaves them: in
    bfloat16 they would be another policy's.
    """

    def held(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_norm = path[-1].key.endswith("norm")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if is_norm else dtype)

    return jax.tree.map_with_path(held, abstract_params(config))


def param_axes(config: ModelConfig) -> dict[str, Any]:
    """Return the parameter tree as tuples of axis names, such as ("layers", "embed", "heads", "head_dim")."""
    with _without_mesh():
        specs = nn.get_partition_spec(_boxed(config))
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def unstack_layers(params: Mapping[str, Any], *, donate: bool = False) -> dict[str, Any]:
    """Return parameters whose "layers" are a tuple of one tree per layer, as decoding reads them fastest.

    Args:
        params: stacked, or as this returns them.
        give_away: delete each stacked weight as soon as it is taken apart, so that only one is in memory twice.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return dict(params)
    leaves, tree = jax.tree.flatten(layers)
    split = []
    for leaf in leaves:
        split.append(_split(leaf))
        if donate:
            jax.block_until_ready(split[-1])
            leaf.delete()
    return {**params, "layers": tuple(jax.tree.unflatten(tree, own) for own in zip(*split, strict=True))}


@jax.jit
def _split(stacked: Any) -> list[Any]:
    return [stacked[index] for index in range(stacked.shape[0])]
