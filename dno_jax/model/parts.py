"""What layers are made of: parameters that they declare, norms, projections with adapters; and where arrays lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dno_jax.logprobs import head_token_logprobs
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.layers import AnyArray, layer_norm, precision_for, product, rms_norm, scaled


@runtime_checkable
class Constrain(Protocol):
    """Where arrays lie, for a model that knows names of axes and no devices; hashable."""

    @property
    def mesh(self) -> Any:
        """The mesh of those devices; None: there is one."""
        ...

    def __call__(self, array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Return the array, pinned to where axes of these names lie."""
        ...

    def look_up(self, table: jax.Array, token: jax.Array, *, dtype: Any) -> jax.Array:
        """Return table[token] in a dtype, of a table and of tokens that lie so."""
        ...

    def token_logprobs(self, hidden: jax.Array, head: jax.Array, token: jax.Array, **options: Any) -> jax.Array:
        """Return logprobs.head_token_logprobs of rows and a head that lie so, its `chunk` tokens of each device."""
        ...


@dataclass(frozen=True)
class Unconstrained:
    """The `constrain` of a single device."""

    mesh: None = None

    def __call__(self, array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        del axes
        return array

    def look_up(self, table: jax.Array, token: jax.Array, *, dtype: Any) -> jax.Array:
        return jnp.take(table, token, axis=0).astype(dtype)

    def token_logprobs(self, hidden: jax.Array, head: jax.Array, token: jax.Array, **options: Any) -> jax.Array:
        return head_token_logprobs(hidden, head, token, **options)


identity = Unconstrained()

ZEROS, ONES = nn.initializers.zeros_init(), nn.initializers.ones_init()
NORMAL = nn.initializers.truncated_normal(stddev=0.02)


@runtime_checkable
class Declares(Protocol):
    """A module that declares parameters."""

    def param(self, name: str, init_fn: Any, *init_args: Any) -> Any: ...


@runtime_checkable
class Layer(Declares, Protocol):
    """The module that declares what a layer is made of."""

    config: ModelConfig
    dtype: Any
    constrain: Constrain
    adapter: AdapterConfig | None

    def variable(self, col: str, name: str, init_fn: Any, *init_args: Any) -> Any: ...


def declare(
    module: Declares, name: str, *, init: nn.initializers.Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> AnyArray:
    """Declare a float32 parameter of a module, with the names of its axes; return its value."""
    boxed = nn.with_partitioning(init, axes)
    return cast(AnyArray, module.param(name, boxed, shape, jnp.float32))  # flax types the box, and gives what is in it


def norm(
    module: Declares,
    name: str,
    x: jax.Array,
    *,
    config: ModelConfig,
    axes: tuple[tuple[str, int], ...],
    scale: float = 1.0,
) -> jax.Array:
    """Norm the trailing axes of x, which `axes` names and sizes, by the parameter `name` of a module; times `scale`."""
    if config.norm == "layer":
        return layer_norm(x, eps=config.rms_norm_eps, scale=scale)
    names, shape = zip(*axes, strict=True)
    init = nn.initializers.constant(1.0 - config.norm_offset)
    weight = jnp.asarray(declare(module, name, init=init, shape=shape, axes=names), jnp.float32)
    return rms_norm(x, (config.norm_offset + weight) * scale, eps=config.rms_norm_eps)


@dataclass(frozen=True)
class Output:
    """What one matrix of a projection gives: its name in the tree, and the axes behind those of its inputs."""

    name: str
    axes: tuple[tuple[str, int], ...]


def project(
    module: Layer,
    y: jax.Array,
    *outputs: Output,
    inputs: tuple[tuple[str, int], ...],
    target: str | None = None,
    bias: bool = False,
) -> list[jax.Array]:
    """Multiply the trailing axes of y [B, T, inputs...] by matrices, which have one adapter together.

    Args:
        inputs: names and sizes of the axes that are summed over.
        target: of the adapters (adapters.TARGETS); None: the only output's name.
        bias: each output has one, of its own shape.
    """
    names, sizes = zip(*inputs, strict=True)
    rows, width = y.shape[:2], math.prod(sizes)
    x, precision = y.reshape(*rows, width), precision_for(module.dtype)
    adapter, target = module.adapter, target or outputs[0].name
    adapted = adapter is not None and target in adapter.targets
    narrow = None
    if adapter is not None and adapted:
        a = _factor(module, f"{target}_a", shape=(*sizes, adapter.rank), axes=(*names, "rank")).reshape(width, -1)
        narrow = module.constrain(scaled(product(x, a, precision), adapter.scale), ("batch", "length", "rank"))
    found = []
    for output in outputs:
        axes, shape = zip(*output.axes, strict=True)
        kernel = declare(module, output.name, init=NORMAL, shape=(*sizes, *shape), axes=(*names, *axes))
        kernel = jnp.asarray(kernel, module.dtype).reshape(width, -1)
        value = jnp.reshape(product(x, kernel, precision), (*rows, *shape))
        if bias:
            added = declare(module, f"{output.name}_bias", init=ZEROS, shape=shape, axes=axes)
            value = value + added.astype(module.dtype)[None, None]
        if adapter is not None and narrow is not None:
            b = _factor(module, f"{output.name}_b", shape=(adapter.rank, *shape), axes=("rank", *axes))
            value = value + jnp.reshape(product(narrow, b.reshape(adapter.rank, -1), precision), value.shape)
        found.append(value)
    return found


def _factor(module: Layer, name: str, *, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    boxed = nn.with_partitioning(ZEROS, axes)  # `init_adapters` draws what is no zero
    held: Any = module.variable("adapters", name, boxed, None, shape, jnp.float32)
    return held.value.astype(module.dtype)
