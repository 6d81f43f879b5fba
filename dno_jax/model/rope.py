"""Rotary positions: frequencies of every published stretching, and the rotation itself.

Frequencies are constants of a run, made in numpy's float32 so that they round alike on every device. The formulas are
those of transformers' modeling_rope_utils.py, in its order of operations.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dno_jax.model.config import ModelConfig, RopeConfig


def frequencies(config: ModelConfig, rope: RopeConfig) -> Float[np.ndarray, " half"]:
    """Return the angle by which each pair of dimensions turns from one position to the next, radians, float32."""
    dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    context = config.max_position_embeddings
    original = rope.original_max_position_embeddings or context
    theta = config.rope_theta if rope.theta is None else rope.theta
    length = config.rope_length or 0
    if rope.rope_type == "none":
        return np.zeros(dim // 2, np.float32)
    if rope.rope_type == "dynamic" and dim > 2:
        theta = _dynamic_theta(theta, factor=rope.factor, stretch=max(length, context) / context, dim=dim)
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = np.power(np.float32(theta), exponent)
    plain = np.float32(1.0) / power
    if rope.rope_type == "linear":
        return plain / np.float32(rope.factor)
    if rope.rope_type == "llama3":
        return _llama3(plain, rope, original=original)
    if rope.rope_type == "yarn":
        return _yarn(power, rope, original=original, theta=theta)
    if rope.rope_type == "longrope":
        factors = rope.long_factor if length > original else rope.short_factor
        return np.float32(1.0) / (np.asarray(1.0 if factors is None else factors, np.float32) * power)
    return plain


def _dynamic_theta(theta: float, *, factor: float, stretch: float, dim: int) -> float:
    """NTK-aware scaling: theta * (factor * stretch - (factor - 1)) ** (dim / (dim - 2))."""
    return theta * (factor * stretch - (factor - 1)) ** (dim / (dim - 2))


def _llama3(plain: np.ndarray, rope: RopeConfig, *, original: int) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    wavelength = np.float32(2 * math.pi) / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    factor = np.float32(rope.factor)
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    found = np.where(wavelength > original / low, plain / factor, blended)
    return np.where(wavelength < original / high, plain, found).astype(np.float32)


def _yarn(power: np.ndarray, rope: RopeConfig, *, original: int, theta: float) -> np.ndarray:
    """Dimensions that turn often within the original context are kept, those that hardly turn are divided.

    YaRN (arXiv 2309.00071), equations 17 to 23.
    """
    half = len(power)

    def dimension(rotations: float) -> float:
        return 2 * half * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1) - ramp
    stretched, plain = np.float32(1) / (np.float32(rope.factor) * power), np.float32(1) / power
    return stretched * (1 - keep) + plain * keep


def yarn_attention_factor(factor: float, *, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Return YaRN's multiplier of cosine and sine: 0.1 ln(factor) + 1, or DeepSeek's ratio of two such."""

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def longrope_attention_factor(factor: float, *, original: int) -> float:
    """Return LongRoPE's multiplier of cosine and sine: sqrt(1 + ln(factor) / ln(original))."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rope_angles(
    config: ModelConfig, position: Int[Array, "B T"]
) -> tuple[Float[Array, "R B T 1 half"], Float[Array, "R B T 1 half"]]:
    """Return (cos, sin) of every position under each of the R rotations, float32, with an axis of one for the heads."""
    frequency = jnp.asarray(np.stack([frequencies(config, rope) for rope in config.ropes]))
    factor = jnp.asarray([rope.attention_factor for rope in config.ropes], jnp.float32)[:, None, None, None, None]
    place = jnp.maximum(position, 0).astype(jnp.float32)
    angle = place[None, :, :, None, None] * frequency[:, None, None, None, :]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def query_growth(position: Int[Array, "B T"], beta: float, original: int) -> Float[Array, "B T 1 1"]:
    """Return what a query is multiplied by, so that attention stays sharp beyond the original context."""
    times = jnp.floor(jnp.maximum(position, 0).astype(jnp.float32) / original)
    return (1 + beta * jnp.log(1 + times))[:, :, None, None]


def rotate(
    x_BTNH: Float[Array, "B T N H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Rotate the leading dimensions of each head by position; those beyond twice `half` pass.

    Dimension i pairs with i + half (Hugging Face's convention; Meta's files pair 2i, 2i+1).
    """
    half = cos.shape[-1]
    wide = x_BTNH.astype(jnp.float32)
    first, second, rest = jnp.split(wide, [half, 2 * half], axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x_BTNH.dtype)
