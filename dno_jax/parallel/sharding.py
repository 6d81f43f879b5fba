"""From the names of array axes to devices: one frozen table a layout, one strict resolver.

A name that the table lacks and a size that the mesh does not divide both raise. Weights and activations have separate
tables because the same axis lies differently in them: "embed" is split over fsdp in a weight and whole in an
activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dno_jax.errors import DnoError
from dno_jax.logprobs import head_token_logprobs

Axes = tuple[str | None, ...]
Table = tuple[tuple[str, tuple[str, ...]], ...]
AnyMesh = Mesh | AbstractMesh  # abstract: what would lie where, on devices that are not here


@dataclass(frozen=True)
class Layout:
    """Where every named axis lies on the mesh. A frozen value, so that it takes part in jit's cache key."""

    name: str
    weights: Table
    activations: Table

    def weight_spec(self, axes: Axes) -> PartitionSpec:
        return _spec(axes, dict(self.weights), layout=self.name)

    def activation_spec(self, axes: Axes) -> PartitionSpec:
        return _spec(axes, dict(self.activations), layout=self.name)


# Outside of its experts a mixture is a dense model, so the devices of the expert axis take rows of their own there.
ROW_AXES = ("data", "fsdp", "expert")
_ACTIVATIONS: Table = (
    ("batch", ROW_AXES),
    ("layers", ()),
    ("length", ()),
    ("slots", ()),
    ("embed", ()),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("head_dim", ()),
    ("channels", ("tensor",)),
    ("taps", ()),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("rank", ()),
)
_TENSOR: Table = (
    ("layers", ()),
    ("norm", ()),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("head_dim", ()),
    ("channels", ("tensor",)),
    ("taps", ()),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("experts", ("expert",)),
    ("routes", ()),
    ("labels", ()),
    ("rank", ()),
)

# Training gathers each layer's weights when it needs them; decoding would gather them again for every token.
TRAIN = Layout("TRAIN", weights=(*_TENSOR, ("embed", ("fsdp",))), activations=_ACTIVATIONS)
DECODE = Layout("DECODE", weights=(*_TENSOR, ("embed", ())), activations=_ACTIVATIONS)


def _spec(axes: Axes, table: dict[str, tuple[str, ...]], *, layout: str) -> PartitionSpec:
    parts: list[tuple[str, ...] | str | None] = []
    for axis in axes:
        if axis is None:
            parts.append(None)
        elif axis not in table:
            raise DnoError(f"layout {layout} knows no axis {axis!r}; it knows {', '.join(sorted(table))}")
        else:
            names = table[axis]
            parts.append(names if len(names) > 1 else (names[0] if names else None))
    return PartitionSpec(*parts)


def resolve(mesh: AnyMesh, spec: PartitionSpec, *, shape: tuple[int, ...], name: str) -> NamedSharding:
    """Return the sharding of an array of this shape, without the mesh axes that have one device.

    The compiler leaves those out of the shardings of its results; were they kept in those of the arguments, a step
    would be compiled again for its own output.

    Raises:
        DnoError: a dimension is not divisible by the devices it is split over; `name` says whose.
    """
    parts: list[tuple[str, ...] | str | None] = []
    for dimension, part in zip(shape, spec, strict=True):
        axes = () if part is None else (part if isinstance(part, tuple) else (part,))
        real = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        parts.append(real if len(real) > 1 else (real[0] if real else None))
        devices = math.prod(mesh.shape[axis] for axis in axes)
        if dimension % devices:
            raise DnoError(
                f"{name} of shape {shape}: size {dimension} cannot be split over {'*'.join(axes)}={devices} devices; "
                "choose mesh axes that divide it"
            )
    while parts and parts[-1] is None:
        parts.pop()
    return NamedSharding(mesh, PartitionSpec(*parts))


