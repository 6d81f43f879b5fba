"""What mixes the tokens of a text in a layer: attention, a gated delta rule, or a short convolution.

Each takes the layer's normed stream and what it keeps of a text, and gives both back. They know no family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dno_jax.model.attention import Attention, attend
from dno_jax.model.cache import KVCache, MixerState, WriteCache, as_stored, reaches, read_layer
from dno_jax.model.causal_conv import causal_conv, next_tail
from dno_jax.model.config import Mixer
from dno_jax.model.delta_rule import delta_rule, delta_step
from dno_jax.model.layers import rms_norm
from dno_jax.model.parts import NORMAL, ONES, ZEROS, Layer, Output, declare, norm, project
from dno_jax.model.places import NO_WINDOW, Places, visible
from dno_jax.model.rope import query_growth, rotate


@dataclass(frozen=True)
class Call:
    """What every layer of a call is told.

    Attributes:
        places: of the tokens, [B, T].
        window: int32 scalar, this layer's.
        angles: cosine and sine of this layer's rotation, [B, T, 1, H/2].
        reach: scalar int32, which of the cache's `reaches` holds every token of the call; None without a cache.
    """

    places: Places
    window: Any
    angles: tuple[Any, Any]
    reach: Any


@runtime_checkable
class MixingLayer(Layer, Protocol):
    attention: Attention
    write: WriteCache


def attention(layer: MixingLayer, y: jax.Array, cache: Any, call: Call) -> tuple[jax.Array, Any]:
    """Mix values by attention; `cache` is a KVCache or None."""
    config, places = layer.config, call.places
    D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    gated = config.attention_gate

    def head(name: str, heads: str, number: int, size: int) -> jax.Array:
        output = Output(name, ((heads, number), ("head_dim", size)))
        (found,) = project(layer, y, output, inputs=(("embed", D),), bias=config.attention_bias)
        return found

    def ready(name: str, heads: str, number: int, found: jax.Array) -> jax.Array:
        if config.clip_qkv is not None:
            found = jnp.clip(found, -config.clip_qkv, config.clip_qkv)
        if name != "v" and config.qk_norm is not None:
            sizes = ((heads, number), ("head_dim", H)) if config.qk_norm == "all" else (("norm", H),)
            found = norm(layer, f"{name}_norm", found, config=config, axes=sizes)
        if name != "v":
            found = rotate(found, *call.angles)
        return layer.constrain(found, ("batch", "length", heads, "head_dim"))

    q = head("q", "heads", N, 2 * H if gated else H)
    gate = q[..., H:]
    q = ready("q", "heads", N, q[..., :H])
    k, v = (ready(name, "kv_heads", K, head(name, "kv_heads", K, H)) for name in ("k", "v"))
    if config.query_growth is not None:
        q = q * query_growth(places.position, *config.query_growth).astype(q.dtype)
    # One window everywhere is given as a number, from which back-ends can make a static mask.
    windows = set(config.windows or (NO_WINDOW,))
    window = windows.pop() if len(windows) == 1 else call.window
    scale = H**-0.5 if config.attention_scale is None else config.attention_scale
    softcap = config.attention_softcap
    if cache is not None:
        cache = layer.write(cache, k_BTKH=k, v_BTKH=v, position_BT=places.position)
        k, v = as_stored(k, cache.key.dtype), as_stored(v, cache.value.dtype)
    if cache is None or cache.num_slots == y.shape[1]:
        # Without a cache, or with one that this very call fills: every key is among this call's tokens.
        y = layer.attention(q, k, v, places=places, window=window, scale=scale, softcap=softcap)
    else:
        y = _attend_cache(q, cache, call.reach, places=places, window=window, scale=scale, softcap=softcap)
    y = y * jax.nn.sigmoid(gate) if gated else y
    y = layer.constrain(y, ("batch", "length", "heads", "head_dim"))
    inputs = ("heads", N), ("head_dim", H)
    (y,) = project(layer, y, Output("o", (("embed", D),)), inputs=inputs, bias=config.output_bias)
    return y, cache


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


def gated_delta(layer: MixingLayer, y: jax.Array, state: Any, call: Call) -> tuple[jax.Array, Any]:
    """Mix by the gated delta rule (delta_rule.py) behind a convolution; `state` is a MixerState or None.

    As in Qwen 3.5, log decay -exp(A) softplus(x W_a + dt), strength sigmoid(x W_b); what is read is normed in each
    head and multiplied by silu of a gate.
    """
    config, position = layer.config, _positions(call.places)
    D, W = config.hidden_size, config.conv_kernel
    K, H = config.linear_num_key_heads, config.linear_key_head_dim
    V, P = config.linear_num_value_heads, config.linear_value_head_dim
    key, value = (("kv_heads", K), ("head_dim", H)), (("heads", V), ("head_dim", P))
    inputs, real = (("embed", D),), (position >= 0)[..., None]

    outputs = Output("delta_q", key), Output("delta_k", key), Output("delta_v", value)
    mixed, tails = [], []
    for number, (output, x) in enumerate(
        zip(outputs, project(layer, y, *outputs, inputs=inputs, target="delta_qkv"), strict=True)
    ):
        names, sizes = zip(*output.axes, strict=True)
        name = f"{output.name}_conv"
        kernel = jnp.asarray(declare(layer, name, init=NORMAL, shape=(*sizes, W), axes=(*names, "taps")), layer.dtype)
        tail = None if state is None else state.tails[number]
        found = jax.nn.silu(causal_conv(x, kernel, position=position, tail=tail).astype(layer.dtype))
        mixed.append(layer.constrain(found, ("batch", "length", *names)))
        tails.append(None if tail is None else next_tail(tail, x, position=position))
    q, k, v = mixed

    single = (("heads", V),)
    (strength,), (step,), (gate,) = (
        project(layer, y, Output(name, axes), inputs=inputs)
        for name, axes in (("delta_strength", single), ("delta_decay", single), ("delta_gate", value))
    )
    rate = jnp.exp(jnp.asarray(declare(layer, "delta_rate", init=ZEROS, shape=(V,), axes=("heads",))))
    shift = jnp.asarray(declare(layer, "delta_shift", init=ONES, shape=(V,), axes=("heads",)))
    # A token of padding neither decays nor writes.
    log_decay = jnp.where(real, -rate[None, None] * jax.nn.softplus(step.astype(jnp.float32) + shift[None, None]), 0)
    strength = jnp.where(real, jax.nn.sigmoid(strength).astype(jnp.float32), 0)
    begins = position == 0
    if state is None:
        before = jnp.zeros((y.shape[0], V, H, P), jnp.float32)
        before = layer.constrain(before, ("batch", "heads", "head_dim", "head_dim"))
    else:
        before = state.recurrent
    if y.shape[1] == 1 and state is not None:
        one = partial(jax.lax.index_in_dim, index=0, axis=1, keepdims=False)
        q, k, v, log_decay, strength, begins = map(one, (q, k, v, log_decay, strength, begins))
        out, after = delta_step(q, k, v, log_decay=log_decay, strength=strength, begins=begins, state=before)
        out = out[:, None]
    else:
        out, after = delta_rule(q, k, v, log_decay=log_decay, strength=strength, begins=begins, state=before)

    scale = jnp.asarray(declare(layer, "delta_norm", init=ONES, shape=(P,), axes=("norm",)), jnp.float32)
    out = rms_norm(out.astype(layer.dtype), scale, eps=config.rms_norm_eps)
    out = (out.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(layer.dtype)
    out = layer.constrain(out, ("batch", "length", "heads", "head_dim"))
    (y,) = project(layer, out, Output("delta_out", (("embed", D),)), inputs=value)
    return y, None if state is None else MixerState(tails=tuple(tails), recurrent=after)


def short_conv(layer: MixingLayer, y: jax.Array, state: Any, call: Call) -> tuple[jax.Array, Any]:
    """Mix by a convolution between two gates: C * conv(B * x), as in LFM2; `state` is a MixerState or None."""
    config, position = layer.config, _positions(call.places)
    D, W, bias = config.hidden_size, config.conv_kernel, config.conv_bias
    channels = (("channels", D),)
    outputs = [Output(name, channels) for name in ("conv_in_gate", "conv_out_gate", "conv_value")]
    inward, outward, x = project(layer, y, *outputs, inputs=(("embed", D),), target="conv_in", bias=bias)
    kernel = declare(layer, "conv_taps", init=NORMAL, shape=(D, W), axes=("channels", "taps"))
    x = layer.constrain(inward * x, ("batch", "length", "channels"))
    tail = None if state is None else state.tails[0]
    mixed = causal_conv(x, jnp.asarray(kernel, layer.dtype), position=position, tail=tail)
    if bias:
        mixed = mixed + declare(layer, "conv_taps_bias", init=ZEROS, shape=(D,), axes=("channels",))[None, None]
    mixed = layer.constrain(outward * mixed.astype(layer.dtype), ("batch", "length", "channels"))
    (y,) = project(layer, mixed, Output("conv_out", (("embed", D),)), inputs=channels, bias=bias)
    return y, None if tail is None else MixerState(tails=(next_tail(tail, x, position=position),))


def _positions(places: Places) -> Any:
    if places.branch is not None:
        raise ValueError(
            "texts that share a prompt: what a recurrent layer has read cannot be continued twice; give each its own"
        )
    return places.position


MIXERS: dict[Mixer, Callable[[MixingLayer, jax.Array, Any, Call], tuple[jax.Array, Any]]] = {
    "attention": attention,
    "gated_delta": gated_delta,
    "short_conv": short_conv,
}
