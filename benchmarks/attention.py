"""Attention back-ends: `python benchmarks/attention.py` times those that this machine has, one JSON line each.

Every back-end runs forward and backward on the same operands; `error` is the largest difference of its result and its
gradients from XLA's in float32, relative to the largest entry. On a GPU the default is bfloat16 at 7B's shape:

    python benchmarks/attention.py --batch 8 --length 2048 --window 1024

`--aot v5e:4x4` runs nothing: it compiles the training step of Mistral 7B for that TPU slice (pip install libtpu) with
each back-end of --backends, and prints memory and collectives of the program.
"""
# ruff: noqa: E402  (the environment is set up before jax)

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import sys
import time
from typing import Any

# What libtpu asks of its surroundings; without these it looks for the machine's own TPU for minutes.
_NO_TPU_HERE = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
if "--aot" in sys.argv:
    os.environ.update(_NO_TPU_HERE)

import jax
import jax.numpy as jnp
import numpy as np
from common import report
from jax.experimental import topologies

from dno_jax.config import LossSection, MeshSection, OptimizerSection
from dno_jax.model.attention import CudnnAttention, SplashAttention, xla_attention
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder
from dno_jax.model.params import abstract_params
from dno_jax.model.places import NO_WINDOW, Places
from dno_jax.parallel.attention import make_attention
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN, Constrain, row_sharding
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.state import TrainState, param_shardings, state_shardings
from dno_jax.training.step import StepConfig, train_step

MISTRAL_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=32768,
    windows=(4096,) * 32,
)


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


def compile_step(topology: str, *, backend: Any, options: argparse.Namespace) -> Any:
    """Return the compiled DNO step of Mistral 7B (float32 weights and moments, bfloat16 compute) on a TPU slice."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshSection(data=1, fsdp=-1, tensor=options.tensor), list(devices))
    config, optimizer = MISTRAL_7B, make_optimizer(OptimizerSection())
    params, places = abstract_params(config), param_shardings(config, mesh, TRAIN)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
    )
    row = TrainingRow(((1,) * (options.length // 4),) * 2, ((1,) * (options.length - options.length // 4),) * 2)
    # A pair is two sequences: so many pairs that each device has --sequences of them.
    pairs = len(devices) // options.tensor * options.sequences // 2
    batch = make_batch([row] * pairs, batch_size=pairs, max_length=options.length)

    def place(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    step = StepConfig(
        model=Decoder(
            config,
            dtype=jnp.bfloat16,
            remat="full",
            constrain=Constrain(mesh, TRAIN),
            attention=make_attention(backend, mesh=mesh, layout=TRAIN, windows=MISTRAL_7B.windows),
        ),
        optimizer=optimizer,
        row_loss=preference_loss(LossSection(beta=0.1)),
        chunk=options.chunk,
    )
    lowered = train_step.lower(
        jax.tree.map(place, state, state_shardings(optimizer, places, params)),
        jax.tree.map(lambda leaf: place(leaf, row_sharding(mesh, ndim=leaf.ndim)), batch),
        jnp.float32(1e-6),
        config=step,
    )
    return lowered.compile()


def describe(programs: Any) -> dict[str, Any]:
    """Return memory, kernels and collectives of a compiled step."""
    memory, text = programs.memory_analysis(), programs.as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    calls = re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text)
    reduced = [
        math.prod(int(size) for size in shape.split(",") if size)
        for result, kind in calls
        if kind == "all-reduce"
        for shape in re.findall(r"\[([\d,]*)\]", result)
    ]
    return {
        "peak_gib": memory.peak_memory_in_bytes / 2**30,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "kernels": sorted(set(re.findall(r"splash_mha_\w+", text))),
        "kernel_calls": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": dict(collections.Counter(kind for _, kind in calls)),
        "largest_all_reduce": max(reduced, default=0),  # numbers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = "--aot" in sys.argv or jax.devices()[0].platform == "cpu"
    parser.add_argument("--batch", type=int, default=2 if on_cpu else 8)
    parser.add_argument("--length", type=int, help="tokens per sequence (default: 512 on a CPU, else 2,048)")
    parser.add_argument("--heads", type=int, default=8 if on_cpu else 32)
    parser.add_argument("--kv-heads", type=int, default=2 if on_cpu else 8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=0, help="0 is none")
    parser.add_argument("--left-padding", type=int, default=0, help="of the last row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--aot", metavar="TOPOLOGY", help="such as v5e:4x4")
    parser.add_argument("--backends", nargs="+", choices=["xla", "splash"], default=["splash", "xla"])
    parser.add_argument("--tensor", type=int, default=1, help="devices of the tensor axis; the rest are fsdp")
    parser.add_argument("--sequences", type=int, default=2, help="a device of the fsdp axis")
    parser.add_argument("--chunk", type=int, default=512, help="training.logprob_chunk, tokens of each device")
    options = parser.parse_args()
    if options.length is None:
        options.length = 512 if on_cpu and not options.aot else 2048
    if not options.aot:
        measure(options)
        return
    for backend in options.backends:
        start = time.perf_counter()
        programs = compile_step(options.aot, backend=backend, options=options)
        report(
            "attention_aot",
            topology=options.aot,
            backend=backend,
            length=options.length,
            sequences=options.sequences,
            tensor=options.tensor,
            compile_seconds=time.perf_counter() - start,
            **describe(programs),
        )


if __name__ == "__main__":
    main()
