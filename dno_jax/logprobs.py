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
    logits, token = jnp.asarray(logits, jnp.float32), jnp.asarray(token)
    vocabulary = jax.lax.broadcasted_iota(token.dtype, logits.shape, logits.ndim - 1)
    if split is None:
        chosen = jnp.sum(jnp.where(vocabulary == token[..., None], logits, 0.0), axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1)
    own = token - jax.lax.axis_index(split).astype(token.dtype) * logits.shape[-1]
    top = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits), axis=-1), split)
    chosen = jnp.sum(jnp.where(vocabulary == own[..., None], logits, 0.0), axis=-1)
    mass = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    chosen, mass = jax.lax.psum((chosen, mass), split)
    return chosen - top - jnp.log(mass)


def softcapped(logits: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    """Return softcap * tanh(logits / softcap), about the logits where they are small; None leaves them."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def head_token_logprobs(
    hidden: Float[ArrayLike, "B T D"],
    head: Float[ArrayLike, "D V"],
    token: Int[ArrayLike, "B T"],
    *,
    chunk: int,
    softcap: float | None = None,
    valid: Bool[ArrayLike, "B T"] | None = None,
    split: str | None = None,
) -> Float[Array, "B T"]:
    """Return log softmax(hidden @ head)[token] without holding the logits of more than B x chunk/B tokens.

    The backward pass recomputes each slice's logits, so peak memory is one slice's in both directions, and the head's
    gradient in float32.

    Args:
        hidden: final hidden states, float32 or bfloat16.
        head: output head in any float dtype; multiplied in hidden's dtype, accumulated in float32.
        token: ids in [0, V).
        chunk: tokens per slice, over the whole batch; need not divide B * T.
        softcap: logits x become softcap * tanh(x / softcap) first (Gemma 2); None leaves them.
        valid: slices without a valid token are not computed, and give 0; None computes all.
        split: in a shard_map, the axis whose devices hold consecutive columns of the head; None: it is whole.

    Raises:
        ValueError: chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected at least 1 token per slice")
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
    return jnp.asarray(_logprobs_by_slice(hidden, head, token, valid, _How(width, softcap, split)))[:, :length]


class _How(NamedTuple):
    width: int  # columns of a slice; they divide T
    softcap: float | None
    split: str | None


# By hand, so that the backward pass adds up the head's gradient in float32, whatever the head's dtype, and meets its
# slices in a loop of its own, which needs nothing of other devices.
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logprobs_by_slice(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    token: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None,
    how: _How,
) -> Float[Array, "B T"]:

    def one(start: Int[Array, ""]) -> Float[Array, "B W"]:
        part, target = (_slice(array, start, how) for array in (hidden, token))

        def computed() -> Array:
            return _slice_logprobs(part, head, target, how)[0]

        return _if_any(valid, start, how, computed, lambda: jnp.zeros_like(target, jnp.float32))

    return _joined(jax.lax.map(one, _starts(hidden, how)))


def _forward(
    hidden: Array, head: Array, token: Array, valid: Array | None, how: _How
) -> tuple[Array, tuple[Array, Array, Array, Array | None]]:
    return _logprobs_by_slice(hidden, head, token, valid, how), (hidden, head, token, valid)


def _backward(
    how: _How, residuals: tuple[Array, Array, Array, Array | None], cotangent: Array
) -> tuple[Array, Array, None, None]:
    hidden, head, token, valid = residuals

    def one(total: Array, start: Array) -> tuple[Array, Array]:
        part, target, slope = (_slice(array, start, how) for array in (hidden, token, cotangent))

        def computed() -> tuple[Array, Array]:
            _, pull = _slice_logprobs(part, head, target, how)
            of_logits = pull(slope)[0].astype(hidden.dtype)
            of_head = einsum_float32("btd,btv->dv", part, of_logits, place=_explicit_place(head))
            return total + of_head, einsum_float32("btv,dv->btd", of_logits, head).astype(hidden.dtype)

        return _if_any(valid, start, how, computed, lambda: (total, jnp.zeros_like(part)))

    zeros = jnp.zeros_like(head, jnp.float32)
    total, slopes = jax.lax.scan(one, zeros, _starts(hidden, how))
    return _joined(slopes), total.astype(head.dtype), None, None


_logprobs_by_slice.defvjp(_forward, _backward)


def _slice_logprobs(hidden: Array, head: Array, token: Array, how: _How) -> tuple[Array, Any]:
    """Return the log-probabilities of a slice, and the function from their cotangent to that of its logits."""
    logits = einsum_float32("btd,dv->btv", hidden, head)
    return jax.vjp(lambda x: token_logprobs(softcapped(x, how.softcap), token, split=how.split), logits)


def _if_any(
    valid: Array | None, start: Array, how: _How, computed: Callable[[], Any], otherwise: Callable[[], Any]
) -> Any:
    """Compute a slice if any of its tokens is valid."""
    return computed() if valid is None else jax.lax.cond(jnp.any(_slice(valid, start, how)), computed, otherwise)


def _starts(hidden: Array, how: _How) -> Array:
    return jnp.arange(hidden.shape[1] // how.width, dtype=jnp.int32) * how.width


def _slice(array: Array, start: Array, how: _How) -> Array:
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
