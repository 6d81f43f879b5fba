"""Optimiser steps of the tiny model on a mesh, whatever the optimiser and the dtypes."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dno_jax.addresses import Purpose, key_data
from dno_jax.config import LossSection, MeshSection
from dno_jax.model.decoder import Decoder
from dno_jax.model.params import computing_params, param_axes
from dno_jax.parallel.attention import make_attention
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN, Constrain
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.state import init_state, param_shardings, state_shardings
from dno_jax.training.step import StepConfig, train_step

LOSS = preference_loss(LossSection(beta=0.1))


def begin(config, params, section, *, axes=(1, 1, 1), param_dtype="float32", row_loss=LOSS):
    """Return (state, function of a state, a batch and a learning rate that takes a step)."""
    mesh = make_mesh(MeshSection(data=axes[0], fsdp=axes[1], tensor=axes[2]), jax.devices()[: math.prod(axes)])
    optimizer = make_optimizer(section, param_axes(config))
    places = param_shardings(config, mesh, TRAIN)
    held = computing_params(config, jnp.dtype(param_dtype))
    placed = jax.device_put(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, held), places)
    shardings = state_shardings(optimizer, places, placed)
    state = init_state(placed, optimizer, shardings)
    attention = make_attention("xla", mesh=mesh, layout=TRAIN)
    model = Decoder(config, constrain=Constrain(mesh, TRAIN), attention=attention)
    step = StepConfig(model, optimizer, row_loss, chunk=64, places=tuple(jax.tree.leaves(shardings)))
    key = key_data(Purpose.ROUNDING, 0, 0, "train")

    def call(function, state, batch, rate=1e-3):
        return function(state, batch.place(mesh), jnp.float32(rate), config=step, rounding=key)

    take = partial(call, train_step)
    take.lowered = partial(call, train_step.lower)
    return state, take


def take_steps(config, params, section, batches, *, rate=1e-3, **options):
    """Return the state after a step on each batch, and the losses."""
    state, take = begin(config, params, section, **options)
    losses = []
    for batch in batches:
        state, metrics = take(state, batch, rate)
        losses.append(metrics["loss"])
    return jax.tree.map(np.asarray, state), np.asarray(losses)
