"""Low-rank adapters (LoRA): a layer's matrix W stands, and A and B are trained beside it: W + alpha / rank * A B.

They are a collection of their own, "adapters", beside "params" (float32, layers stacked on axis 0, r the rank):

    layers/ q_a [L, D, r]  q_b [L, r, N, H]    k, v likewise, with K heads    o_a [L, N, H, r]  o_b [L, r, D]
            gate_a, up_a [L, D, r]  gate_b, up_b [L, r, F]    down_a [L, F, r]  down_b [L, r, D]

A new adapter has A = 0 and B random, the other way round than most: with B = 0 rounding decides the signs that Adam's
first step follows, which differ from mesh to mesh, and on some the loss then stays where it was (docs/adapters.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")  # our leaves; of a layer's matrices, all but a router
_MLP = ("gate", "up", "down")


@dataclass(frozen=True)
class AdapterConfig:
    """Which matrices have an adapter, and of what size.

    Attributes:
        rank: columns of A, rows of B.
        alpha: over rank, it multiplies A B.
        targets: of LINEAR, in its order.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @classmethod
    def of(cls, config: ModelConfig, *, rank: int, alpha: float, targets: str | Sequence[str] = "all") -> AdapterConfig:
        """Make the adapters of a model.

        Args:
            targets: "all", or names as PEFT has them (q_proj) or of LINEAR.

        Raises:
            DnoError: the model has no such matrix, or adapters of it are not supported.
        """
        named = LINEAR if isinstance(targets, str) else tuple(name.removesuffix("_proj") for name in targets)
        if unknown := sorted(set(named) - set(LINEAR)):
            raise DnoError(f"adapter.targets has {unknown[0]!r}; expected all, or some of {', '.join(LINEAR)}")
        if config.num_experts and (experts := [f"{name}_proj" for name in _MLP if name in named]):
            raise DnoError(
                f"adapter.targets is {'all' if isinstance(targets, str) else list(targets)}, which takes in "
                f"{', '.join(experts)}: in a mixture of experts these are the experts', of which adapters are not "
                "supported; set adapter.targets=[q_proj,k_proj,v_proj,o_proj]"
            )
        return cls(rank, float(alpha), tuple(name for name in LINEAR if name in named))


def merged(leaf: jax.Array, a: jax.Array, b: jax.Array, *, scale: float) -> jax.Array:
    """Return the stacked matrices W + scale * A B, in float32, where W lies; W is donated.

    Layer after layer, so that no more than one layer's product lies beside it.
    """
    return _merged(leaf.sharding)(leaf, a, b, jnp.float32(scale))


@lru_cache  # jit keeps programs by function
def _merged(place: Any) -> Any:
    return jax.jit(_add_products, donate_argnums=0, out_shardings=place)


def _add_products(leaf: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    def add(layer: Any, leaf: jax.Array) -> jax.Array:
        product = jnp.tensordot(a[layer], b[layer], axes=1, precision=jax.lax.Precision.HIGHEST)
        return leaf.at[layer].add(scale * product)

    return jax.lax.fori_loop(0, leaf.shape[0], add, leaf)


def merging(adapters: Mapping[str, Any], adapter: AdapterConfig) -> Callable[[Sequence[str], jax.Array], jax.Array]:
    """Return what gives each parameter, by its path in their tree and float32, with its adapter merged into it."""
    layers = adapters["layers"]

    def change(path: Sequence[str], leaf: jax.Array) -> jax.Array:
        name = path[-1]
        if len(path) < 2 or name not in adapter.targets:
            return leaf
        return merged(leaf, layers[f"{name}_a"], layers[f"{name}_b"], scale=adapter.scale)

    return change
