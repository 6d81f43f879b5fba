"""Memory and traffic of a training step at Mistral's 7B shape, by the compiler: nothing is run, no accelerator needed.

    python benchmarks/memory.py CARD.txtpb [adamw adamw_bf16 adafactor_bf16 lora ...] [--devices 8]
    python benchmarks/memory.py v5e:4x4 adamw --pairs 16 --layers 2 [--slices 2 --data 2 --parts 4]

CARD.txtpb is XLA's description of a card (xla/backends/gpu/target_config/specs/h200.txtpb and its neighbours), and
wants jax 0.12 on Python 3.12 or newer with `jax-cuda13-plugin[with-cuda]` and `jax-cuda13-pjrt`. v5e:4x4 is a slice of
TPUs, and wants libtpu. --pairs pairs of 2 texts of --length tokens (a quarter of them prompt), remat full, kernels for
attention, all devices that are not --data or --tensor along fsdp. One JSON line each: GiB of a device, and
of what it sends, by kind: [runs, GiB, largest], with loops' trip counts multiplied.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# What libtpu asks of its surroundings; without these it looks for the machine's own TPU for minutes.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.config import LossSection, MeshSection, OptimizerSection
from dno_jax.logprobs import head_token_logprobs, token_logprobs
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder
from dno_jax.model.params import abstract_adapters, computing_params, param_axes
from dno_jax.parallel.attention import make_attention
from dno_jax.parallel.mesh import AXES, make_mesh
from dno_jax.parallel.sharding import TRAIN, Constrain
from dno_jax.plan.hlo import Call, calls
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


# The output head alone, 8 x 4,096 tokens of 4,096 numbers and 128,256 words, bfloat16: in slices of --chunk, and whole.
HEADS = ("head", "head_whole")


def compiled_head(name: str, mesh: Any, options: argparse.Namespace) -> Any:
    place = NamedSharding(mesh, PartitionSpec())

    def held(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def total(hidden: jax.Array, head: jax.Array, token: jax.Array) -> jax.Array:
        if name == "head":
            return jnp.sum(head_token_logprobs(hidden, head, token, chunk=options.chunk))
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        return jnp.sum(token_logprobs(logits, token))

    arguments = held(8, 4096, 4096), held(4096, 128256), held(8, 4096, dtype=jnp.int32)
    return jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments).compile()


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
    )


def compiled(name: str, mesh: Any, options: argparse.Namespace) -> Any:
    model_config = replace(MODEL, num_hidden_layers=options.layers, windows=MODEL.windows[: options.layers])
    held, fields = STATES[name]
    whole = param_shardings(model_config, mesh, TRAIN)
    adapter = AdapterConfig.of(model_config, rank=64, alpha=64.0) if held == "adapter" else None
    axes, frozen = None, None
    if adapter is None:
        params, places, axes = computing_params(model_config, jnp.dtype(held)), whole, param_axes(model_config)
    else:
        params, places = abstract_adapters(model_config, adapter), adapter_shardings(model_config, adapter, mesh, TRAIN)
        frozen = placed(computing_params(model_config, jnp.bfloat16), whole)
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
    backend = "splash" if mesh.devices.flat[0].platform == "tpu" else "cudnn"
    model = Decoder(
        model_config, dtype=jnp.bfloat16, remat="full", constrain=Constrain(mesh, TRAIN), adapter=adapter,
        attention=make_attention(backend, mesh=mesh, layout=TRAIN, windows=model_config.windows),
    )  # fmt: skip
    step = StepConfig(
        model,
        optimizer,
        preference_loss(LossSection(beta=0.1)),
        chunk=options.chunk,
        places=tuple(jax.tree.leaves(shardings)),
    )
    rate, key = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    lowered = train_step.lower(placed(state, shardings), batch, rate, config=step, frozen=frozen, rounding=key)
    return lowered.compile()


def summed(calls: list[Call]) -> dict[str, Any]:
    """Return [runs, GiB, largest] by kind."""
    found = {}
    for kind in sorted({call.kind for call in calls}):
        own = [call for call in calls if call.kind == kind]
        size = sum(call.runs * call.bytes for call in own) / 2**30
        found[kind] = [sum(call.runs for call in own), round(size, 3), max(own, key=lambda call: call.bytes).shape]
    return found


def figures(program: Any, mesh: Any) -> dict[str, Any]:
    memory = program.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    found: dict[str, Any] = {name: round(size / 2**30, 2) for name, size in sizes.items()}
    if mesh.size > 1:
        text = program.as_text()
        sent = calls(text)
        found["sent"] = summed(sent)
        if mesh.shape["data"] > 1:
            over = [call for call in sent if call.crosses(mesh.devices.shape, AXES.index("data"))]
            found["over_data"] = summed(over)
            found["over_data_in_loops"] = summed([call for call in over if call.looped])
        if "tpu_custom_call" in text:
            found["kernels"] = sorted(set(re.findall(r"splash_mha_\w+", text)))
            found["kernel_calls"] = text.count('custom_call_target="tpu_custom_call"')
    return found


def devices_of(options: argparse.Namespace) -> list[Any]:
    if not Path(options.target).exists():
        own = {"num_slices": options.slices} if options.slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=options.target, **own).devices)
    card = Path(options.target).read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=card, topology=f"{options.slices}x1x{options.devices}"
    )
    return list(topology.devices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a card's description, or a slice of TPUs such as v5e:4x4")
    parser.add_argument("states", nargs="*", help=", ".join([*STATES, *HEADS]))
    parser.add_argument("--devices", type=int, default=1, help="cards of a host")
    parser.add_argument("--slices", type=int, default=1, help="slices of TPUs, or hosts of cards")
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=512, help="training.logprob_chunk")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches")
    parser.add_argument("--hlo", type=Path, help="a folder for the programs' texts")
    options = parser.parse_args()
    devices = devices_of(options)
    mesh = make_mesh(MeshSection(data=options.data, fsdp=-1, tensor=options.tensor), devices)
    chosen = ("pairs", "length", "layers", "chunk", "parts", "slices")
    for name in options.states or STATES:
        start = time.process_time()
        program = (compiled_head if name in HEADS else compiled)(name, mesh, options)
        seconds = round(time.process_time() - start, 1)
        if options.hlo is not None:
            (options.hlo / f"{name}.txt").write_text(program.as_text())
        line = {
            "bench": "memory",
            "devices": f"{devices[0].device_kind} x {len(devices)}",
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
            "state": name,
            **{field: getattr(options, field) for field in chosen},
            **figures(program, mesh),
            "compile_cpu_seconds": seconds,
            "jax": jax.__version__,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
