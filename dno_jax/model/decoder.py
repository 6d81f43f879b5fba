"""The decoder: tokens and positions in, hidden states out. One parameter tree, whatever the dtype, remat or mesh.

The tree (float32, layers stacked on axis 0; [...] are shapes):

    embed [V, D]    final_norm [D]    head [D, V] unless tied; of a reward model, score [D, 1] in its place
    layers/ q [L, D, N, H]  k, v [L, D, K, H]  o [L, N, H, D]  gate, up [L, D, F]  down [L, F, D]
            q_bias [L, N, H]  k_bias, v_bias [L, K, H]  o_bias, down_bias [L, D]  gate_bias, up_bias [L, F]
            attention_norm, mlp_norm, attention_post_norm, mlp_post_norm [L, D]
            q_norm, k_norm [L, H], or [L, N, H] and [L, K, H] where all heads are normed together
            router [L, D, E]  gate, up [L, E, D, F]  down [L, E, F, D]  where experts take the MLP's place
            q [L, D, N, 2H] with its gate behind the queries, where attention is gated

In place of q, k, v and o, other mixers have (K, H heads of keys; V, P of values; W taps)

            delta_q, delta_k [L, D, K, H]  delta_v, delta_gate [L, D, V, P]  delta_strength, delta_decay [L, D, V]
            delta_q_conv, delta_k_conv [L, K, H, W]  delta_v_conv [L, V, P, W]  delta_rate, delta_shift [L, V]
            delta_norm [L, P]  delta_out [L, V, P, D]
            conv_in_gate, conv_out_gate, conv_value [L, D, D]  conv_taps [L, D, W]  conv_out [L, D, D]

and L then counts the layers of one kind that are stacked together, at layers/SECTION/POSITION (stack.py).

What a family has of these, ModelConfig says; a LayerNorm without parameters has no *_norm at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dno_jax.logprobs import einsum_float32, softcapped
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.attention import Attention, xla_attention
from dno_jax.model.block import Block, LayerNumbers, layer_numbers
from dno_jax.model.cache import Cache, WriteCache, num_slots_of, reach_index, write_layer
from dno_jax.model.config import Mixer, ModelConfig
from dno_jax.model.moe import Experts, dense_experts
from dno_jax.model.parts import NORMAL, Constrain, declare, identity, norm
from dno_jax.model.places import Places, as_places
from dno_jax.model.rope import rope_angles
from dno_jax.model.stack import Section, group_at, is_uniform, layer_places, sections

Remat = Literal["none", "full", "dots"]


class Decoder(nn.Module):
    """A decoder of any family up to the final norm; `logits`, `head_logprobs` and `rewards` apply the output head.

    Attributes:
        config: the shape of the model.
        dtype: of activations and of weights in products, float32 or bfloat16. Parameters stay as they are given.
        remat: what the backward pass recomputes: nothing, every layer, or all but the products with weights.
        constrain: called as constrain(array, axis names) on activations; a hashable value that pins them to a mesh,
            and runs the head there.
        attention: mixes whole sequences; hashable. Not used by calls that see a cache.
        experts: runs tokens through their experts, in a mixture of experts; hashable.
        write: puts a call's keys and values into the cache; hashable.
        adapter: adapters of the layers' matrices, in a collection "adapters" beside "params" (adapters.py); or None.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: Remat = "none"
    constrain: Constrain = identity
    attention: Attention = xla_attention
    experts: Experts = dense_experts
    write: WriteCache = write_layer
    adapter: AdapterConfig | None = None

    @nn.compact
    def __call__(
        self, token: Int[Array, "B T"], places: Places | Int[Array, "B T"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return hidden states after the final norm, and the cache with the tokens of this call added.

        A call with a cache takes params["layers"] stacked, or as `unstack_layers` gives them, which it reads faster.

        Args:
            token: int32 ids in [0, V); padding holds any such id.
            places: of the tokens; an array is their positions, int32, each row one text, -1 for padding. With a cache,
                every row is one text.
            cache: what came before, or None. A call with as many tokens as the cache has slots is taken for the first:
                its rows begin at position 0. The caller sees to it that positions are below S: they are traced values
                and cannot be checked here.

        Raises:
            ValueError: the call has more tokens than the cache has slots, the shapes of token and position differ, or
                `remat` is unknown.
        """
        config, places = self.config, as_places(places)
        position = places.position
        if token.shape != position.shape:
            raise ValueError(f"token {token.shape} and position {position.shape} differ in shape")
        slots = None if cache is None else num_slots_of(cache)
        if slots is not None and token.shape[1] > slots:
            raise ValueError(f"{token.shape[1]} tokens do not fit a cache of {slots} slots")
        table_shape = (config.vocab_size, config.hidden_size)
        table = declare(self, "embed", init=NORMAL, shape=table_shape, axes=("vocab", "embed"))
        # Declared here so that it belongs to the tree; used by logits and head_logprobs, or by rewards.
        if config.head == "reward":
            declare(self, "score", init=NORMAL, shape=(config.hidden_size, 1), axes=("embed", "labels"))
        elif not config.tie_word_embeddings:
            declare(self, "head", init=NORMAL, shape=table_shape[::-1], axes=("embed", "vocab"))

        x = self.constrain.look_up(jnp.asarray(table), token, dtype=self.dtype)
        x = x * jnp.asarray(config.embed_scale, self.dtype)  # rounded to the dtype first, as Gemma was trained
        x = self.constrain(x, ("batch", "length", "embed"))
        cos, sin = rope_angles(config, position)
        parts = (config, self.dtype, self.constrain, self.attention, self.experts, self.write, self.adapter)
        if cache is None:
            if is_uniform(config):
                stack = _scanned(_remat_block(self.remat), config.num_hidden_layers)
                layers = stack(*parts, mixer=config.layer_mixers[0], name="layers")
            else:
                layers = _Sections(parts, remat=self.remat, name="layers")
            (x, _), _ = layers((x, None), layer_numbers(config), cos, sin, places, None)
        else:
            # Layer by layer, each on arrays of its own; see model/cache.py.
            # Once for all: on a mesh it takes a word from every device.
            reach = None if slots is None else reach_index(position, slots)
            layers, written = self.variables["params"]["layers"], []
            for index, (own, (path, row)) in enumerate(zip(cache, layer_places(config), strict=True)):
                held = {"params": layers[index] if isinstance(layers, tuple) else _layer(group_at(layers, path), row)}
                if self.adapter is not None:
                    held["adapters"] = _layer(group_at(self.variables["adapters"]["layers"], path), row)
                numbers = _layer(layer_numbers(config), index)
                block = Block(*parts, mixer=config.layer_mixers[index], parent=None)
                (x, own), _ = block.apply(held, (x, own), numbers, cos, sin, places, reach)
                written.append(own)
            cache = tuple(written)

        # Logits are linear in this: scaled here, in float32, no user of the head can forget it.
        axes, scale = (("norm", config.hidden_size),), config.logit_scale
        hidden = norm(self, "final_norm", x, config=config, axes=axes, scale=scale)
        hidden = self.constrain(hidden, ("batch", "length", "embed"))
        return hidden, cache


def _layer(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


class _Period(nn.Module):
    """The layers of a pattern, one after the other: what the scan of a section repeats."""

    parts: tuple[Any, ...]
    remat: Remat
    mixers: tuple[Mixer, ...]

    @nn.compact
    def __call__(self, carry: Any, numbers: LayerNumbers, *call: Any) -> tuple[Any, None]:
        for position, mixer in enumerate(self.mixers):
            block = _remat_block(self.remat)(*self.parts, mixer=mixer, name=str(position))
            carry, _ = block(carry, _layer(numbers, position), *call)
        return carry, None


class _Sections(nn.Module):
    """All layers of a model whose mixers differ: a scan for each section (stack.py)."""

    parts: tuple[Any, ...]
    remat: Remat

    @nn.compact
    def __call__(self, carry: Any, numbers: LayerNumbers, *call: Any) -> tuple[Any, None]:
        config: ModelConfig = self.parts[0]
        for number, section in enumerate(sections(config.layer_mixers)):
            scan = _scanned(_Period, section.repeats)(self.parts, self.remat, section.mixers, name=str(number))
            carry, _ = scan(carry, _cut(numbers, section), *call)
        return carry, None


def _cut(numbers: LayerNumbers, section: Section) -> Any:
    """Return the numbers of a section's layers as [repeats, pattern]."""
    shape = (section.repeats, len(section.mixers))
    return jax.tree.map(lambda row: row[section.first : section.end].reshape(shape), numbers)


def _scanned(body: Any, length: int) -> Any:
    """Return a module that runs `body` over layers whose parameters are stacked."""
    in_axes: Any = (0, *[nn.broadcast] * 4)  # flax's own hint is int
    return nn.scan(
        body,
        variable_axes={"params": 0, "adapters": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _remat_block(remat: Remat) -> Any:
    if remat == "none":
        return Block
    if remat == "full":
        return nn.remat(Block, prevent_cse=False)  # a scan's body cannot be merged with its backward pass anyway
    if remat == "dots":
        return nn.remat(Block, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise ValueError(f"remat is {remat!r}; expected 'none', 'full' or 'dots'")


def logits(config: ModelConfig, params: Mapping[str, Any], hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Return float32 logits of hidden states, multiplied in the dtype of `hidden` and accumulated in float32."""
    # The table as it lies: transposing it first would copy it.
    name, equation = ("embed", "...d,vd->...v") if config.tie_word_embeddings else ("head", "...d,dv->...v")
    return softcapped(einsum_float32(equation, hidden, params[name].astype(hidden.dtype)), config.logit_softcap)


def head_logprobs(
    config: ModelConfig,
    params: Mapping[str, Any],
    hidden: Float[Array, "B T D"],
    token: Int[Array, "B T"],
    *,
    chunk: int,
    valid: Bool[Array, "B T"] | None = None,
    constrain: Constrain = identity,
) -> Float[Array, "B T"]:
    """Return log softmax(logits(hidden))[token] in nats, never all logits at once.

    Args:
        chunk: tokens at a time, on each device.
        valid: slices without a valid token are not computed, and give 0.
        constrain: the decoder's, which says where rows and head lie.
    """
    head = jnp.asarray(params["embed"].T if config.tie_word_embeddings else params["head"])
    options = {"chunk": chunk, "softcap": config.logit_softcap, "valid": valid}
    return constrain.token_logprobs(jnp.asarray(hidden), head, jnp.asarray(token), **options)


def rewards(
    params: Mapping[str, Any], hidden: Float[Array, "B T D"], position: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """Return a reward model's number for each text, float32: score . hidden of its last token.

    Args:
        params: of a config whose head is "reward".
        position: as the decoder was given; the last token is that of the highest. Rows of padding alone give anything.
    """
    # A masked sum and no gather, which would fail where the batch is split; what stands on padding may be no number.
    last = (position == jnp.max(position, axis=1, keepdims=True))[..., None]
    last_BD = jnp.sum(jnp.where(last, hidden, 0), axis=1)
    return einsum_float32("bd,dl->bl", last_BD, params["score"].astype(hidden.dtype))[:, 0]
