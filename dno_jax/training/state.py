"""What training carries from step to step, and where each piece of it lies."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import abstract_adapters, abstract_params, adapter_axes, param_axes
from dno_jax.parallel.sharding import AnyMesh, Layout, replicated, weight_shardings


@flax.struct.dataclass
class TrainState:
    step: Any  # scalar int32, optimiser steps taken
    params: Any  # float32, what is trained: the decoder's tree, or that of adapters beside one that stands
    opt_state: Any


def param_shardings(config: ModelConfig, mesh: AnyMesh, layout: Layout) -> Any:
    """Return the tree of shardings of the decoder's parameters."""
    return weight_shardings(mesh, layout, axes=param_axes(config), shapes=abstract_params(config))


def adapter_shardings(config: ModelConfig, adapter: AdapterConfig, mesh: AnyMesh, layout: Layout) -> Any:
    """Return the tree of shardings of adapters beside the decoder's parameters."""
    axes, shapes = adapter_axes(config, adapter), abstract_adapters(config, adapter)
    return weight_shardings(mesh, layout, axes=axes, shapes=shapes)


def state_shardings(optimizer: optax.GradientTransformation, params_shardings: Any, params: Any) -> TrainState:
    """Return the shardings of a train state: moments lie where their parameters lie, counters everywhere."""
    mesh = jax.tree.leaves(params_shardings)[0].mesh
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        params_shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(step=replicated(mesh), params=params_shardings, opt_state=opt_state)


def init_state(params: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Return step 0 of training from these parameters, every array made where it belongs."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.int32(0), shardings.step)
    return TrainState(step=step, params=params, opt_state=opt_state)
