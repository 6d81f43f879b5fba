"""Policies and train states on disk (Orbax), and the identity of a policy."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dno_jax.bucket.work import bring
from dno_jax.console import say
from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.parallel.cluster import barrier, gather_from_processes, is_primary
from dno_jax.training.notes import ADAPTER, adapter_note, identity
from dno_jax.training.state import TrainState

T = TypeVar("T")
_ANOTHER = "not the state that was written: its fingerprint is another"
_FINGERPRINT, _PARAMS, _PRUNED, _BASE = "FINGERPRINT", "params", "PRUNED", "BASE"
_WRITTEN = jnp.dtype(jnp.float32)  # of every policy on disk


def save_policy(path: epath.Path, params: Any, *, adapter: str | None = None) -> str:
    """Write a policy; FINGERPRINT, written last, marks it whole. Return the fingerprint.

    Every process calls this: each writes its own shards.

    Args:
        adapter: what ADAPTER.json is to hold, where `params` are an adapter; it is a part of the policy's identity.
    """
    digest = identity(fingerprint(params), adapter)
    if is_primary():
        (path / _FINGERPRINT).unlink(missing_ok=True)  # it would mark half-written weights as whole
        if adapter is None:
            (path / ADAPTER).unlink(missing_ok=True)
        else:
            write_atomically(path / ADAPTER, adapter)
    barrier(f"policy {path} open")
    _hush_unfinished()
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path / _PARAMS, params, force=True)
    checkpointer.wait_until_finished()
    checkpointer.close()
    if is_primary():
        (path / _PRUNED).unlink(missing_ok=True)
        write_atomically(path / _FINGERPRINT, digest + "\n")
    barrier(f"policy {path}")
    return digest


def prune_policy(path: epath.Path) -> None:
    """Remove a policy's weights. Its fingerprint stays: it names what other stages were made from."""
    write_atomically(path / _PRUNED, "its weights were removed, as training.keep_policies says\n")
    for folder in path.iterdir():
        if folder.is_dir():
            folder.rmtree()


def is_pruned(path: epath.Path) -> bool:
    """Whether a policy's weights were removed on purpose."""
    return (path / _PRUNED).exists()


def policy_fingerprint(path: epath.Path) -> str | None:
    """The fingerprint that a whole policy was written with, or None.

    Raises:
        DnoError: the file that holds it is damaged.
    """
    file = path / _FINGERPRINT
    if not file.exists():
        return None
    text = file.read_bytes().strip()
    if not re.fullmatch(rb"[0-9a-f]{64}", text):
        raise DnoError(f"{file}: holds {text[:80]!r}, expected 64 hex digits; {policy_remedy(path)}")
    return text.decode()


def load_policy(
    path: epath.Path,
    *,
    shapes: Any,
    shardings: Any,
    exact: bool = False,
    change: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> Any:
    """Read a policy straight into sharded arrays, and hold it to its fingerprint; each process reads what it holds.

    Arrays that are wanted in another dtype are read one at a time: as they were written, for the fingerprint is of
    those bits, and cast at once, so that no device holds more than one of them besides what is wanted.

    Args:
        shapes: tree of ShapeDtypeStructs (model.params.abstract_params).
        shardings: the same tree of shardings, of any mesh.
        exact: whether it must be the very policy in the dtypes that are wanted.
        change: called with path and array of each leaf, float32, before it is cast; gives what takes its place.

    Raises:
        DnoError: there is no whole policy at `path`, it is not the one that was written, or it would be rounded and
            may not be.
    """
    noted = policy_fingerprint(path)
    if noted is None:
        raise DnoError(
            f"{path}: no whole policy there (it has no {_FINGERPRINT} file); run the stage that writes it first"
        )
    if is_pruned(path):
        raise DnoError(
            f"{path}: this policy's weights were removed, as training.keep_policies said; to have it again, "
            f"{policy_remedy(path)}"
        )
    wanted = dict(jax.tree.leaves_with_path(shapes))
    places = dict(zip(wanted, jax.tree.leaves(shardings), strict=True))
    written = {name: jax.ShapeDtypeStruct(leaf.shape, _WRITTEN, sharding=places[name]) for name, leaf in wanted.items()}
    as_written = all(leaf.dtype == _WRITTEN for leaf in wanted.values())
    sums: dict[Any, np.ndarray] = {}
    found: dict[Any, jax.Array] = {}
    rounded: dict[Any, Any] = {}
    for group in [list(wanted)] if as_written else [[name] for name in wanted]:
        read = undamaged(path, partial(_read_arrays, path / _PARAMS, shapes, {name: written[name] for name in group}))
        sums |= dict(zip(read, jax.device_get(_all_bit_sums(list(read.values()))), strict=True))
        for name in group:
            array = read.pop(name) if change is None else change(name, read.pop(name))
            found[name] = array.astype(wanted[name].dtype)
            if exact and not as_written:
                rounded[name] = jnp.any(found[name].astype(_WRITTEN) != array)
    digest = _digest(_in_tree(list(written.items())), list(sums.values()))
    check_fingerprint(path, noted, identity(digest, adapter_note(path)))
    if lost := [name for name, is_rounded in rounded.items() if bool(is_rounded)]:
        raise DnoError(
            f"{path}: {len(lost)} of its arrays hold numbers that training.param_dtype={wanted[lost[0]].dtype} cannot "
            f"show ({jax.tree_util.keystr(lost[0])} is one), so that training would start from another policy. A run "
            "that has this dtype from its beginning rounds policy 0 once, at its import: give another run_dir, or set "
            "training.param_dtype=float32"
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), [found[name] for name in wanted])