def weight_shardings(mesh: AnyMesh, layout: Layout, *, axes: Any, shapes: Any) -> Any:
    """Return the tree of shardings of a tree of weights.

    Args:
        axes: tree of tuples of axis names (model.params.param_axes).
        shapes: the same tree of arrays or ShapeDtypeStructs.
    """

    def one(path: Any, array: Any, names: Axes) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        return resolve(mesh, layout.weight_spec(names), shape=array.shape, name=f"parameter {name}")

    return jax.tree.map_with_path(one, shapes, axes)


def row_sharding(mesh: AnyMesh, *, ndim: int, axis: int = 0) -> NamedSharding:
    """Return the sharding of a batch whose axis `axis` counts rows."""
    spec: list[tuple[str, ...] | None] = [None] * ndim
    spec[axis] = ROW_AXES
    return NamedSharding(mesh, PartitionSpec(*spec))


def num_row_shards(mesh: AnyMesh) -> int:
    """Into how many parts a batch is split; batch sizes must be multiples of it."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def mesh_here(mesh: AnyMesh) -> AnyMesh:
    """Return a mesh as it is seen from where this is traced.

    In a shard_map over some of its axes (training/step.py) that is the same mesh, those axes marked as taken.
    """
    inside = jax.sharding.get_abstract_mesh()
    return inside if inside.manual_axes else mesh


def free(mesh: AnyMesh, spec: PartitionSpec) -> PartitionSpec:
    """Leave out of a spec the axes of a mesh that a shard_map around has taken: along these, arrays are in parts."""
    taken = _taken(mesh)
    parts = [() if part is None else (part if isinstance(part, tuple) else (part,)) for part in spec]
    return PartitionSpec(*(tuple(axis for axis in part if axis not in taken) or None for part in parts))


def _taken(mesh: AnyMesh) -> tuple[str, ...]:
    return tuple(mesh.manual_axes) if isinstance(mesh, AbstractMesh) else ()


def map_shards(
    function: Callable[..., Any], *, mesh: AnyMesh, in_specs: Any, out_specs: Any, check_vma: bool = True
) -> Callable[..., Any]:
    """jax.shard_map over all axes of a mesh, or those that a shard_map around has not taken.

    Inside of another, jax 0.10 and 0.12 lay residuals out along its axes too, unless `check_vma` is off.
    """
    mesh = mesh_here(mesh)
    taken = _taken(mesh)
    in_specs, out_specs = jax.tree.map(
        lambda spec: free(mesh, spec), (in_specs, out_specs), is_leaf=lambda spec: isinstance(spec, PartitionSpec)
    )
    names, check = set(mesh.axis_names) - set(taken), check_vma and not taken
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=check)


@dataclass(frozen=True)
class Constrain:
    """Pins an activation to its place; injected into the model, which knows names but no mesh."""

    mesh: AnyMesh
    layout: Layout

    def __call__(self, array: jax.Array, axes: Axes) -> jax.Array:
        mesh = mesh_here(self.mesh)
        return jax.lax.with_sharding_constraint(
            array, NamedSharding(mesh, free(mesh, self.layout.activation_spec(axes)))
        )

    def look_up(self, table: jax.Array, token: jax.Array, *, dtype: Any) -> jax.Array:
        """Return table[token] in a dtype, the rows of tokens split over devices as the table's columns and rows are.

        Tokens travel, and not the table: each device looks all tokens up in its own columns, and devices exchange what
        they found. Backwards, each adds up the gradient of its own columns; so nothing as large as the table moves.
        """
        rows, across, along = self._splits()
        if not rows and along is None:
            return jnp.take(table, token, axis=0).astype(dtype)

        def local(table: jax.Array, token: jax.Array) -> jax.Array:
            token = token if across is None else jax.lax.all_gather(token, across, tiled=True)
            if along is not None:
                token = token - jax.lax.axis_index(along).astype(token.dtype) * table.shape[0]
            # Of other devices' rows nothing: a gather takes the last for what is beyond them.
            found = jnp.take(table, token, axis=0, mode="fill", fill_value=0).astype(dtype)
            if along is not None:
                found = jax.lax.psum(jnp.where((token >= 0)[..., None], found, 0), along)
            if across is not None:
                found = jax.lax.all_to_all(found, across, split_axis=0, concat_axis=2, tiled=True)
            return found

        spec = PartitionSpec(rows)
        return map_shards(local, mesh=self.mesh, in_specs=(PartitionSpec(along, across), spec), out_specs=spec)(
            table, token
        )

    def token_logprobs(
        self,
        hidden: jax.Array,
        head: jax.Array,
        token: jax.Array,
        *,
        valid: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Return logprobs.head_token_logprobs of rows that are split over devices, each by its device.

        The head is gathered once, in the dtype it is multiplied in. Every device adds up its own gradient of it over
        its slices, a part of its columns at a time, and the sum of each part over devices is taken once and cut as the
        head is; left to the compiler, each slice would gather the head and sum its gradient again.

        Args:
            options: chunk, in tokens of each device, and softcap.
        """

        rows, across, along = self._splits()
        if not rows and along is None:
            return head_token_logprobs(hidden, head, token, valid=valid, **options)

        def local(hidden: jax.Array, head: jax.Array, token: jax.Array, valid: jax.Array | None) -> jax.Array:
            # Backwards, the gradient is summed and cut along `across`, and only what is left of it along other axes.
            head = jax.lax.pcast(head, tuple(axis for axis in rows if axis != across), to="varying")
            return head_token_logprobs(hidden, head, token, valid=valid, split=along, gather=across, **options)

        spec = PartitionSpec(rows)
        specs = (spec, PartitionSpec(across, along), spec, spec)
        mapped = map_shards(local, mesh=self.mesh, in_specs=specs, out_specs=spec)
        return mapped(hidden, head.astype(hidden.dtype), token, valid)

    def _splits(self) -> tuple[tuple[str, ...], str | None, str | None]:
        """Return the axes that split rows here, and those that split a table's columns and its vocabulary."""
        mesh = mesh_here(self.mesh)
        rows = tuple(axis for axis in ROW_AXES if mesh.shape[axis] > 1 and axis not in _taken(mesh))
        return rows, self._split("embed"), self._split("vocab")

    def _split(self, axis: str) -> str | None:
        """Return the one mesh axis of several devices over which an axis of weights is split; None: over none."""
        (found,) = self.layout.weight_spec((axis,))
        assert found is None or isinstance(found, str)
        return found if found is not None and self.mesh.shape[found] > 1 else None


