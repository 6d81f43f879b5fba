"""Policies and train states on disk (Orbax), and the identity of a policy."""

from __future__ import annotations

import hashlib
import os
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.parallel.cluster import barrier, is_primary
from dno_jax.training.state import TrainState

_FINGERPRINT = "FINGERPRINT"


def save_policy(path: epath.Path, params: Any) -> str:
    """Write a policy; FINGERPRINT, written last, marks it whole. Return the fingerprint.

    Every process calls this: each writes its own shards.
    """
    digest = fingerprint(params)
    if policy_fingerprint(path) == digest:
        return digest
    if is_primary() and (path / _FINGERPRINT).exists():  # it would mark half-written weights as whole
        (path / _FINGERPRINT).unlink()
    barrier(f"policy {path} open")
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path / "params", params, force=True)
    checkpointer.wait_until_finished()
    checkpointer.close()
    if is_primary():
        write_atomically(path / _FINGERPRINT, digest + "\n")
    barrier(f"policy {path}")
    return digest


def policy_fingerprint(path: epath.Path) -> str | None:
    """The fingerprint of a whole policy on disk, or None."""
    file = path / _FINGERPRINT
    return file.read_text().strip() if file.exists() else None


def load_policy(path: epath.Path, *, shapes: Any, shardings: Any) -> Any:
    """Read a policy straight into sharded arrays; each process reads what its devices hold.

    Args:
        shapes: tree of ShapeDtypeStructs (model.params.abstract_params).
        shardings: the same tree of shardings, of any mesh.

    Raises:
        DnoError: there is no whole policy at `path`.
    """
    if policy_fingerprint(path) is None:
        raise DnoError(
            f"{path}: no whole policy there (it has no {_FINGERPRINT} file); run the stage that writes it first"
        )
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )
    checkpointer = ocp.StandardCheckpointer()
    try:
        return checkpointer.restore(path / "params", target)
    finally:
        checkpointer.close()


class StateCheckpoints:
    """The last train states of one iteration, saved while training runs."""

    def __init__(self, path: epath.Path, *, save_every: int):
        options = ocp.CheckpointManagerOptions(save_interval_steps=save_every, max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(path, options=options)

    def save(self, state: TrainState, *, step: int) -> None:
        """Start writing the state after `step` optimiser steps, if `save_every` divides it."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: TrainState, shardings: TrainState) -> TrainState | None:
        """Return the last whole state, or None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, shardings
        )
        return cast(TrainState, self._manager.restore(step, args=ocp.args.StandardRestore(target)))

    def close(self) -> None:
        """Wait for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def fingerprint(params: Any) -> str:
    """Return 64 hex digits that name these parameters, whatever the mesh, dtype-exact.

    Two weighted sums of each array's bits modulo 2^32, made on the devices, then sha256 over names, shapes and sums:
    cheap at any size, equal for equal arrays. It finds mix-ups and corruption, not forgeries.
    """
    sums = jax.jit(lambda tree: jax.tree.map(_bit_sums, tree))(params)
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
    for leaf in jax.tree.leaves(sums):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _bit_sums(array: jax.Array) -> jax.Array:
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):  # a row-major index without a reshape, which would gather a sharded array
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    mixed = (bits ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = mixed ^ (mixed >> 15)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (2 * index + 1), dtype=jnp.uint32)])


def remove_states(path: epath.Path) -> None:
    """Delete train states that a finished stage needs no more."""
    if is_primary() and os.fspath(path) and path.exists():
        path.rmtree()