def check_fingerprint(path: epath.Path, noted: str, found: str) -> None:
    """Raise DnoError where a policy's weights are not those that it was written with."""
    if noted != found:
        raise DnoError(
            f"{path}: not the weights that were written there: their fingerprint is {found[:12]}, and {_FINGERPRINT} "
            f"says {noted[:12]}. Bits have changed on disk, or a file was replaced; {policy_remedy(path)}"
        )


def policy_remedy(path: epath.Path) -> str:
    """Say how a policy on disk that is damaged can be had again."""
    number = path.name
    if number != "base" and not number.isdecimal():
        return "restore it from a copy"
    if number == "base" or not int(number):
        return f"restore it from a copy, or remove {path} and run again: the same one is imported from model.path"
    return f"restore it from a copy, or train it again: dno run CONFIG --from train:{int(number) - 1}"


def undamaged(path: epath.Path, read: Callable[[], T]) -> T:
    """Read a policy's files; what they are refused with is a DnoError."""
    bring(path)
    found, damage = _tried(read)
    if damage is not None:
        raise DnoError(f"{path}: {damage}; {policy_remedy(path)}")
    return cast(T, found)


def _tried(read: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what is read, or what Orbax and TensorStore say of damaged or missing files, which may be any exception.

    Raises:
        Exception: what is of no file: a device or the host may be full.
    """
    try:
        return read(), None
    except Exception as error:
        inmost: BaseException = error
        while inmost.__cause__ is not None:
            inmost = inmost.__cause__
        if isinstance(inmost, (jax.errors.JaxRuntimeError, MemoryError)):
            raise
        first = str(inmost).strip().split("\n")[0]
        damage = f"cannot be read ({type(inmost).__name__}: {first[:200]})"
    _hush_unfinished()
    return None, damage


def _hush_unfinished() -> None:
    """Where one read or write fails Orbax leaves the others hanging; each complains at length whenever it ends."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        said = str(dropped.exc_value)
        if "Event loop is closed" not in said and "while reading array index" not in said:
            before(dropped)

    if getattr(before, "__qualname__", "") != hook.__qualname__:
        sys.unraisablehook = hook


def _read_arrays(path: epath.Path, tree: Any, wanted: Mapping[Any, jax.ShapeDtypeStruct]) -> dict[Any, jax.Array]:
    """Read some arrays of a checkpoint, by their paths in a tree of its structure."""
    item = jax.tree.map_with_path(lambda place, _: wanted.get(place, ocp.PLACEHOLDER), tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        read = dict(jax.tree.leaves_with_path(checkpointer.restore(path, args=args)))
    return {place: read[place] for place in wanted}


def stored_fingerprint(path: epath.Path) -> str:
    """Return the fingerprint of the policy that lies at `path`, read one array at a time onto one device.

    Raises:
        DnoError: they cannot be read.
    """
    return identity(undamaged(path, partial(_stored_digest, path / _PARAMS, _in_tree)), adapter_note(path))


def damaged_states(path: epath.Path) -> dict[int, str]:
    """Say what is wrong with the train states at `path`, by their steps; those of earlier versions are not checked."""
    found: dict[int, str] = {}
    for state in path.iterdir():
        if state.name.isdecimal():
            noted, damage = _tried(partial(_noted_of, state))
            digest, unread = _tried(partial(_stored_digest, state / "default", _by_name))
            damage = damage or unread or (_ANOTHER if noted not in (None, digest) else None)
            if damage is not None and state.exists():  # a training under way removes old ones
                found[int(state.name)] = damage
    return found


def _stored_digest(path: epath.Path, named: Callable[[Sequence[tuple[Any, Any]]], dict[str, Any]]) -> str:
    """Read the arrays of a checkpoint one at a time onto one device, and digest them in an order."""
    with closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree: Any = handler.metadata(path).tree
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = {
        place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for place, leaf in jax.tree.leaves_with_path(tree)
    }
    sums = {}
    for place, leaf in stored.items():
        (read,) = _read_arrays(path, tree, {place: leaf}).values()
        sums[place] = jax.device_get(_all_bit_sums([read])[0])
    return _digest(named(list(stored.items())), list(named(list(sums.items())).values()))


def _noted_of(state: epath.Path) -> str | None:
    """The fingerprint that a train state was written with; earlier versions noted none."""
    return _metadata_of(state).get(_FINGERPRINT)


def _metadata_of(state: epath.Path) -> dict[str, Any]:
    return json.loads((state / "_CHECKPOINT_METADATA").read_text()).get("custom_metadata") or {}


class StateCheckpoints:
    """The last train states of one iteration, saved while training runs, each with the fingerprint of its arrays.

    Args:
        base: fingerprint of the weights that stand, where states are of adapters beside them.
    """

    def __init__(self, path: epath.Path, *, keep: int = 2, base: str | None = None):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.path = path
        self._base = base
        _hush_unfinished()
        self._manager = ocp.CheckpointManager(path, options=options, item_handlers=ocp.StandardCheckpointHandler())

    @property
    def last_step(self) -> int | None:
        """The step after which the newest saved state is; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, step: int) -> None:
        """Start writing the state after `step` optimiser steps."""
        noted = {_FINGERPRINT: _state_digest(state), _BASE: self._base}
        # Forced: Orbax by itself would leave out, and write, others than those that are asked for.
        self._manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=noted, force=True)

    def restore(self, like: TrainState, shardings: TrainState) -> TrainState | None:
        """Return the last whole state, or None where there is none.

        A state that cannot be read, or is not the one that was written, is put aside with a word, and the one before it
        taken: what it held is computed again.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, shardings
        )
        while (step := self._manager.latest_step()) is not None:
            state, damage = self._read(step, target)
            # Every process takes the same one, also where the damage is in what one of them reads.
            if not gather_from_processes(np.asarray(damage is not None)).any():
                return state
            if is_primary():
                before = max((found for found in self._manager.all_steps() if found < step), default=None)
                kept = self.path / f"{step}.damaged"
                if kept.exists():
                    kept.rmtree()
                (self.path / str(step)).rename(kept)
                say(
                    f"warning: {self.path}/{step}: {damage or 'another process cannot read its part'}; it is kept as "
                    f"{kept.name}, and training goes on from "
                    + ("its beginning" if before is None else f"the state before it, after step {before}")
                )
            barrier(f"damaged state {self.path} {step}")
            self._manager.reload()
        return None

    def _read(self, step: int, target: TrainState) -> tuple[TrainState | None, str | None]:
        """Return a state, or what is wrong with it."""
        restore = partial(self._manager.restore, step, args=ocp.args.StandardRestore(target))
        base, damage = _tried(lambda: _metadata_of(self.path / str(step)).get(_BASE))
        if damage is None and base != self._base:
            raise DnoError(
                f"{self.path}/{step}: a state beside weights of fingerprint {base}, where {self._base} are trained "
                "beside; remove that folder, and training begins anew"
            )
        found, damage = _tried(lambda: (_noted_of(self.path / str(step)), cast(TrainState, restore())))
        if found is None:
            return None, damage
        noted, state = found
        if noted is not None and noted != _state_digest(state):
            return None, _ANOTHER
        return state, None

    def close(self) -> None:
        """Wait for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def fingerprint(params: Any) -> str:
    """Return 64 hex digits that name these parameters, whatever the mesh, dtype-exact.

    Two weighted sums of each array's bits modulo 2^32, made on the devices, then sha256 over names, shapes and sums:
    cheap at any size, equal for equal arrays. It finds mix-ups and corruption, not forgeries.
    """
    leaves = _in_tree(jax.tree.leaves_with_path(params))
    return _digest(leaves, jax.device_get(_all_bit_sums(list(leaves.values()))))


def _state_digest(state: TrainState) -> str:
    leaves = _by_name(jax.tree.leaves_with_path(state))
    return _digest(leaves, jax.device_get(_all_bit_sums(list(leaves.values()))))


def _in_tree(leaves: Sequence[tuple[Any, T]]) -> dict[str, T]:
    """The arrays of a policy, as its fingerprint takes them."""
    return {jax.tree_util.keystr(place): leaf for place, leaf in leaves}


def _by_name(leaves: Sequence[tuple[Any, T]]) -> dict[str, T]:
    """The arrays of a train state by names and in an order that they have on disk too, where it is all dicts."""
    return dict(sorted((jax.tree_util.keystr(place, simple=True, separator="/"), leaf) for place, leaf in leaves))


def _digest(leaves: Mapping[str, Any], sums: Sequence[np.ndarray]) -> str:
    """sha256 of names, shapes and dtypes of arrays, and of their sums in the same order."""
    digest = hashlib.sha256()
    for name, leaf in leaves.items():
        digest.update(f"{name} {leaf.shape} {leaf.dtype}\n".encode())
    for own in sums:
        digest.update(own.tobytes())
    return digest.hexdigest()


@jax.jit
def _all_bit_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_bit_sums(array) for array in arrays]


def _bit_sums(array: jax.Array) -> jax.Array:
    """Sum an array's bits, each mixed with its place: every device adds up what it holds, and eight bytes are moved."""
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
