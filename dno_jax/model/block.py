"""One layer of the decoder, and the parameters and norms that it declares. It knows no family, only numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dno_jax.logprobs import head_token_logprobs
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.attention import Attention, attend
from dno_jax.model.cache import KVCache, WriteCache, as_stored, reaches, read_layer
from dno_jax.model.config import ModelConfig
from dno_jax.model.layers import ACTIVATIONS, AnyArray, layer_norm, precision_for, product, rms_norm, scaled
from dno_jax.model.moe import Experts, expert_load, route
from dno_jax.model.places import NO_WINDOW, Places, visible
from dno_jax.model.rope import query_growth, rotate


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

ZEROS = nn.initializers.zeros_init()
NORMAL = nn.initializers.truncated_normal(stddev=0.02)
# Under this name layers leave how their tokens were spread over experts.
LOAD = "expert_load"


def declare(
    module: nn.Module, name: str, *, init: nn.initializers.Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> AnyArray:
    """Declare a float32 parameter of a module, with the names of its axes; return its value."""
    boxed = nn.with_partitioning(init, axes)
    return cast(AnyArray, module.param(name, boxed, shape, jnp.float32))  # flax types the box, and gives what is in it


def norm(
    module: nn.Module,
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


@flax.struct.dataclass
class LayerNumbers:
    """What tells one layer from the next besides its weights; rides through the scan, stacked on axis 0."""

    window: Any  # int32, tokens that a query sees
    rope: Any  # int32, index of its rotation


def layer_numbers(config: ModelConfig) -> LayerNumbers:
    count = config.num_hidden_layers
    rows = config.windows or (NO_WINDOW,) * count, config.layer_ropes or (0,) * count
    return LayerNumbers(*(jnp.asarray(row, jnp.int32) for row in rows))


class Block(nn.Module):
    """One layer: attention and gated MLP, each normed before or after (or both) and added to the residual stream.

    In a mixture of experts, a token's experts stand in the place of the MLP.
    """

    config: ModelConfig
    dtype: Any
    constrain: Constrain
    attention: Attention
    experts: Experts
    write: WriteCache
    adapter: AdapterConfig | None = None

    @nn.compact
    def __call__(
        self, carry: tuple[Any, KVCache | None], numbers: LayerNumbers, cos: Any, sin: Any, places: Places, reach: Any
    ) -> tuple[tuple[Any, KVCache | None], None]:
        """Run one layer.

        Args:
            carry: (x [B, T, D], this layer's cache or None).
            numbers: this layer's.
            cos, sin: [R, B, T, 1, H/2], of every rotation.
            places: of the tokens, [B, T].
            reach: scalar int32, which of the cache's `reaches` holds every token of the call; None without a cache.
        """
        x, cache = carry
        config = self.config
        cos, sin = (jax.lax.dynamic_index_in_dim(a, numbers.rope, axis=0, keepdims=False) for a in (cos, sin))

        def before(name: str, x: jax.Array) -> jax.Array:
            return self._norm(f"{name}_norm", x) if config.pre_norm else x

        def after(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
            y = self._norm(f"{name}_post_norm", y) if config.post_norm else y
            return self.constrain(x + scaled(y, config.residual_scale), ("batch", "length", "embed"))

        y, cache = self._attention(
            before("attention", x), cache, numbers=numbers, angles=(cos, sin), places=places, reach=reach
        )
        x = after("attention", x, y)
        y = before("mlp", x)
        x = after("mlp", x, self._expert_mlp(y, places.position) if config.num_experts else self._mlp(y))
        return (x, cache), None

    def _norm(self, name: str, y: jax.Array, *axes: tuple[str, int]) -> jax.Array:
        """Norm the trailing axes, by name and size; those of the residual stream where none are named."""
        config = self.config
        return norm(self, name, y, config=config, axes=axes or (("norm", config.hidden_size),))

    def _project(
        self,
        y: jax.Array,
        name: str,
        *,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        out: int,
        bias: bool,
    ) -> jax.Array:
        # The last `out` axes of the kernel are the output's, and the bias has just those.
        kernel = jnp.asarray(declare(self, name, init=NORMAL, shape=shape, axes=axes), self.dtype)
        rows, width = y.shape[:2], math.prod(shape[:-out])
        x = y.reshape(*rows, width)
        y = product(x, kernel.reshape(width, -1), precision_for(self.dtype))
        y = y.reshape(*rows, *shape[-out:])
        if bias:
            value = declare(self, f"{name}_bias", init=ZEROS, shape=shape[-out:], axes=axes[-out:])
            y = y + value.astype(self.dtype)[None, None]
        if self.adapter is not None and name in self.adapter.targets:
            y = y + self._adapted(x, name, shape=shape, axes=axes, out=out, adapter=self.adapter)
        return y

    def _adapted(
        self,
        x: jax.Array,
        name: str,
        *,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        out: int,
        adapter: AdapterConfig,
    ) -> jax.Array:
        """What an adapter adds to a projection of x [B, T, inputs]: (x A) B alpha / rank, in the activations' dtype."""

        def factor(half: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
            boxed = nn.with_partitioning(ZEROS, axes)  # `init_adapters` draws what is no zero
            held: Any = self.variable("adapters", f"{name}_{half}", boxed, None, shape, jnp.float32)
            return held.value.astype(self.dtype)

        rank, precision = adapter.rank, precision_for(self.dtype)
        a = factor("a", (*shape[:-out], rank), (*axes[:-out], "rank")).reshape(-1, rank)
        b = factor("b", (rank, *shape[-out:]), ("rank", *axes[-out:])).reshape(rank, -1)
        narrow = self.constrain(scaled(product(x, a, precision), adapter.scale), ("batch", "length", "rank"))
        return jnp.reshape(product(narrow, b, precision), (*x.shape[:2], *shape[-out:]))

    def _attention(
        self,
        y: jax.Array,
        cache: KVCache | None,
        *,
        numbers: LayerNumbers,
        angles: tuple[jax.Array, jax.Array],
        places: Places,
        reach: Any,
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim

        def head(name: str, heads: str, number: int) -> jax.Array:
            axes = ("embed", heads, "head_dim")
            found = self._project(y, name, shape=(D, number, H), axes=axes, out=2, bias=config.attention_bias)
            if config.clip_qkv is not None:
                found = jnp.clip(found, -config.clip_qkv, config.clip_qkv)
            if name != "v" and config.qk_norm is not None:
                sizes = ((heads, number), ("head_dim", H)) if config.qk_norm == "all" else (("norm", H),)
                found = self._norm(f"{name}_norm", found, *sizes)
            if name != "v":
                found = rotate(found, *angles)
            return self.constrain(found, ("batch", "length", heads, "head_dim"))

        q, k, v = head("q", "heads", N), head("k", "kv_heads", K), head("v", "kv_heads", K)
        if config.query_growth is not None:
            q = q * query_growth(places.position, *config.query_growth).astype(q.dtype)
        # One window everywhere is given as a number, from which back-ends can make a static mask.
        windows = set(config.windows or (NO_WINDOW,))
        window = windows.pop() if len(windows) == 1 else numbers.window
        scale = H**-0.5 if config.attention_scale is None else config.attention_scale
        softcap = config.attention_softcap
        if cache is not None:
            cache = self.write(cache, k_BTKH=k, v_BTKH=v, position_BT=places.position)
            k, v = as_stored(k, cache.key.dtype), as_stored(v, cache.value.dtype)
        if cache is None or cache.num_slots == y.shape[1]:
            # Without a cache, or with one that this very call fills: every key is among this call's tokens.
            y = self.attention(q, k, v, places=places, window=window, scale=scale, softcap=softcap)
        else:
            y = _attend_cache(q, cache, reach, places=places, window=window, scale=scale, softcap=softcap)
        y = self.constrain(y, ("batch", "length", "heads", "head_dim"))
        axes = ("heads", "head_dim", "embed")
        y = self._project(y, "o", shape=(N, H, D), axes=axes, out=1, bias=config.output_bias)
        return y, cache

    def _mlp(self, y: jax.Array) -> jax.Array:
        config = self.config
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        into = partial(self._project, y, shape=(D, F), axes=("embed", "mlp"), out=1, bias=bias)
        y = self.constrain(ACTIVATIONS[config.hidden_act](into("gate")) * into("up"), ("batch", "length", "mlp"))
        return self._project(y, "down", shape=(F, D), axes=("mlp", "embed"), out=1, bias=bias)

    def _expert_mlp(self, y: jax.Array, position: Any) -> jax.Array:
        config = self.config
        D, F, E = config.hidden_size, config.intermediate_size, config.num_experts

        def kernel(name: str, shape: tuple[int, ...], *axes: str) -> jax.Array:
            return jnp.asarray(declare(self, name, init=NORMAL, shape=shape, axes=axes))

        routing = route(
            y,
            kernel("router", (D, E), "embed", "routes"),
            position,
            num_experts_per_tok=config.num_experts_per_tok,
            norm=config.expert_norm,
        )
        self.sow("intermediates", LOAD, expert_load(routing, position))  # computed only for a caller who asks for it
        into = ("experts", "embed", "mlp")
        y = self.experts(
            y,
            routing.weight,
            routing.expert,
            gate_EDF=kernel("gate", (E, D, F), *into).astype(self.dtype),
            up_EDF=kernel("up", (E, D, F), *into).astype(self.dtype),
            down_EFD=kernel("down", (E, F, D), "experts", "mlp", "embed").astype(self.dtype),
            activation=ACTIVATIONS[config.hidden_act],
        )
        return self.constrain(y, ("batch", "length", "embed"))


def _attend_cache(
    q: jax.Array, cache: KVCache, reach: Any, *, places: Places, window: Any, scale: float, softcap: Any
) -> jax.Array:
    """Mix what a layer's cache holds, reading no further than the longest row makes it."""

    def up_to(num_slots: int) -> Callable[[jax.Array, KVCache], jax.Array]:
        def mix(q: jax.Array, cache: KVCache) -> jax.Array:
            own = read_layer(cache, num_slots=num_slots)
            mask = visible(places, Places(jnp.arange(num_slots, dtype=jnp.int32)[None]), window)
            return attend(
                q,
                own.key,
                own.value,
                mask,
                scale=scale,
                softcap=softcap,
                k_scale_BKS=own.key_scale,
                v_scale_BKS=own.value_scale,
            )

        return mix

    return jax.lax.switch(reach, [up_to(num_slots) for num_slots in reaches(cache.num_slots)], q, cache)
