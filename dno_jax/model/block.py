"""One layer of the decoder: a mixer and an MLP, in the residual stream. It knows no family, only numbers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.attention import Attention
from dno_jax.model.cache import LayerCache, WriteCache
from dno_jax.model.config import Mixer, ModelConfig
from dno_jax.model.layers import ACTIVATIONS, scaled
from dno_jax.model.mixers import MIXERS, Call
from dno_jax.model.moe import Experts, expert_load, route
from dno_jax.model.parts import NORMAL, Constrain, Output, declare, norm, project
from dno_jax.model.places import NO_WINDOW, Places

# Under this name layers leave how their tokens were spread over experts.
LOAD = "expert_load"


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
    """One layer: a mixer (mixers.py) and a gated MLP, added to the residual stream, each normed before, after, or both.

    In a mixture of experts, a token's experts stand in the place of the MLP.
    """

    config: ModelConfig
    dtype: Any
    constrain: Constrain
    attention: Attention
    experts: Experts
    write: WriteCache
    adapter: AdapterConfig | None = None
    mixer: Mixer = "attention"

    @nn.compact
    def __call__(
        self,
        carry: tuple[Any, Any],
        numbers: LayerNumbers,
        cos: Any,
        sin: Any,
        places: Places,
        reach: Any,
    ) -> tuple[tuple[Any, LayerCache | None], None]:
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

        call = Call(places=places, window=numbers.window, angles=(cos, sin), reach=reach)
        y, cache = MIXERS[self.mixer](self, before("attention", x), cache, call)
        x = after("attention", x, y)
        y = before("mlp", x)
        x = after("mlp", x, self._expert_mlp(y, places.position) if config.num_experts else self._mlp(y))
        return (x, cache), None

    def _norm(self, name: str, y: jax.Array) -> jax.Array:
        return norm(self, name, y, config=self.config, axes=(("norm", self.config.hidden_size),))

    def _mlp(self, y: jax.Array) -> jax.Array:
        config = self.config
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        (gate,), (up,) = (
            project(self, y, Output(name, (("mlp", F),)), inputs=(("embed", D),), bias=bias) for name in ("gate", "up")
        )
        y = self.constrain(ACTIVATIONS[config.hidden_act](gate) * up, ("batch", "length", "mlp"))
        (y,) = project(self, y, Output("down", (("embed", D),)), inputs=(("mlp", F),), bias=bias)
        return y

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
