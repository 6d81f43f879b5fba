"""Memory of a training step at Mistral's 7B shape on one GPU, by the compiler: nothing is run, and no GPU is needed.

    python benchmarks/memory.py CARD.txtpb [adamw adamw_bf16 adafactor_bf16 lora ...]

CARD.txtpb is XLA's description of a card (xla/backends/gpu/target_config/specs/h200.txtpb and its neighbours). Wants
jax 0.12 on Python 3.12 or newer with `jax-cuda13-plugin[with-cuda]` and `jax-cuda13-pjrt`. 8 pairs of 2 x 2,048 tokens
(responses of 1,536), remat full, cuDNN's attention.
`--length` and `--pairs` choose others: up to which length a card carries the model. One JSON line each, GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from dno_jax.config import LossSection, MeshSection, OptimizerSection
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder
from dno_jax.model.params import abstract_adapters, computing_params, param_axes
from dno_jax.parallel.attention import make_attention
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN, Constrain
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.state import TrainState, adapter_shardings, param_shardings, state_shardings
from dno_jax.training.step import StepConfig, train_step

MODEL = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=32768,
    windows=(4096,) * 32,
)  # fmt: skip
# What is held in which dtype, and by which optimiser.
STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("float32", {}),
    "adamw_bf16": ("bfloat16", {}),
    "adamw_bf16_moments_bf16": ("bfloat16", {"moment_dtype": "bfloat16"}),
    "adafactor_bf16": ("bfloat16", {"name": "adafactor"}),
    "lora": ("adapter", {}),
}


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
    )


def measured(name: str, mesh: Any, options: argparse.Namespace) -> dict[str, Any]:
    held, fields = STATES[name]
    whole = param_shardings(MODEL, mesh, TRAIN)
    adapter = AdapterConfig.of(MODEL, rank=64, alpha=64.0) if held == "adapter" else None
    if adapter is None:
        params, places, axes, frozen = computing_params(MODEL, jnp.dtype(held)), whole, param_axes(MODEL), None
    else:
        params, places, axes = abstract_adapters(MODEL, adapter), adapter_shardings(MODEL, adapter, mesh, TRAIN), None
        frozen = placed(computing_params(MODEL, jnp.bfloat16), whole)
    optimizer = make_optimizer(OptimizerSection(**fields), axes)
    shardings = state_shardings(optimizer, places, params)
    state = jax.eval_shape(lambda held: TrainState(jnp.int32(0), held, optimizer.init(held)), params)
    ids = (1,) * (options.length // 4)
    row = TrainingRow((ids,) * 2, ((1,) * (options.length - len(ids)),) * 2)
    batch = make_batch([row] * options.pairs, batch_size=options.pairs, max_length=options.length, parts=options.parts)
    batch = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype, sharding=place),
        batch,
        batch.shardings(mesh),
    )
    model = Decoder(
        MODEL, dtype=jnp.bfloat16, remat="full", constrain=Constrain(mesh, TRAIN), adapter=adapter,
        attention=make_attention("cudnn", mesh=mesh, layout=TRAIN, windows=MODEL.windows),
    )  # fmt: skip
    step = StepConfig(
        model,
        optimizer,
        preference_loss(LossSection(beta=0.1)),
        chunk=options.chunk,
        places=tuple(jax.tree.leaves(shardings)),
    )
    rate, key = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    start = time.process_time()
    lowered = train_step.lower(placed(state, shardings), batch, rate, config=step, frozen=frozen, rounding=key)
    memory = lowered.compile().memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    return {name: round(size / 2**30, 2) for name, size in sizes.items()} | {
        "compile_cpu_seconds": round(time.process_time() - start, 1)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("card", type=Path)
    parser.add_argument("states", nargs="*", help=", ".join(STATES))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=512, help="training.logprob_chunk")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches")
    options = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=options.card.read_text(), topology="1x1x1"
    )
    mesh = make_mesh(MeshSection(data=1), list(topology.devices))
    for name in options.states or STATES:
        found = measured(name, mesh, options)
        print(
            json.dumps(
                {
                    "bench": "memory",
                    "card": topology.devices[0].device_kind,
                    "state": name,
                    "pairs": options.pairs,
                    "length": options.length,
                    "micro_batches": options.parts,
                    **found,
                    "jax": jax.__version__,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
