"""A convolution over the last tokens of a text, one kernel for each channel, and what it has to remember of a text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv(
    x: Float[Array, "B T *C"],
    kernel: Float[Array, "*C W"],
    *,
    position: Int[Array, "B T"],
    tail: Float[Array, "B U *C"] | None = None,
) -> Float[Array, "B T *C"]:
    """Return sum_j kernel[..., W - 1 - j] x_(t-j) over the tokens of each token's own text, in float32.

    Args:
        position: of each token in its text, -1 for padding; a text's tokens lie side by side. It says how far back a
            token may look, so that texts of one row see nothing of each other.
        tail: what came before the row's first token, the latest last; None: nothing.
    """
    width, length = kernel.shape[-1], x.shape[1]
    x = _with_tail(x, tail, width)
    reach = position.reshape(*position.shape, *(1,) * (x.ndim - 2))
    total = jnp.zeros((), jnp.float32)
    for back in range(width):
        seen = jax.lax.slice_in_dim(x, width - 1 - back, width - 1 - back + length, axis=1)
        total = total + jnp.where(
            reach >= back, seen * kernel[None, None, ..., width - 1 - back].astype(jnp.float32), 0
        )
    return total


def next_tail(
    tail: Float[Array, "B U *C"], x: Float[Array, "B T *C"], *, position: Int[Array, "B T"]
) -> Float[Array, "B U *C"]:
    """Return the last W - 1 inputs up to each row's last token that is no padding; a row of padding keeps its own."""
    width, length = tail.shape[1] + 1, x.shape[1]
    x = _with_tail(x, tail, width)
    end = jnp.max(jnp.where(position >= 0, jnp.arange(1, length + 1)[None], 0), axis=1)
    if length == 1:
        alive = end.reshape(-1, *(1,) * (x.ndim - 1)) > 0
        return jnp.where(alive, x[:, 1:], x[:, :-1])
    # A sum that picks, and no gather, which would fail where rows are split over devices.
    wanted = end[:, None] + jnp.arange(width - 1)[None]
    picked = (wanted[:, :, None] == jnp.arange(length + width - 1)[None, None]).astype(jnp.float32)
    return jnp.einsum("bws,bs...->bw...", picked, x, precision=jax.lax.Precision.HIGHEST)


def _with_tail(x: Array, tail: Array | None, width: int) -> Array:
    x = x.astype(jnp.float32)
    before = jnp.zeros((x.shape[0], width - 1, *x.shape[2:]), jnp.float32) if tail is None else tail
    return jnp.concatenate([before, x], axis=1)
