"""Writing the key-value cache on a mesh: every device writes its own rows and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from dno_jax.model.cache import KVCache, LayerCache, cache_axes, write_layer
from dno_jax.model.cache_columns import write_columns, writes_columns
from dno_jax.parallel.sharding import AnyMesh, Layout


@dataclass(frozen=True)
class ShardedWrite:
    """The `WriteCache` of a mesh; a frozen value, so that it takes part in jit's cache key.

    Left to the partitioner, a write at each row's own column gathers what is written from all devices first.
    """

    mesh: AnyMesh
    layout: Layout

    def __call__(self, cache: KVCache, *, k_BTKH: Any, v_BTKH: Any, position_BT: Any) -> KVCache:
        """Return what `write_layer` would return on one device that holds everything."""

        in_place = _on_tpus(self.mesh) and writes_columns(cache, length=k_BTKH.shape[1])
        write = write_columns if in_place else write_layer

        def shard(cache: KVCache, k: Any, v: Any, position: Any) -> KVCache:
            return write(cache, k_BTKH=k, v_BTKH=v, position_BT=position)

        new, rows = ("batch", "length", "kv_heads", "head_dim"), ("batch", "length")
        place = self.layout.activation_spec
        caches = cache_specs(cache, self.layout)
        run = jax.shard_map(
            shard,
            mesh=self.mesh,
            in_specs=(caches, place(new), place(new), place(rows)),
            out_specs=caches,
            check_vma=not in_place,  # kernels do not say over which axes their results vary
        )
        return run(cache, k_BTKH, v_BTKH, position_BT)


def _on_tpus(mesh: AnyMesh) -> bool:
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "tpu"


def cache_specs(cache: LayerCache, layout: Layout) -> LayerCache:
    """Return where each field of a layer's cache lies, in one of PartitionSpecs."""
    return jax.tree.map(layout.activation_spec, cache_axes(cache), is_leaf=_names_axes)


def _names_axes(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(axis, str) for axis in value)
