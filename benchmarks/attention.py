"""Attention back-ends: `python benchmarks/attention.py` times those that this machine has, one JSON line each.

Every back-end runs forward and backward on the same operands; `error` is the largest difference of its result and its
gradients from XLA's in float32, relative to the largest entry. On a GPU the default is bfloat16 at 7B's shape:

    python benchmarks/attention.py --batch 8 --length 2048 --window 1024
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import report

from dno_jax.model.attention import CudnnAttention, SplashAttention, xla_attention
from dno_jax.model.places import NO_WINDOW, Places


def operands(options: argparse.Namespace) -> tuple[jax.Array, ...]:
    """Return q, k, v and a cotangent, float32 but of the dtype's own values."""
    B, T, N, K, H = options.batch, options.length, options.heads, options.kv_heads, options.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    made = (jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(keys, (N, K, K, N), strict=True))
    return tuple(array.astype(options.dtype).astype(jnp.float32) for array in made)


def measure(options: argparse.Namespace) -> None:
    """Print a line for every back-end that runs here."""
    window = options.window or NO_WINDOW
    platform = jax.devices()[0].platform
    backends: dict[str, Any] = {"xla": xla_attention, "jax.nn xla": CudnnAttention((window,), implementation="xla")}
    if platform == "gpu":
        backends["cudnn"] = CudnnAttention((window,))
    if platform == "tpu":
        backends["splash"] = SplashAttention((window,))
    wide = operands(options)
    narrow = tuple(array.astype(options.dtype) for array in wide)
    position = np.broadcast_to(np.arange(options.length, dtype=np.int32), (options.batch, options.length)).copy()
    position[-1] = np.maximum(position[-1] - options.left_padding, -1)
    real = (position >= 0)[:, :, None, None]

    def gradient(attention: Any) -> Any:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
            def mixed(*operands: jax.Array) -> jax.Array:
                out = attention(
                    *operands,
                    places=Places(jnp.asarray(position)),
                    window=window,
                    scale=options.head_dim**-0.5,
                    softcap=None,
                )
                return jnp.where(real, out, 0)

            out, pull = jax.vjp(mixed, q, k, v)
            return out, *pull(cotangent)

        return run

    with jax.default_matmul_precision("highest"):
        wanted = [np.asarray(array) for array in jax.jit(gradient(xla_attention))(*wide)]
    for name, attention in backends.items():
        compiled = jax.jit(gradient(attention)).lower(*narrow).compile()
        found = jax.block_until_ready(compiled(*narrow))
        seconds = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*narrow))
            seconds.append(time.perf_counter() - start)
        errors = [
            float(np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max())
            for a, b in zip(found, wanted, strict=True)
        ]
        report(
            "attention",
            backend=name,
            **{key: getattr(options, key) for key in ("batch", "length", "heads", "kv_heads", "head_dim", "window")},
            left_padding=options.left_padding,
            dtype=options.dtype,
            milliseconds_best=1e3 * min(seconds),
            milliseconds_median=1e3 * float(np.median(seconds)),
            temporary_mib=compiled.memory_analysis().temp_size_in_bytes / 2**20,
            error=dict(zip(("out", "q", "k", "v"), (float(f"{error:.2g}") for error in errors), strict=True)),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = jax.devices()[0].platform == "cpu"
    parser.add_argument("--batch", type=int, default=2 if on_cpu else 8)
    parser.add_argument("--length", type=int, help="tokens per sequence (default: 512 on a CPU, else 2,048)")
    parser.add_argument("--heads", type=int, default=8 if on_cpu else 32)
    parser.add_argument("--kv-heads", type=int, default=2 if on_cpu else 8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=0, help="0 is none")
    parser.add_argument("--left-padding", type=int, default=0, help="of the last row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if options.length is None:
        options.length = 512 if on_cpu else 2048
    measure(options)


if __name__ == "__main__":
    main()
