"""The decoder: tokens and positions in, hidden states out. One parameter tree, whatever the dtype, remat or mesh.

The tree (float32, layers stacked on axis 0; [...] are shapes):

    embed [V, D]    final_norm [D]    head [D, V] unless tied
    layers/ attention_norm [L, D]  q [L, D, N, H]  k, v [L, D, K, H]  o [L, N, H, D]
            mlp_norm [L, D]  gate, up [L, D, F]  down [L, F, D]
            q_bias [L, N, H]  k_bias, v_bias [L, K, H]  o_bias, down_bias [L, D]  gate_bias, up_bias [L, F]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dno_jax.logprobs import einsum_float32
from dno_jax.model.attention import NO_WINDOW, Attention, attend, visible, xla_attention
from dno_jax.model.cache import KVCache
from dno_jax.model.config import ModelConfig
from dno_jax.model.layers import AnyArray, precision_for, rms_norm, rope, rope_angles

Remat = Literal["none", "full", "dots"]
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


def identity(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Constrain nothing: the `constrain` of a single device."""
    del axes
    return array


_ONES = nn.initializers.ones_init()
_ZEROS = nn.initializers.zeros_init()
_NORMAL = nn.initializers.truncated_normal(stddev=0.02)


def _param(
    module: nn.Module, name: str, *, init: nn.initializers.Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> AnyArray:
    """Declare a float32 parameter of a module, with the names of its axes; return its value."""
    boxed = nn.with_partitioning(init, axes)
    return cast(AnyArray, module.param(name, boxed, shape, jnp.float32))  # flax types the box, and gives what is in it


class Block(nn.Module):
    """One layer: attention and gated MLP, each behind a norm and added to the residual stream."""

    config: ModelConfig
    dtype: Any
    constrain: Constrain
    attention: Attention

    @nn.compact
    def __call__(
        self, carry: Any, layer: Any, cos: Any, sin: Any, position: Any, key_position: Any, cursor: Any
    ) -> tuple[Any, None]:
        """Run one layer.

        Args:
            carry: (x [B, T, D], key [L, B, K, H, S] or None, value [L, B, K, S, H] or None). The caches of all layers
                travel in the carry and are written in place; as scanned inputs and outputs they would be copied.
            layer: scalar int32, this layer's index into the caches.
            cos, sin: [B, T, 1, H/2] rotations.
            position, key_position: [B, T] and [B, S] int32, of the queries and of the keys; -1 is padding.
            cursor: scalar int32, the slot of the call's first token, or None without a cache.
        """
        x, key_cache, value_cache = carry
        config = self.config
        D, F = config.hidden_size, config.intermediate_size
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        place = self.constrain
        heads, kv_heads = ("batch", "length", "heads", "head_dim"), ("batch", "length", "kv_heads", "head_dim")
        biases = {"attention": config.attention_bias, "mlp": config.mlp_bias}

        def norm(name: str, y: jax.Array) -> jax.Array:
            scale = _param(self, name, init=_ONES, shape=(D,), axes=("norm",))
            return rms_norm(y, scale, eps=config.rms_norm_eps)

        def project(
            y: jax.Array,
            name: str,
            *,
            equation: str,
            shape: tuple[int, ...],
            axes: tuple[str, ...],
            out: int,
            part: Literal["attention", "mlp"],
        ) -> jax.Array:
            # The last `out` axes of the kernel are the output's, and the bias has just those.
            kernel = _param(self, name, init=_NORMAL, shape=shape, axes=axes)
            y = jnp.einsum(equation, y, kernel.astype(self.dtype), precision=precision_for(self.dtype))
            if biases[part]:
                bias = _param(self, f"{name}_bias", init=_ZEROS, shape=shape[-out:], axes=axes[-out:])
                y = y + bias.astype(self.dtype)[None, None]
            return y

        y = norm("attention_norm", x)
        into = partial(project, y, equation="btd,dnh->btnh", out=2, part="attention")
        q = place(into("q", shape=(D, N, H), axes=("embed", "heads", "head_dim")), heads)
        k = place(into("k", shape=(D, K, H), axes=("embed", "kv_heads", "head_dim")), kv_heads)
        v = place(into("v", shape=(D, K, H), axes=("embed", "kv_heads", "head_dim")), kv_heads)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        window, scale = NO_WINDOW, H**-0.5
        k_new, v_new = k, v
        if key_cache is not None:
            k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, K, H, T], [B, K, T, H]
            key_cache = jax.lax.dynamic_update_slice(
                key_cache, k.astype(key_cache.dtype)[None], (layer, 0, 0, 0, cursor)
            )
            value_cache = jax.lax.dynamic_update_slice(
                value_cache, v.astype(value_cache.dtype)[None], (layer, 0, 0, cursor, 0)
            )
        if key_cache is None or key_cache.shape[-1] == x.shape[1]:
            # Without a cache, or with one that this very call fills: every key is among this call's tokens.
            y = self.attention(q, k_new, v_new, position_BT=position, window=window, scale=scale, softcap=None)
        else:
            k = jax.lax.dynamic_index_in_dim(key_cache, layer, axis=0, keepdims=False)
            v = jax.lax.dynamic_index_in_dim(value_cache, layer, axis=0, keepdims=False)
            y = attend(q, k, v, visible(position, key_position, window), scale=scale)
        y = place(y, heads)
        axes = ("heads", "head_dim", "embed")
        y = project(y, "o", equation="btnh,nhd->btd", shape=(N, H, D), axes=axes, out=1, part="attention")
        x = place(x + y, ("batch", "length", "embed"))

        y = norm("mlp_norm", x)
        into = partial(project, y, equation="btd,df->btf", shape=(D, F), axes=("embed", "mlp"), out=1, part="mlp")
        y = place(nn.silu(into("gate")) * into("up"), ("batch", "length", "mlp"))
        y = project(y, "down", equation="btf,fd->btd", shape=(F, D), axes=("mlp", "embed"), out=1, part="mlp")
        x = place(x + y, ("batch", "length", "embed"))
        return (x, key_cache, value_cache), None


