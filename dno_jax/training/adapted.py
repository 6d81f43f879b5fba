"""Policies that are an adapter beside another policy's weights: written, read apart from these, and read merged.

Such a policy's folder holds the adapter's arrays and ADAPTER.json: its rank, alpha and targets, and the policy of the
run beside whose weights it stands, by name and fingerprint. All of it is in the policy's own fingerprint.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from dno_jax.addresses import Purpose, key_data
from dno_jax.errors import DnoError
from dno_jax.model.adapters import AdapterConfig, merging
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import abstract_adapters, init_adapters
from dno_jax.parallel.sharding import AnyMesh, Layout
from dno_jax.training.checkpoint import load_policy, policy_fingerprint, policy_remedy, save_policy
from dno_jax.training.notes import ADAPTER, adapter_note
from dno_jax.training.state import adapter_shardings, param_shardings


def first_key(seed: int) -> jax.Array:
    """The key that a run's or a fine-tuning's first adapters are drawn by."""
    return jax.random.wrap_key_data(jnp.asarray(key_data(Purpose.ADAPTER, seed)), impl="threefry2x32")


@dataclass(frozen=True)
class Destination:
    """Whose arrays, and where they go."""

    config: ModelConfig
    mesh: AnyMesh
    layout: Layout

    @property
    def params(self) -> Any:
        return param_shardings(self.config, self.mesh, self.layout)

    def adapters(self, adapter: AdapterConfig) -> Any:
        return adapter_shardings(self.config, adapter, self.mesh, self.layout)


@dataclass(frozen=True)
class Note:
    """ADAPTER.json.

    Attributes:
        base: name of the policy beside whose weights the adapter stands.
        fingerprint: of these weights.
    """

    base: str
    fingerprint: str
    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig(self.rank, self.alpha, self.targets)


def base_of(policy: epath.Path) -> tuple[epath.Path, str]:
    """Return the folder whose weights a policy stands beside, or is, and their fingerprint.

    Raises:
        DnoError: the weights are not there, or others than those that the adapter was trained beside.
    """
    note = adapter_of(policy)
    base = policy if note is None else policy.parent / note.base
    found = policy_fingerprint(base)
    if found is None:
        raise DnoError(f"{base}: no whole policy there, whose weights {policy.name} needs; {policy_remedy(base)}")
    if note is not None and found != note.fingerprint:
        raise DnoError(
            f"{policy}: an adapter beside weights of fingerprint {note.fingerprint[:12]} ({ADAPTER}); those in {base} "
            f"have {found[:12]}. Beside other weights it is another policy; {policy_remedy(base)}"
        )
    return base, found


def adapter_of(policy: epath.Path) -> Note | None:
    """Return what a policy that is an adapter says of itself; None where the policy has weights of its own.

    Raises:
        DnoError: the note is damaged.
    """
    text = adapter_note(policy)
    if text is None:
        return None
    try:
        tree = json.loads(text)
        note = Note(**{**tree, "targets": tuple(tree["targets"])})
        whole = re.fullmatch(r"\d+|base", note.base) and note.rank >= 1 and note.alpha > 0
    except (ValueError, TypeError, KeyError):
        whole = None
    if not whole:
        raise DnoError(f"{policy / ADAPTER}: holds {text[:80]!r}, no note of an adapter; {policy_remedy(policy)}")
    return note


def save_adapter(path: epath.Path, adapters: Any, adapter: AdapterConfig, *, beside: epath.Path) -> str:
    """Write a policy that is an adapter; every process calls this. Return its fingerprint.

    Args:
        beside: the policy whose weights it stands beside, or another adapter beside the same weights.
    """
    base, fingerprint = base_of(beside)
    note = Note(base.name, fingerprint, **asdict(adapter))
    return save_policy(path, adapters, adapter=json.dumps(asdict(note), indent=2) + "\n")


def load_merged(path: epath.Path, to: Destination, *, shapes: Any) -> Any:
    """Read a policy that is an adapter merged into the weights that it stands beside.

    W + alpha / rank * A B is computed in float32, where the weights go, one array at a time, each cast at once.

    Args:
        shapes: of the weights, with the dtypes that are wanted.
    """
    note, (base, _) = adapter_of(path), base_of(path)
    assert note is not None
    adapter = note.adapter
    adapters = load_adapter(path, to, adapter)
    change = merging(adapters, adapter)
    return load_policy(
        base,
        shapes=shapes,
        shardings=to.params,
        change=lambda place, leaf: change([key.key for key in place], leaf),
    )


def load_apart(
    path: epath.Path, to: Destination, adapter: AdapterConfig, *, key: jax.Array, shapes: Any
) -> tuple[Any, Any]:
    """Read a policy as training and scoring have it: its adapter, and the weights that it stands beside.

    Args:
        adapter: what is trained. A policy that has weights of its own has a fresh one, which changes nothing.
        key: of that fresh one's draws.
        shapes: of the weights, with the dtypes that are wanted.

    Raises:
        DnoError: the policy's adapter has another shape, or stands beside other weights.
    """
    note, base = adapter_of(path), base_of(path)[0]
    if note is not None and note.adapter != adapter:
        raise DnoError(f"{path}: holds {note.adapter}, the configuration has {adapter}; {policy_remedy(path)}")
    if note is None:
        place = to.adapters(adapter)
        adapters = jax.jit(init_adapters, static_argnums=(0, 1), out_shardings=place)(to.config, adapter, key)
    else:
        adapters = load_adapter(path, to, adapter)
    return adapters, load_policy(base, shapes=shapes, shardings=to.params)


def load_adapter(path: epath.Path, to: Destination, adapter: AdapterConfig) -> Any:
    """Read the adapter of a policy alone, float32."""
    shapes = abstract_adapters(to.config, adapter)
    return load_policy(path, shapes=shapes, shardings=to.adapters(adapter))
