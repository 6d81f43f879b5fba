"""The one log-probability primitive: policy, reference, sampler audit and every loss use it.

All accumulation is float32 whatever the inputs; a [B, T, V] array is never made. The token's logit is selected by a
masked sum, not by a gather, because a gather fails under Explicit meshes and vocabulary shards. Only jax is imported.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int


def token_logprobs(logits: Float[ArrayLike, "*B V"], token: Int[ArrayLike, "*B"]) -> Float[Array, "*B"]:
    """Return log softmax(logits)[token] in nats, float32.

    Args:
        logits: unnormalised, any float dtype; -inf is allowed at other tokens.
        token: ids in [0, V).
    """
    logits, token = jnp.asarray(logits, jnp.float32), jnp.asarray(token)
    vocabulary = jax.lax.broadcasted_iota(token.dtype, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(vocabulary == token[..., None], logits, 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


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
) -> Float[Array, "B T"]:
    """Return log softmax(hidden @ head)[token] without holding the logits of more than B x chunk/B tokens.

    The backward pass recomputes each slice's logits, so peak memory is one slice's in both directions.

    Args:
        hidden: final hidden states, float32 or bfloat16.
        head: output head in any float dtype; multiplied in hidden's dtype, accumulated in float32.
        token: ids in [0, V).
        chunk: tokens per slice, over the whole batch; need not divide B * T.
        softcap: logits x become softcap * tanh(x / softcap) first (Gemma 2); None leaves them.
        valid: slices without a valid token are not computed, and give 0; None computes all.

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
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    token = jnp.pad(token, ((0, 0), (0, padding)))
    head = jnp.asarray(head, hidden.dtype)
    slices = (length + padding) // width

    valid = jnp.ones(token.shape, bool) if valid is None else jnp.pad(jnp.asarray(valid), ((0, 0), (0, padding)))

    def one_slice(start: Int[Array, ""]) -> Float[Array, "B W"]:
        hidden_slice = jax.lax.dynamic_slice_in_dim(hidden, start, width, axis=1)
        token_slice = jax.lax.dynamic_slice_in_dim(token, start, width, axis=1)
        logits = einsum_float32("btd,dv->btv", hidden_slice, head)
        return token_logprobs(softcapped(logits, softcap), token_slice)

    if slices == 1:
        return jax.checkpoint(one_slice, prevent_cse=False)(jnp.int32(0))[:, :length]

    @partial(jax.checkpoint, prevent_cse=False)
    def if_any(start: Int[Array, ""]) -> Float[Array, "B W"]:
        wanted = jnp.any(jax.lax.dynamic_slice_in_dim(valid, start, width, axis=1))
        return jax.lax.cond(wanted, one_slice, lambda _: jnp.zeros((batch, width), jnp.float32), start)

    logprob = jax.lax.map(if_any, jnp.arange(slices, dtype=jnp.int32) * width)  # [slices, B, width]
    return jnp.moveaxis(logprob, 0, 1).reshape(batch, length + padding)[:, :length]


def sequence_logprobs(logprob: Float[ArrayLike, "*B T"], mask: Bool[ArrayLike, "*B T"]) -> Float[Array, "*B"]:
    """Return the sum of token log-probabilities where the mask is true, float32; 0 for an empty row."""
    return jnp.sum(jnp.where(mask, jnp.asarray(logprob, jnp.float32), 0.0), axis=-1)


def einsum_float32(equation: str, a: ArrayLike, b: ArrayLike) -> Array:
    """Return einsum(equation, a, b) accumulated and returned in float32, multiplied in the operands' own dtype.

    float32 operands are multiplied as float32 (an accelerator would take bfloat16 or TF32 passes by default).
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.dtype == jnp.float32:
        return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)

    def native(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    def widened(a: Array, b: Array) -> Array:
        # XLA's CPU back-end lacks some of these products; that of two bfloat16 numbers is exact in float32.
        return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))

    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)