class Decoder(nn.Module):
    """A Llama-family decoder up to the final norm; the output head is applied by `logits` or by the log-prob primitive.

    Attributes:
        config: the shape of the model.
        dtype: of activations and of weights in products, float32 or bfloat16. Parameters stay as they are given.
        remat: what the backward pass recomputes: nothing, every layer, or all but the products with weights.
        constrain: called as constrain(array, axis names) on activations; a hashable value that pins them to a mesh.
        attention: mixes whole sequences; hashable. Not used by calls that see a cache.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: Remat = "none"
    constrain: Constrain = identity
    attention: Attention = xla_attention

    @nn.compact
    def __call__(
        self, token: Int[Array, "B T"], position: Int[Array, "B T"], cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Return hidden states after the final norm, and the cache with the tokens of this call added.

        Args:
            token: int32 ids in [0, V); padding holds any such id.
            position: int32 index of each token in its own text; -1 is padding, seen by nobody.
            cache: what came before, or None. The caller sees to it that length + T <= S: the length is a traced value
                and cannot be checked here.

        Raises:
            ValueError: the call has more tokens than the cache has slots, the shapes of token and position differ, or
                `remat` is unknown.
        """
        config = self.config
        if token.shape != position.shape:
            raise ValueError(f"token {token.shape} and position {position.shape} differ in shape")
        if cache is not None and token.shape[1] > cache.num_slots:
            raise ValueError(f"{token.shape[1]} tokens do not fit a cache of {cache.num_slots} slots")
        table_shape = (config.vocab_size, config.hidden_size)
        table = _param(self, "embed", init=_NORMAL, shape=table_shape, axes=("vocab", "embed"))
        if not config.tie_word_embeddings:
            # Declared here so that it belongs to the tree; used by output_head.
            _param(self, "head", init=_NORMAL, shape=table_shape[::-1], axes=("embed", "vocab"))

        # Whole rows before the look-up: a gather from split rows makes the partitioner replicate its [B, T, D] result.
        table = self.constrain(jnp.asarray(table), ("vocab", "embed"))
        x = jnp.take(table, token, axis=0).astype(self.dtype)
        x = self.constrain(x, ("batch", "length", "embed"))
        cos, sin = rope_angles(position, head_dim=config.head_dim, theta=config.rope_theta)
        if cache is None:
            key_position, cursor, carry = position, None, (x, None, None)
        else:
            cursor = cache.length
            key_position = jax.lax.dynamic_update_slice(cache.position, position.astype(jnp.int32), (0, cursor))
            carry = (x, cache.key, cache.value)

        in_axes: Any = (0, *[nn.broadcast] * 5)  # flax's own hint is int
        stack = nn.scan(
            _remat_block(self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, self.dtype, self.constrain, self.attention, name="layers")
        layer = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
        (x, key, value), _ = stack(carry, layer, cos, sin, position, key_position, cursor)

        scale = _param(self, "final_norm", init=_ONES, shape=(config.hidden_size,), axes=("norm",))
        hidden = self.constrain(rms_norm(x, scale, eps=config.rms_norm_eps), ("batch", "length", "embed"))
        if cache is None:
            return hidden, None
        return hidden, KVCache(key=key, value=value, position=key_position, length=cache.length + token.shape[1])


def _remat_block(remat: Remat) -> Any:
    if remat == "none":
        return Block
    if remat == "full":
        return nn.remat(Block, prevent_cse=False)  # a scan's body cannot be merged with its backward pass anyway
    if remat == "dots":
        return nn.remat(Block, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise ValueError(f"remat is {remat!r}; expected 'none', 'full' or 'dots'")


def output_head(config: ModelConfig, params: Mapping[str, Any]) -> Float[AnyArray, "D V"]:
    """Return the matrix from hidden states to logits; for tied embeddings the table, transposed."""
    return params["embed"].T if config.tie_word_embeddings else params["head"]


def logits(config: ModelConfig, params: Mapping[str, Any], hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Return float32 logits of hidden states, multiplied in the dtype of `hidden` and accumulated in float32."""
    # The table as it lies: transposing it first would copy it.
    name, equation = ("embed", "...d,vd->...v") if config.tie_word_embeddings else ("head", "...d,dv->...v")
    return einsum_float32(equation, hidden, params[name].astype(hidden.dtype))


def _without_mesh() -> Any:
    # Under a mesh, flax would take our axis names for mesh axes and constrain the fresh arrays by them.
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


@partial(jax.jit, static_argnums=0)
def _init(config: ModelConfig, key: jax.Array) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, token, token)["params"]


def _boxed(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Return fresh float32 parameters: matrices from a truncated normal of deviation 0.02, norms 1, biases 0."""
    with _without_mesh():
        return nn.unbox(_init(config, key))


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Return the parameter tree as jax.ShapeDtypeStruct, without making arrays."""
    with _without_mesh():
        return nn.unbox(_boxed(config))


def param_axes(config: ModelConfig) -> dict[str, Any]:
    """Return the parameter tree as tuples of axis names, such as ("layers", "embed", "heads", "head_dim")."""
    with _without_mesh():
        specs = nn.get_partition_spec(_boxed(config))
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
