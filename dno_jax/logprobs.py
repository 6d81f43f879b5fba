"""The one log-probability primitive: policy, reference, sampler audit and every loss use it.

All accumulation is float32 whatever the inputs; a [B, T, V] array is never made. The token's logit is selected by a
masked sum, not by a gather, because a gather fails under Explicit meshes and vocabulary shards. Only jax is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int


def token_logprobs(
    logits: Float[ArrayLike, "*B V"], token: Int[ArrayLike, "*B"], *, split: str | None = None
) -> Float[Array, "*B"]:
    """Return log softmax(logits)[token] in nats, float32.

    Args:
        logits: unnormalised, any float dtype; -inf is allowed at other tokens.
        token: ids in [0, V).
        split: in a shard_map, the axis whose devices hold consecutive parts of the vocabulary; None: V is all of it.
    """
    chosen, mass = _chosen_and_mass(jnp.asarray(logits, jnp.float32), jnp.asarray(token), split)
    return chosen - mass


def _chosen_and_mass(
    logits: Float[Array, "*B V"], token: Int[Array, "*B"], split: str | None
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Return logits[token] and the logarithm of the sum of exp(logits), over all parts of the vocabulary."""
    vocabulary = jax.lax.broadcasted_iota(token.dtype, logits.shape, logits.ndim - 1)
    if split is None:
        chosen = jnp.sum(jnp.where(vocabulary == token[..., None], logits, 0.0), axis=-1)
        return chosen, jax.nn.logsumexp(logits, axis=-1)
    own = token - jax.lax.axis_index(split).astype(token.dtype) * logits.shape[-1]
    top = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits), axis=-1), split)
    chosen = jnp.sum(jnp.where(vocabulary == own[..., None], logits, 0.0), axis=-1)
    mass = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    chosen, mass = jax.lax.psum((chosen, mass), split)
    return chosen, top + jnp.log(mass)


def softcapped(logits: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    """Return softcap * tanh(logits / softcap), about the logits where they are small; None leaves them."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def head_token_logprobs(
    hidden: Float[ArrayLike, "B T D"],
    head: Float[ArrayLike, "R V"],
    token: Int[ArrayLike, "B T"],
    *,
    chunk: int,
    softcap: float | None = None,
    valid: Bool[ArrayLike, "B T"] | None = None,
    split: str | None = None,
    gather: str | None = None,
    columns: int | None = None,
) -> Float[Array, "B T"]:
    """Return log softmax(hidden @ head)[token] without holding the logits of more than B x chunk/B tokens.

    The backward pass recomputes each slice's logits, so peak memory is one slice's in both directions, and in float32
    the gradient of some columns of the head at a time.

    Args:
        hidden: final hidden states, float32 or bfloat16.
        head: output head in any float dtype, R = D rows unless `gather` is given; multiplied in hidden's dtype,
            accumulated in float32.
        token: ids in [0, V).
        chunk: tokens per slice, over the whole batch; need not divide B * T.
        softcap: logits x become softcap * tanh(x / softcap) first (Gemma 2); None leaves them.
        valid: slices without a valid token are not computed, and give 0; None computes all.
        split: in a shard_map, the axis whose devices hold consecutive columns of the head; None: they are all here.
        gather: in a shard_map, the axis whose devices hold consecutive rows of the head, which is gathered once;
            backwards every device sends each other its part of the gradient. None: all rows are here.
        columns: how many columns of the head's gradient are added up in float32 at a time; None: 128 MiB of them. Give
            V where the compiler splits the head's columns over devices.

    Raises:
        ValueError: chunk or columns is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected at least 1 token per slice")
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}; expected at least 1 column of the head")
    hidden, token = jnp.asarray(hidden), jnp.asarray(token)
    batch, length, _ = hidden.shape
    # Slices run along T so that a sharded batch axis stays whole in each of them.
    width = max(1, min(length, chunk // max(batch, 1)))
    padding = -length % width
    hidden = jnp.asarray(jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))))
    token = jnp.pad(token, ((0, 0), (0, padding)))
    # Nothing is added. But in a shard_map a head that devices share is now each one's own, like their rows, and so are
    # rows beside parts of the head: gradients are added up over devices once, here, and not in every slice.
    head = jnp.asarray(head, hidden.dtype) + jnp.zeros_like(hidden, shape=())
    hidden = hidden + jnp.zeros_like(head, shape=())
    if valid is not None:  # of one slice, some are
        valid = None if width == length else jnp.pad(jnp.asarray(valid), ((0, 0), (0, padding)))
    how = _How(width, softcap, split, gather, columns)
    return jnp.asarray(_logprobs_by_slice(hidden, head, token, valid, how))[:, :length]


