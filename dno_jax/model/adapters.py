"""Low-rank adapters (LoRA): a layer's matrix W stands, and A and B are trained beside it: W + alpha / rank * A B.

They are a collection of their own, "adapters", beside "params" (float32, layers stacked on axis 0, r the rank):

    layers/ q_a [L, D, r]  q_b [L, r, N, H]    k, v likewise, with K heads    o_a [L, N, H, r]  o_b [L, r, D]
            gate_a, up_a [L, D, r]  gate_b, up_b [L, r, F]    down_a [L, F, r]  down_b [L, r, D]

and so on for the matrices of other mixers; those that checkpoints hold in one (delta_qkv, conv_in) have one A.

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
from dno_jax.model.stack import group_at

# What an adapter can stand beside -> our leaves, which have one A and a B each: all of a layer's matrices but a router.
_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
TARGETS: dict[str, tuple[str, ...]] = {name: (name,) for name in (*_ATTENTION, *_MLP)} | {
    "delta_qkv": ("delta_q", "delta_k", "delta_v"),
    "delta_gate": ("delta_gate",),
    "delta_strength": ("delta_strength",),
    "delta_decay": ("delta_decay",),
    "delta_out": ("delta_out",),
    "conv_in": ("conv_in_gate", "conv_out_gate", "conv_value"),
    "conv_out": ("conv_out",),
}
LINEAR = tuple(TARGETS)
LEAVES = tuple(leaf for leaves in TARGETS.values() for leaf in leaves)
# What PEFT calls them, where that is not our name and _proj.
_PEFT_NAMES = {
    "delta_qkv": "in_proj_qkv",
    "delta_gate": "in_proj_z",
    "delta_strength": "in_proj_b",
    "delta_decay": "in_proj_a",
    "delta_out": "out_proj",
    "conv_in": "in_proj",
    "conv_out": "conv.out_proj",
}
# And other words for some of them, LFM2's.
_SYNONYMS = {"w1": "gate", "w3": "up", "w2": "down", "self_attn.out_proj": "o"}


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
        had = targets_of(config)
        meant = {name: _meant(name, had) for name in (map(shown_target, had) if isinstance(targets, str) else targets)}
        if unknown := sorted(name for name, own in meant.items() if not set(own) <= set(had)):
            expected = ", ".join(map(shown_target, had))
            raise DnoError(f"adapter.targets has {unknown[0]!r}; expected all, or some of {expected}")
        named = {target for own in meant.values() for target in own}
        if config.num_experts and (experts := [f"{name}_proj" for name in _MLP if name in named]):
            raise DnoError(
                f"adapter.targets is {'all' if isinstance(targets, str) else list(targets)}, which takes in "
                f"{', '.join(experts)}: in a mixture of experts these are the experts', of which adapters are not "
                "supported; set adapter.targets=[q_proj,k_proj,v_proj,o_proj]"
            )
        return cls(rank, float(alpha), tuple(name for name in LINEAR if name in named))


def targets_of(config: ModelConfig) -> tuple[str, ...]:
    """Return which of LINEAR a model has."""
    mixers = set(config.layer_mixers)
    had = [name for name in _ATTENTION if "attention" in mixers] + list(_MLP)
    had += [name for name in LINEAR if name.startswith("delta_") and "gated_delta" in mixers]
    had += [name for name in LINEAR if name.startswith("conv_") and "short_conv" in mixers]
    return tuple(name for name in LINEAR if name in had)


def _meant(name: str, had: Sequence[str]) -> tuple[str, ...]:
    """Return the targets that a name means, ours or PEFT's, in a model that has `had`."""
    if name == "out_proj" and "conv_out" in had:  # LFM2's attention has it too
        return tuple(target for target in ("o", "conv_out") if target in had)
    known = {spelled: target for target in LINEAR for spelled in (target, shown_target(target))} | _SYNONYMS
    return (known.get(name, name),)


def shown_target(target: str) -> str:
    """The name of a target for a person, which is PEFT's."""
    return _PEFT_NAMES.get(target, f"{target}_proj")


def target_of(leaf: str) -> str | None:
    """Return which target a leaf of the parameter tree belongs to."""
    return next((target for target, leaves in TARGETS.items() if leaf in leaves), None)


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

    def change(path: Sequence[str], leaf: jax.Array) -> jax.Array:
        name = path[-1]
        target = target_of(name)
        if len(path) < 2 or target not in adapter.targets:
            return leaf
        group = group_at(adapters["layers"], tuple(path[1:-1]))
        return merged(leaf, group[f"{target}_a"], group[f"{name}_b"], scale=adapter.scale)

    return change
