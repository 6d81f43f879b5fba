"""The arithmetic of a decoder: plain functions of arrays, without parameters of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Parameters come as numpy arrays from a checkpoint and as jax arrays from anywhere else.
AnyArray = jax.Array | np.ndarray

# By the names of ModelConfig.hidden_act.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def precision_for(dtype: Any) -> jax.lax.Precision | None:
    """Return the matrix precision under which `dtype` means what it says.

    Accelerators multiply float32 in TF32 or bfloat16 passes unless told otherwise.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*rows D"], kernel: Float[Array, "D F"], precision: Any) -> Float[Array, "*rows F"]:
    """Return x @ kernel, its kernel's gradient written as x^T g.

    Left alone, jax writes the transposed product, and XLA for CPUs then turns the larger operand round element by
    element, inside whatever it is fused with: a step took 1.14 times as long (docs/benchmarks.md).
    """
    return jnp.matmul(x, kernel, precision=precision)


def _product_forward(x: Array, kernel: Array, precision: Any) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, kernel, precision=precision), (x, kernel)


def _product_backward(precision: Any, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = operands
    rows = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(cotangent, kernel, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
    dkernel = jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())), precision=precision)
    return dx, dkernel


product.defvjp(_product_forward, _product_backward)


def rms_norm(x: Float[Array, "*shape"], scale: Float[AnyArray, "*axes"], *, eps: float) -> Float[Array, "*shape"]:
    """Divide by the root of the mean square, times `scale`; in float32 inside, in the dtype of `x` outside.

    Args:
        x: the trailing axes, as many as `scale` has, are normed together.
    """
    wide = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    mean_square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
    scale = jnp.asarray(scale, jnp.float32).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return (wide * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


def layer_norm(x: Float[Array, "*rows D"], *, eps: float, scale: float = 1.0) -> Float[Array, "*rows D"]:
    """Subtract the mean and divide by the deviation, times a number; in float32 inside, in the dtype of `x` outside."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + eps) * scale).astype(x.dtype)


def scaled(x: Float[Array, "*shape"], scale: float) -> Float[Array, "*shape"]:
    """Multiply by a number in float32, in the dtype of `x` outside."""
    return x if scale == 1.0 else (x.astype(jnp.float32) * scale).astype(x.dtype)
