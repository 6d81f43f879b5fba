"""Writing the key-value cache on a mesh: every device writes its own rows and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from dno_jax.model.cache import KVCache, cache_axes, write_layer
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

        def shard(cache: KVCache, k: Any, v: Any, position: Any) -> KVCache:
            return write_layer(cache, k_BTKH=k, v_BTKH=v, position_BT=position)

        new, rows = ("batch", "length", "kv_heads", "head_dim"), ("batch", "length")
        place = self.layout.activation_spec
        caches = cache_specs(cache, self.layout)
        run = jax.shard_map(
            shard,
            mesh=self.mesh,
            in_specs=(caches, place(new), place(new), place(rows)),
            out_specs=caches,
        )
        return run(cache, k_BTKH, v_BTKH, position_BT)


def cache_specs(cache: KVCache, layout: Layout) -> KVCache:
    """Return where each field of a cache lies, in a KVCache of PartitionSpecs."""
    return jax.tree.map(layout.activation_spec, cache_axes(cache), is_leaf=lambda axes: isinstance(axes, tuple))
