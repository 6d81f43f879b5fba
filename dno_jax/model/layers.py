"""The arithmetic of a decoder: plain functions of arrays, without parameters of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Parameters come as numpy arrays from a checkpoint and as jax arrays from anywhere else.
AnyArray = jax.Array | np.ndarray


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
