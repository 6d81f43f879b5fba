"""The ways to compute a mixture of experts: `python benchmarks/experts.py [--tokens 512 --experts 64 --top 8]`.

Milliseconds of the forward pass and of value and gradients (best of --repeats), and temporaries. "einsum" runs
all experts on all tokens in three products; "dense" and "ragged" are the package's.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
from common import report

from dno_jax.model.moe import dense_experts, ragged_experts


def einsum_experts(x_BTD, weight_BTk, expert_BTk, *, gate_EDF, up_EDF, down_EFD, activation):
    weight = jnp.einsum("btk,btke->bte", weight_BTk, jax.nn.one_hot(expert_BTk, gate_EDF.shape[0], dtype=x_BTD.dtype))
    hidden = activation(jnp.einsum("btd,edf->btef", x_BTD, gate_EDF)) * jnp.einsum("btd,edf->btef", x_BTD, up_EDF)
    return jnp.einsum("btef,efd->btd", hidden * weight[..., None], down_EFD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--expert-width", type=int, default=128)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    E, D, F, dtype = options.experts, options.width, options.expert_width, jnp.dtype(options.dtype)
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (1, options.tokens, D), dtype)
    probability = jax.nn.softmax(jax.random.normal(keys[1], (1, options.tokens, E)))
    weight, expert = jax.lax.top_k(probability, options.top)
    shapes = {"gate_EDF": (E, D, F), "up_EDF": (E, D, F), "down_EFD": (E, F, D)}
    kernels = {
        name: jax.random.normal(key, shape, dtype) / shape[1] ** 0.5
        for key, (name, shape) in zip(keys[2:], shapes.items(), strict=True)
    }
    for name, experts in {"einsum": einsum_experts, "dense": dense_experts, "ragged": ragged_experts}.items():

        def forward(x, weight, kernels, experts=experts):
            return experts(x, weight, expert, activation=jax.nn.silu, **kernels)

        def loss(x, weight, kernels, forward=forward):
            return jnp.sum(jnp.square(forward(x, weight, kernels).astype(jnp.float32)))

        given = (x, weight, kernels)
        programs = [jax.jit(f).lower(*given).compile() for f in (forward, jax.value_and_grad(loss, (0, 1, 2)))]
        forward_ms, gradient_ms = (1e3 * fastest(program, given, options.repeats) for program in programs)
        memory = programs[1].memory_analysis()
        report(
            "experts",
            way=name,
            shape=f"{options.tokens} x {D}, {E} experts of {F}, top {options.top}, {options.dtype}",
            forward_ms=forward_ms,
            gradient_ms=gradient_ms,
            temporaries_mib=memory.temp_size_in_bytes / 2**20 if memory else None,
        )


def fastest(program, given, repeats: int) -> float:
    jax.block_until_ready(program(*given))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*given))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