class _How(NamedTuple):
    width: int  # tokens of a row in a slice; they divide T
    softcap: float | None
    split: str | None
    gather: str | None
    columns: int | None


_HELD = 1 << 25  # numbers of the head's gradient in float32 at a time: 128 MiB
_LANES = 128  # blocks of columns begin where a TPU's tiles do


# By hand, so that the backward pass adds up the head's gradient in float32, whatever the head's dtype, holds a part of
# it at a time, and meets its slices in loops of its own, which need nothing of other devices.
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logprobs_by_slice(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "R V"],
    token: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None,
    how: _How,
) -> Float[Array, "B T"]:
    return _forward(hidden, head, token, valid, how)[0]


def _forward(
    hidden: Array, head: Array, token: Array, valid: Array | None, how: _How
) -> tuple[Array, tuple[Array, Array, Array, Array | None, Array]]:
    whole = head if how.gather is None else jax.lax.all_gather(head, how.gather, tiled=True)

    def one(start: Int[Array, ""]) -> tuple[Float[Array, "B W"], Float[Array, "B W"]]:
        part, target = (_slice(array, start, how) for array in (hidden, token))

        def computed() -> tuple[Array, Array]:
            logits = softcapped(einsum_float32("btd,dv->btv", part, whole), how.softcap)
            chosen, mass = _chosen_and_mass(logits, target, how.split)
            return chosen - mass, mass

        zeros = jnp.zeros_like(target, jnp.float32)
        return _if_any(valid, start, how, computed, lambda: (zeros, zeros))

    starts = jnp.arange(hidden.shape[1] // how.width, dtype=jnp.int32) * how.width
    logprob, mass = (_joined(slices) for slices in jax.lax.map(one, starts))
    return logprob, (hidden, whole, token, valid, mass)


def _backward(
    how: _How, residuals: tuple[Array, Array, Array, Array | None, Array], cotangent: Array
) -> tuple[Array, Array, None, None]:
    hidden, head, token, valid, mass = residuals
    cotangent = _of_each_part(cotangent, head, how.split)
    vocabulary = head.shape[1]
    width = _block_width(head, how)
    own = token if how.split is None else token - jax.lax.axis_index(how.split).astype(token.dtype) * vocabulary
    blocks = -(-vocabulary // width)

    def block(index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        of_head, of_hidden = carry
        # The last block begins early where blocks do not divide the vocabulary, and leaves what is done.
        first = index * width
        start = jnp.minimum(first, vocabulary - width)
        columns = head if blocks == 1 else jax.lax.dynamic_slice_in_dim(head, start, width, axis=1)

        def one(slice_index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            total, of_hidden = carry
            at = slice_index * how.width
            part, target, slope, whole, before = (
                _slice(array, at, how) for array in (hidden, own, cotangent, mass, of_hidden)
            )

            def computed() -> tuple[Array, Array]:
                logits = softcapped(einsum_float32("btd,dv->btv", part, columns), how.softcap)
                column = jax.lax.broadcasted_iota(target.dtype, logits.shape, 2) + start
                of_logits = slope[..., None] * ((column == target[..., None]) - jnp.exp(logits - whole[..., None]))
                if how.softcap is not None:
                    of_logits = of_logits * (1.0 - jnp.square(logits / how.softcap))
                if vocabulary % width:
                    of_logits = jnp.where(column >= first, of_logits, 0.0)
                of_logits = of_logits.astype(hidden.dtype)
                of_columns = einsum_float32("btd,btv->dv", part, of_logits, place=_explicit_place(head))
                of_part = einsum_float32("btv,dv->btd", of_logits, columns)
                return total + of_columns, (before + of_part).astype(before.dtype)

            total, after = _if_any(valid, at, how, computed, lambda: (total, before))
            return total, jax.lax.dynamic_update_slice_in_dim(of_hidden, after, at, axis=1)

        total = jnp.zeros_like(columns, jnp.float32)
        total, of_hidden = jax.lax.fori_loop(0, hidden.shape[1] // how.width, one, (total, of_hidden))
        total = _scattered(total.astype(head.dtype), how.gather)
        if blocks == 1:
            return total, of_hidden
        before = jax.lax.dynamic_slice_in_dim(of_head, start, width, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(of_head, before + total, start, axis=1), of_hidden

    of_hidden = jnp.zeros_like(hidden, hidden.dtype if blocks == 1 else jnp.float32)
    if blocks == 1:
        of_head, of_hidden = block(0, (head, of_hidden))
    else:
        of_head = head if how.gather is None else head[: head.shape[0] // jax.lax.axis_size(how.gather)]
        of_head, of_hidden = jax.lax.fori_loop(0, blocks, block, (jnp.zeros_like(of_head), of_hidden))
    return of_hidden.astype(hidden.dtype), of_head, None, None


_logprobs_by_slice.defvjp(_forward, _backward)


def _block_width(head: Array, how: _How) -> int:
    """How many columns of the head's gradient are held in float32 at a time."""
    vocabulary = head.shape[1]
    if how.columns is not None:
        return min(how.columns, vocabulary)
    blocks = 1 if _explicit_place(head) is not None else -(-head.size // _HELD)
    return min(vocabulary, _LANES * -(-vocabulary // (blocks * _LANES)))


def _of_each_part(cotangent: Array, head: Array, axis: str | None) -> Array:
    """Return the cotangent of what each device brought to a sum, from that of the sum.

    In a shard_map that checks nothing every device is given its share of it, and jax's rule for a sum adds them up.
    """
    if axis is None:
        return cotangent
    part = jnp.zeros_like(cotangent) + jnp.zeros_like(head, cotangent.dtype, shape=())
    (found,) = jax.vjp(lambda part: jax.lax.psum(part, axis), part)[1](cotangent)
    return jnp.asarray(found)


def _scattered(array: Array, axis: str | None) -> Array:
    """Add up the devices' arrays in float32, and keep this one's part of the rows.

    Every device sends each other its part. That is a reduce-scatter, of which TPUs would make the sum of the whole on
    every device, rounded at every addition.
    """
    if axis is None:
        return array
    parts = jnp.reshape(array, (jax.lax.axis_size(axis), -1, *array.shape[1:]))
    sent = jax.lax.all_to_all(parts, axis, split_axis=0, concat_axis=0)
    return jnp.sum(sent, axis=0, dtype=jnp.float32).astype(array.dtype)


def _if_any(
    valid: Array | None, start: Any, how: _How, computed: Callable[[], Any], otherwise: Callable[[], Any]
) -> Any:
    """Compute a slice if any of its tokens is valid."""
    return computed() if valid is None else jax.lax.cond(jnp.any(_slice(valid, start, how)), computed, otherwise)


def _slice(array: Array, start: Any, how: _How) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, how.width, axis=1)


def _joined(slices: Array) -> Array:
    """[S, B, W, ...] -> [B, S * W, ...]"""
    S, B, W, *rest = slices.shape
    return jnp.moveaxis(slices, 0, 1).reshape(B, S * W, *rest)


def sequence_logprobs(logprob: Float[ArrayLike, "*B T"], mask: Bool[ArrayLike, "*B T"]) -> Float[Array, "*B"]:
    """Return the sum of token log-probabilities where the mask is true, float32; 0 for an empty row."""
    return jnp.sum(jnp.where(mask, jnp.asarray(logprob, jnp.float32), 0.0), axis=-1)


def _explicit_place(array: Array) -> jax.sharding.NamedSharding | None:
    """Where an array lies on a mesh of Explicit axes, which ask where a sum over rows that are split is to lie."""
    place = jax.typeof(array).sharding
    explicit = any(kind == jax.sharding.AxisType.Explicit for kind in place.mesh.axis_types)
    return place if explicit else None


def einsum_float32(
    equation: str, a: ArrayLike, b: ArrayLike, *, place: jax.sharding.NamedSharding | None = None
) -> Array:
    """Return einsum(equation, a, b) accumulated and returned in float32, multiplied in the operands' own dtype.

    float32 operands are multiplied as float32 (an accelerator would take bfloat16 or TF32 passes by default).

    Args:
        place: where the result is to lie, on a mesh of Explicit axes alone.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.dtype == jnp.float32:
        return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST, out_sharding=place)

    def native(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, out_sharding=place)

    def widened(a: Array, b: Array) -> Array:
        # XLA's CPU back-end lacks some of these products; that of two bfloat16 numbers is exact in float32.
        return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), out_sharding=place)

    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)
