"""Experts over the mesh: each device holds the weights of its own experts, and computes only what goes to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from dno_jax.model.moe import Experts, dense_experts, ragged_experts
from dno_jax.parallel.sharding import ROW_AXES, AnyMesh, map_shards

# Where ragged_dot does the work of the groups alone. Elsewhere it is E masked products of all rows: on a CPU, at 64
# experts, ten times slower than dense_experts.
_RAGGED_PLATFORMS = ("tpu",)


@dataclass(frozen=True)
class ShardedExperts:
    """The `Experts` of a mesh; a frozen value, so that it takes part in jit's cache key.

    Outside, every device has rows of its own, along the expert axis too. Inside, the devices along that axis gather
    their rows, each runs its own experts (and its slice of their width, along the tensor axis) on all of them, and a
    sum gives every device its rows back.

    Attributes:
        local: runs the experts of one device.
    """

    mesh: AnyMesh
    local: Experts

    def __call__(
        self,
        x_BTD: Any,
        weight_BTk: Any,
        expert_BTk: Any,
        *,
        gate_EDF: Any,
        up_EDF: Any,
        down_EFD: Any,
        activation: Callable[[Any], Any],
    ) -> Any:
        """Return what `local` would return on one device that holds everything; see `moe.Experts`."""

        def shard(x: Any, weight: Any, expert: Any, gate: Any, up: Any, down: Any) -> Any:
            x, weight, expert = (
                jax.lax.pcast(jax.lax.all_gather(a, "expert", tiled=True), "tensor", to="varying")
                for a in (x, weight, expert)
            )
            first = jax.lax.axis_index("expert") * gate.shape[0]
            y = self.local(x, weight, expert - first, gate_EDF=gate, up_EDF=up, down_EFD=down, activation=activation)
            return jax.lax.psum(jax.lax.psum_scatter(y, "expert", tiled=True), "tensor")

        rows, wide = PartitionSpec(ROW_AXES), PartitionSpec("expert", None, "tensor")
        run = map_shards(
            shard,
            mesh=self.mesh,
            in_specs=(rows, rows, rows, wide, wide, PartitionSpec("expert", "tensor", None)),
            out_specs=rows,
        )
        return run(x_BTD, weight_BTk, expert_BTk, gate_EDF, up_EDF, down_EFD)


def sharded_experts(mesh: AnyMesh) -> ShardedExperts:
    """Return the experts of a mesh, computed the way that was measured to be fastest on its platform."""
    ragged = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform in _RAGGED_PLATFORMS
    return ShardedExperts(mesh, ragged_experts if ragged else dense_experts)
