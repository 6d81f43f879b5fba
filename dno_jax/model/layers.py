"""The arithmetic of a decoder: plain functions of arrays, without parameters of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dno_jax.logprobs import einsum_float32

# Parameters come as numpy arrays from a checkpoint and as jax arrays from anywhere else.
AnyArray = jax.Array | np.ndarray

# Finite, so that a row that sees nothing becomes a mean over everything instead of NaN, in the backward pass too.
_UNSEEN = -0.7 * float(np.finfo(np.float32).max)

# Measured on a CPU at T = 256 and 512: blocks of 32 to 128 queries are within 15 % of each other,
# all twice as fast as none.
_QUERY_BLOCKS, _SHORTEST_BLOCK = 8, 64


def precision_for(dtype: Any) -> jax.lax.Precision | None:
    """Return the matrix precision under which `dtype` means what it says.

    Accelerators multiply float32 in TF32 or bfloat16 passes unless told otherwise.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def rms_norm(x: Float[Array, "*rows D"], scale: Float[AnyArray, " D"], *, eps: float) -> Float[Array, "*rows D"]:
    """Divide by the root of the mean square, times `scale`; in float32 inside, in the dtype of `x` outside."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scale = jnp.asarray(scale, jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (wide * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


def rope_angles(
    position: Int[Array, "B T"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Return (cos, sin) of every position's rotation, float32, with an axis of one for the heads."""
    # The frequencies are constants: the rounding of numpy's float32 power is the same on every device.
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = (1.0 / np.power(np.float32(theta), exponent)).astype(np.float32)
    place = jnp.maximum(position, 0).astype(jnp.float32)
    angle = place[:, :, None, None] * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rope(
    x_BTNH: Float[Array, "B T N H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Rotate by position, pairing dimension i with i + H/2 (Hugging Face's convention; Meta's files pair 2i, 2i+1)."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def visible(query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Say which key a query sees, from positions alone: 0 <= position of the key <= position of the query."""
    key = key[:, None, :]
    return (key >= 0) & (key <= query[:, :, None])


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Mix values by scaled dot products, each group of N/K query heads over one key head; softmax in float32.

    Keys lie with slots innermost: a decode step then reads both caches in the order in which they lie in memory.
    A query that sees no key gives a finite value that means nothing.

    A whole sequence (T == S) is cut into blocks of queries, each against the keys up to its own end: half of the work,
    and scores that fit a cache. It needs tokens to stand in order of position along a row, padding anywhere.
    """
    length = q_BTNH.shape[1]
    block = max(_SHORTEST_BLOCK, -(-length // _QUERY_BLOCKS))
    if length != k_BKHS.shape[3] or length <= block:
        return _attend_block(q_BTNH, k_BKHS, v_BKSH, mask_BTS)
    mixed = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = mask_BTS[:, start:end, :end]
        mixed.append(_attend_block(q_BTNH[:, start:end], k_BKHS[..., :end], v_BKSH[:, :, :end], mask))
    return jnp.concatenate(mixed, axis=1)


def _attend_block(
    q_BTNH: Float[Array, "B T N H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = einsum_float32("btkgh,bkhs->bkgts", q_BTKGH, k_BKHS)
    scores = jnp.where(mask_BTS[:, None, None], scores * H**-0.5, _UNSEEN)
    weight = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    mixed = einsum_float32("bkgts,bksh->btkgh", weight, v_BKSH)
    return mixed.reshape(B, T, N, H).astype(q_BTNH.dtype)
