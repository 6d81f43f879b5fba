"""What training holds in the memory of one device, by arithmetic alone; and what to change where it does not fit.

It is a floor: what is counted lies there together, and the compiler finds some temporaries more. So a run that is
refused for it could not have trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dno_jax.config import SftConfig, parse_config
from dno_jax.config.loading import lay_over
from dno_jax.errors import DnoError
from dno_jax.model.delta_rule import CHUNK
from dno_jax.model.sizes import mixer_width
from dno_jax.parallel.sharding import num_row_shards
from dno_jax.runtime.arguments import largest, local_bytes, longest_texts, train_call, train_plan
from dno_jax.runtime.programs import ConfigT, Programs
from dno_jax.sampling.memory import Capacity, show_bytes
from dno_jax.training.packing import BatchShape

_SMALLEST_CHUNK = 64  # tokens per slice of the output head


@dataclass(frozen=True)
class TrainingMemory:
    """
    Attributes:
        shape: of the largest batch.
        parts: bytes of one device by what they hold.
    """

    shape: BatchShape
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def training_memory(programs: Programs[ConfigT], *, num_rows: int | None = None) -> TrainingMemory:
    """Return what a training takes whose texts are as long as they may be.

    Args:
        num_rows: of the training; None: one batch.
    """
    rows = num_rows or programs.config.training.batch_size
    shape = largest(train_plan(programs, longest_texts(programs, num_rows=rows)))
    call = train_call(programs, shape)
    state = call.arguments[0]
    gradients = local_bytes(state.params)
    if shape.parts > 1:  # added up in float32, beside those of a micro-batch
        gradients += sum(local_bytes(_float32(leaf)) for leaf in jax.tree.leaves(state.params))
    held = {name: size for name, size in call.parts.items() if name != "batch"}
    return TrainingMemory(shape, {**held, "gradients": gradients, "activations": _activations(programs, shape)})


def _float32(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)


def _activations(programs: Programs[ConfigT], shape: BatchShape) -> int:
    """Bytes that the backward pass reads of the forward pass, of a micro-batch on one device; and the head's slice."""
    config, model, mesh = programs.config, programs.model_config, programs.mesh
    tokens = math.ceil(shape.rows / num_row_shards(mesh)) * shape.length
    width, tensor = jnp.dtype(config.model.dtype).itemsize, mesh.shape["tensor"]
    experts = max(model.num_experts_per_tok, 1)
    widths = [mixer_width(model, mixer) // tensor for mixer in model.layer_mixers]
    mlp = 3 * model.intermediate_size * experts // tensor
    depth, remat = model.num_hidden_layers, config.model.remat
    kept = {
        "full": 0,
        "dots": sum(widths) + depth * (2 * mlp // 3 + model.hidden_size),
        "none": sum(widths) + depth * (mlp + 4 * model.hidden_size),
    }[remat]
    layers = tokens * (depth * model.hidden_size + kept) * width
    # One layer is computed again for its own backward pass.
    once = 0 if remat == "none" else tokens * (max(widths) + mlp) * width
    if "gated_delta" in model.layer_mixers:  # its states between chunks, which `remat: none` keeps of every layer
        state = 4 * model.linear_num_value_heads * model.linear_value_head_dim * model.linear_key_head_dim // tensor
        once += -(-tokens // CHUNK) * state * (model.layer_mixers.count("gated_delta") if remat == "none" else 1)
    logits = model.vocab_size // tensor if model.head == "logits" else 0
    head = 2 * min(config.training.logprob_chunk, tokens) * logits * 4
    return layers + max(once, head)


def refuse_training(
    programs: Programs[ConfigT], capacity: Capacity | None, *, num_rows: int | None = None
) -> TrainingMemory:
    """Return what training takes, if a device has so much memory.

    Args:
        capacity: None where nobody says.

    Raises:
        DnoError: it has not; the message says what takes how much, and the smallest change that fits.
    """
    found = training_memory(programs, num_rows=num_rows)
    if capacity is not None and found.total > capacity.bytes:
        raise DnoError(refusal(programs, found, capacity, num_rows=num_rows))
    return found


def refusal(
    programs: Programs[ConfigT], found: TrainingMemory, capacity: Capacity, *, num_rows: int | None = None
) -> str:
    parts = ", ".join(f"{name} {show_bytes(size)}" for name, size in found.parts.items())
    change = smallest_change(programs, room=capacity.usable, num_rows=num_rows)
    way = (
        "no change of micro batch, remat, moments, optimiser or adapters fits"
        if change is None
        else f"the smallest change that fits: {' '.join(change)}"
    )
    devices = programs.mesh.size
    return (
        f"training does not fit: a step takes at least {show_bytes(found.total)} of each of {devices:,} "
        f"device{'' if devices == 1 else 's'} ({parts}), and one has {show_bytes(capacity.bytes)} ({capacity.source}); "
        f"{way}. More devices with a larger mesh.fsdp, or devices with more memory, help too"
    )


def smallest_change(
    programs: Programs[ConfigT], *, room: int, scale: float = 1.0, num_rows: int | None = None
) -> list[str] | None:
    """Return the first overrides that bring training under `room` bytes of a device; None where none do.

    One is tried after the other in their order, alone; then each together with all before it that changed something.

    Args:
        scale: what the compiler takes for each byte that is counted here.
    """

    def fits(overrides: list[str]) -> bool:
        try:
            changed = replace(programs, config=overridden(programs.config, overrides))
            return training_memory(changed, num_rows=num_rows).total * scale <= room
        except (DnoError, ValueError):
            return False

    steps = [list(step) for step in changes(programs)]
    alone = next((way for step in steps for way in step if fits(way)), None)
    if alone is not None:
        return alone
    together: list[str] = []
    for step in steps[:-1]:
        if step:
            kept = [one for one in together if not (step[-1][0].startswith("optimizer.name") and "moment_dtype" in one)]
            together = [*kept, *step[-1]]
            if fits(together):
                return together
    rest = [one for one in together if not one.startswith("optimizer.")]
    return next((way for last in steps[-1] if fits(way := [*rest, *last])), None)


def changes(programs: Programs[ConfigT]) -> Iterator[list[list[str]]]:
    """What takes less, in the order in which it is worth trying: of each kind, every value, the nearest first."""
    config = programs.config
    section, texts = config.training, 1 if isinstance(config, SftConfig) else 2
    size = section.micro_batch_size or section.batch_size
    shards = 1 if programs.packing.packed else num_row_shards(programs.mesh)
    smaller = [n for n in range(size - 1, 0, -1) if section.batch_size % n == 0 and n * texts % shards == 0]
    yield [[f"training.micro_batch_size={n}"] for n in smaller]
    yield [] if config.model.remat == "full" else [["model.remat=full"]]
    chunk = section.logprob_chunk
    yield [[f"training.logprob_chunk={_SMALLEST_CHUNK}"]] if chunk > _SMALLEST_CHUNK else []
    moments = config.optimizer.name != "adafactor" and config.adapter is None
    yield [["optimizer.moment_dtype=bfloat16"]] if moments and config.optimizer.moment_dtype == "float32" else []
    yield [["optimizer.name=adafactor"]] if moments and config.optimizer.moment_dtype == "float32" else []
    adapters = config.adapter is None and "adapter" in type(config).model_fields
    yield [["adapter.rank=64", "adapter.alpha=64", "training.param_dtype=float32"]] if adapters else []


def overridden(config: ConfigT, overrides: list[str]) -> ConfigT:
    """Return a configuration with fields set, as on the command line."""
    tree: Any = config.model_dump(mode="json", exclude_unset=True)
    kind: Any = type(config)
    for override in overrides:
        lay_over(tree, override, kind=kind)
    return parse_config(kind, tree, place="a change to the configuration")
