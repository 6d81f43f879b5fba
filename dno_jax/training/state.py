"""What training carries from step to step, and where each piece of it lies."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import abstract_adapters, abstract_params, adapter_axes, param_axes
from dno_jax.parallel.sharding import AnyMesh, Layout, replicated, weight_shardings


@flax.struct.dataclass
class TrainState:
    step: Any  # scalar int32, optimiser steps taken
    params: Any  # what is trained: the decoder's tree in training.param_dtype, or that of adapters beside it in float32
    opt_state: Any


def param_shardings(config: ModelConfig, mesh: AnyMesh, layout: Layout) -> Any:
    """Return the tree of shardings of the decoder's parameters."""
    return weight_shardings(mesh, layout, axes=param_axes(config), shapes=abstract_params(config))


def adapter_shardings(config: ModelConfig, adapter: AdapterConfig, mesh: AnyMesh, layout: Layout) -> Any:
    """Return the tree of shardings of adapters beside the decoder's parameters."""
    axes, shapes = adapter_axes(config, adapter), abstract_adapters(config, adapter)
    return weight_shardings(mesh, layout, axes=axes, shapes=shapes)


def state_shardings(optimizer: optax.GradientTransformation, params_shardings: Any, params: Any) -> TrainState:
    """Return the shardings of a train state: what is kept of a parameter lies as the parameter does.

    That is along the axes that the two share, counted from the front and then from the back: a moment shares all of
    them, a factor of one some, a counter none. Which parameter an array is of, its path in the state says, in which
    that of the parameter stands somewhere; so masked and partitioned optimisers are none too many.
    """
    mesh = jax.tree.leaves(params_shardings)[0].mesh
    places = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(params_shardings), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = [path[start:end] for start in range(len(path)) for end in range(len(path), start, -1)]
        found = next((places[part] for part in [*sorted(parts, key=len, reverse=True), ()] if part in places), None)
        return replicated(mesh) if found is None else _shared(leaf.shape, *found)

    opt_state = jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))
    return TrainState(step=replicated(mesh), params=params_shardings, opt_state=opt_state)


def _shared(shape: tuple[int, ...], whole: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """Return the sharding of an array of some of the axes of another, whose shape and sharding are given."""
    spec = (*sharding.spec, *(None,) * (len(whole) - len(sharding.spec)))
    most = min(len(shape), len(whole))
    front = next((i for i in range(most) if shape[i] != whole[i]), most)
    back = next((i for i in range(most - front) if shape[-1 - i] != whole[-1 - i]), most - front)
    parts = [*spec[:front], *(None,) * (len(shape) - front - back), *spec[len(whole) - back :]]
    while parts and parts[-1] is None:
        parts.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))


def init_state(params: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Return step 0 of training from these parameters, every array made where it belongs."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.int32(0), shardings.step)
    return TrainState(step=step, params=params, opt_state=opt_state)