def to_device(tree: Any, shardings: Any) -> Any:
    """Make global arrays from host arrays that every process holds whole; each device copies only its own slice."""

    def one(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(one, tree, shardings)


def on_submesh(tree: Any, shardings: Any) -> Any:
    """Give arrays of a whole mesh out as arrays of a part of it that holds them whole; nothing is moved or copied."""

    def one(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        pieces = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, pieces)

    return jax.tree.map(one, tree, shardings)


def reshard(tree: Any, shardings: Any) -> Any:
    """Move device arrays to other shardings without passing through the host; compiled once for equal shardings.

    The meshes may lay the same devices out in another order.
    """
    orders = {
        tuple(place.mesh.devices.flat)
        for one in (jax.tree.map(lambda array: array.sharding, tree), shardings)
        for place in jax.tree.leaves(one)
        if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh)
    }
    if len(orders) > 1:
        return jax.device_put(tree, shardings)
    return jax.jit(_same, out_shardings=shardings)(tree)


def reshard_donated(tree: Any, shardings: Any) -> Any:
    """`reshard`, one array after another, each deleted when it has been moved: the tree never lies there twice."""

    def move(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        if array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        moved = jax.block_until_ready(reshard(array, sharding))
        array.delete()
        return moved

    return jax.tree.map(move, tree, shardings)


def _same(tree: Any) -> Any:
    # A function of the module: jit keeps programs by function, and a lambda would be a new one at every call.
    return tree


def owned_rows(array: jax.Array) -> dict[int, Any]:
    """Return {row: value} of the rows that this process is to write; over all processes each row comes exactly once."""
    rows: dict[int, Any] = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            start = shard.index[0].start or 0
            for offset, value in enumerate(np.asarray(shard.data)):
                rows[start + offset] = value
    return rows
