"""What a layer's mixer costs, by the compiler: attention, a gated delta rule, a short convolution. Nothing is run.

    python benchmarks/mixers.py v5e:2x2 [--model qwen3.5-9b] [--length 2048 --rows 4 --slots 4096 --decode-rows 64]

The topology is any that `dno plan --topology` compiles for; programs are for one device of it, in bfloat16 over
float32 parameters. Of each mixer of the model: the layer's forward and backward pass (its MLP left out) over rows of
`length` tokens, and the step that decodes one token of each of `decode-rows` texts with a cache of `slots` columns.
One JSON line each: GFLOPs and GB read and written by XLA's own count (a loop's body counts once, and kernels that it
does not see into not at all), MiB of temporaries.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dno_jax.model.attention import CudnnAttention, SplashAttention, xla_attention
from dno_jax.model.cache import init_cache, write_layer
from dno_jax.model.config import ModelConfig
from dno_jax.model.hf.config_json import parse_config
from dno_jax.model.mixers import MIXERS, Call
from dno_jax.model.parts import identity
from dno_jax.model.places import NO_WINDOW, as_places
from dno_jax.model.rope import rope_angles
from dno_jax.plan.shape import shapes
from dno_jax.plan.topology import target_of


class OneMixer(nn.Module):
    """A layer that is nothing but its mixer."""

    config: ModelConfig
    mixer: Any
    attention: Any
    dtype: Any = jnp.bfloat16
    constrain: Any = identity
    write: Any = write_layer
    adapter: Any = None

    @nn.compact
    def __call__(self, x: Any, position: Any, cache: Any = None) -> Any:
        cos, sin = rope_angles(self.config, position)
        reach = None if cache is None else jnp.int32(8)
        call = Call(places=as_places(position), window=NO_WINDOW, angles=(cos[0], sin[0]), reach=reach)
        return MIXERS[self.mixer](self, x, cache, call)


def figures(function: Any, *arguments: Any, place: NamedSharding) -> dict[str, float]:
    def placed(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    start = time.perf_counter()
    lowered = jax.jit(function, out_shardings=place).lower(*jax.tree.map(placed, arguments))
    compiled = lowered.compile()
    cost: Any = compiled.cost_analysis() or {}  # CUDA's compiler counts nothing where there is no card
    cost = cost[0] if isinstance(cost, list) else cost
    memory: Any = compiled.memory_analysis()
    return {
        "gflops": cost.get("flops", 0) / 1e9,
        "gbytes": cost.get("bytes accessed", 0) / 1e9,
        "temporaries_mib": memory.temp_size_in_bytes / 2**20,
        "compile_s": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology")
    parser.add_argument("--model", default="qwen3.5-9b")
    for name, default in (("length", 2048), ("rows", 4), ("slots", 4096), ("decode-rows", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    target = target_of(options.topology, num_devices=None, memory=None)
    if not target.devices:
        raise SystemExit(target.note)
    place = NamedSharding(Mesh(np.array(target.devices[:1]), ("one",)), PartitionSpec())
    config = parse_config(shapes()[options.model], place=options.model)
    kernels = {"tpu": SplashAttention(), "gpu": CudnnAttention(), "cuda": CudnnAttention()}
    kernel = kernels.get(str(target.platform), xla_attention)
    if isinstance(kernel, CudnnAttention) and config.head_dim > 128:
        kernel = xla_attention  # cuDNN has none for heads so wide
    for mixer in sorted(set(config.layer_mixers)):
        for attention in dict.fromkeys((xla_attention, kernel)) if mixer == "attention" else (xla_attention,):
            layer = OneMixer(config, mixer, attention)
            x = jax.ShapeDtypeStruct((options.rows, options.length, config.hidden_size), jnp.bfloat16)
            position = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)
            params = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x, position))["params"]

            def loss(params: Any, x: Any, position: Any, layer: Any = layer) -> Any:
                y = layer.apply({"params": params}, x, position)[0]
                return jnp.sum(jnp.square(y.astype(jnp.float32)))

            def decode(params: Any, x: Any, position: Any, cache: Any, layer: Any = layer) -> Any:
                return layer.apply({"params": params}, x, position, cache)

            name = mixer if attention is xla_attention else f"{mixer} ({type(attention).__name__})"
            line = {"bench": "mixers", "mixer": name, "model": options.model, "topology": options.topology}
            found = figures(jax.grad(loss, argnums=(0, 1)), params, x, position, place=place)
            print(json.dumps({**line, "program": "train", **found}), flush=True)
            if attention is not xla_attention:
                continue
            rows, index = options.decode_rows, config.layer_mixers.index(mixer)
            for slots in (options.slots // 4, options.slots):
                make = partial(init_cache, config, batch_size=rows, num_slots=slots, dtype=jnp.bfloat16)
                cache = jax.eval_shape(make)[index]
                one = jax.ShapeDtypeStruct((rows, 1, config.hidden_size), jnp.bfloat16)
                held = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
                step = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
                found = figures(decode, held, one, step, cache, place=place)
                print(json.dumps({**line, "program": f"decode, {slots} slots", **found}), flush=True)


if __name__ == "__main__":
    main()
