"""What decoding holds in the memory of one device, and how many slots fit; arithmetic alone."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from dno_jax.errors import DnoError
from dno_jax.model.cache import KVCache, LayerCache
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import computing_params, param_axes
from dno_jax.model.sizes import mixer_width
from dno_jax.parallel.sharding import DECODE, AnyMesh, num_row_shards, weight_shardings
from dno_jax.sampling.state import CompiledPrograms, State, abstract_start, prompt_bucket

# Slots where none are configured. On a CPU more rows than this fall out of the processor's cache; elsewhere the weights
# that a step reads are long paid for by then.
CPU_SLOTS, ACCELERATOR_SLOTS = 64, 256
# Of the capacity, for what is not counted here: compiled programs, small temporaries, gaps between arrays.
RESERVE = 0.1
# Arrays of [slots, V] float32 that drawing a token needs at once: the compiler's memory analysis says 3 to 5, by the
# truncation and with a second policy.
LOGITS_COPIES = 5


@dataclass(frozen=True)
class Capacity:
    """Memory of one device.

    Attributes:
        bytes: of the whole device, or of its share of the host's memory.
        source: where that number comes from.
    """

    bytes: int
    source: str

    @property
    def reserve(self) -> int:
        return int(self.bytes * RESERVE)

    @property
    def usable(self) -> int:
        return self.bytes - self.reserve


@dataclass(frozen=True)
class SlotPlan:
    """Rows that decode together on one row shard of a mesh, and the bytes of it all on one device.

    Attributes:
        program: what decodes; `programs.shape` is as planned.
        num_policies: 2 for a mixture.
        weight_bytes: of one policy.
        capacity: of the device.
        chosen_by: what decided on the slots: "sampling.slots", "memory", "responses to draw" or "the default".
        beside: draws in turn with it, of as many slots each, whose states share the memory; the weights are the same.
    """

    programs: CompiledPrograms
    num_policies: int
    weight_bytes: int
    capacity: Capacity
    chosen_by: str = "sampling.slots"
    beside: tuple[SlotPlan, ...] = ()

    @property
    def slots(self) -> int:
        return self.programs.shape.slots

    @property
    def queue_entries(self) -> int:
        return self.programs.shape.entries

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes by what they hold, of all that is drawn in turn.

        "responses" are there twice: the host reads those of one call while the next call writes. "temporaries" are
        those of decoding or of a prefill, whichever are more: one program runs at a time.
        """
        every = [one._own_parts for one in (self, *self.beside)]
        once = ("weights", "temporaries")
        return {name: (max if name in once else sum)(parts[name] for parts in every) for name in self._own_parts}

    @cached_property
    def _own_parts(self) -> dict[str, int]:
        state, outputs = abstract_start(self.programs, policies=self.num_policies)
        return {
            "weights": self.num_policies * self.weight_bytes,
            "slots": _local_bytes(state.slots),
            "queue": _local_bytes(state.queue),
            "responses": 2 * _local_bytes(outputs),
            "temporaries": max(_decode_temporaries(self.programs, state), _fill_temporaries(self.programs, state)),
        }

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def loaded_policies(self) -> int:
        return max(one.num_policies for one in (self, *self.beside))

    @property
    def slot_bytes(self) -> int:
        """Of one slot: what layers keep of a text, and the last hidden state, of every policy, and a few counters."""
        return self._own_parts["slots"] // self.slots

    @property
    def entry_bytes(self) -> int:
        """Of one prefilled prompt: the same, as far as the prompt reaches."""
        return self._own_parts["queue"] // self.queue_entries

    @cached_property
    def most_slots(self) -> int:
        """The largest number of slots that fits, whatever the plan's is; 0 where not even one does."""
        fitting = range(1, max(self.capacity.usable, 0) // self.slot_bytes + 1)
        return bisect_right(fitting, self.capacity.usable, key=lambda slots: self.with_slots(slots).total)

    def with_slots(self, slots: int) -> SlotPlan:
        """Return the plan of another number of slots, with the queue that goes with it."""
        shape = self.programs.shape
        entries = queue_length(slots, num_samples=self.programs.sampling_params.num_samples, fill_rows=shape.fill_rows)
        programs = replace(self.programs, shape=replace(shape, slots=slots, entries=entries))
        return replace(self, programs=programs, beside=tuple(other.with_slots(slots) for other in self.beside))


def plan_slots(
    programs: CompiledPrograms,
    *,
    capacity: Capacity,
    num_prompts: int,
    slots: int | None = None,
    num_policies: int = 1,
    beside: Sequence[tuple[CompiledPrograms, int]] = (),
    platform: str | None = None,
) -> SlotPlan:
    """Return how many rows decode together on each row shard, and what they take.

    Args:
        program: all of `program.sizes` but slots and entries is kept; its mesh may be abstract.
        capacity: of the smallest device. Where it is the host's free memory, ask before weights are loaded.
        num_prompts: over all row shards; no more slots are taken unasked than they have responses.
        slots: the configured number; None takes the largest that fits and is of use.
        num_policies: 2 for a mixture.
        beside: the programs, and their policies, of draws whose states are there at the same time.
        platform: of the devices; decides on CPU_SLOTS or ACCELERATOR_SLOTS.

    Raises:
        DnoError: the configured slots do not fit, or not even one does.
    """
    model, mesh = programs.model, programs.mesh
    weights = weight_bytes(model.config, mesh=mesh, dtype=model.dtype)
    others = tuple(SlotPlan(other, policies, weights, capacity) for other, policies in beside)
    plan = SlotPlan(programs, num_policies, weights, capacity, beside=others).with_slots(slots or 1)
    if slots is None:
        samples = max(one.programs.sampling_params.num_samples for one in (plan, *others))
        limits = {
            "responses to draw": samples * math.ceil(num_prompts / num_row_shards(mesh)),
            "the default": CPU_SLOTS if platform == "cpu" else ACCELERATOR_SLOTS,
        }
        reason = min(limits, key=lambda name: limits[name])
        plan = replace(plan.with_slots(max(limits[reason], 1)), chosen_by=reason)
        if plan.total > capacity.usable:
            # One slot, where none fits, is what the message below speaks of.
            plan = replace(plan.with_slots(max(plan.most_slots, 1)), chosen_by="memory")
    if plan.total > capacity.usable:
        raise DnoError(_refusal(plan, configured=slots))
    return plan


def _decode_temporaries(programs: CompiledPrograms, state: State) -> int:
    """Logits of all slots, and one layer of their keys and values, or of its states.

    Products take a copy of what is read of a layer, in the model's dtype. A CPU's sums need none; it is counted all the
    same, a layer of many.
    """
    config, slots = programs.model.config, programs.shape.slots
    logits = LOGITS_COPIES * slots * config.vocab_size * 4  # the whole vocabulary, also where the head is split
    size = jnp.dtype(programs.model.dtype).itemsize

    def copied(layer: LayerCache) -> int:
        if isinstance(layer, KVCache):
            return int(size / layer.key.dtype.itemsize * _local_bytes((layer.key, layer.value)))
        return _local_bytes(layer)

    return logits + max(map(copied, state.slots.text.cache[0]))


def _fill_temporaries(programs: CompiledPrograms, state: State) -> int:
    """Caches that a prefill makes, and one layer's activations of a piece: a bound, what of them lives at once."""
    config, shape, tensor = programs.model.config, programs.shape, programs.mesh.shape["tensor"]
    # The longest prompt is padded to whole pieces.
    width = prompt_bucket(shape.prompt_length, max_length=shape.prompt_length, piece=shape.prefill_chunk)
    caches = shape.fill_rows * _local_bytes(state.queue.text.cache) // shape.entries * width // shape.prompt_length
    piece = min(shape.prefill_chunk, width)
    mlp = config.intermediate_size * max(config.num_experts_per_tok, 1) // tensor
    mixers = max(mixer_width(config, mixer) for mixer in config.layer_mixers) // tensor
    numbers = 3 * mlp + 4 * config.hidden_size + mixers
    scores = 2 * config.num_attention_heads // tensor * width * 4  # float32, before and after the softmax
    return caches + shape.fill_rows * piece * (numbers * jnp.dtype(programs.model.dtype).itemsize + scores)


def _refusal(plan: SlotPlan, *, configured: int | None) -> str:
    most, parts = plan.most_slots, {name: show_bytes(count) for name, count in plan.parts.items()}
    policies = "a policy" if plan.loaded_policies == 1 else f"{plan.loaded_policies} policies"
    length = plan.programs.num_slots
    rows = f"{plan.slots} slot{'' if plan.slots == 1 else 's'} of {length} tokens on each row shard"
    rows += f" for each of {1 + len(plan.beside)} draws" if plan.beside else ""
    wanted = "not even one sampling slot fits:" if configured is None else f"sampling.slots is {configured}, but"
    would = "" if configured is None else f"{most} would fit: " if most else "not even one would fit: "
    fewer = f"set sampling.slots to at most {most}, or " if most else ""
    return (
        f"{wanted} {rows} would take {show_bytes(plan.total)} of every device (weights of {policies} "
        f"{parts['weights']}, slots {parts['slots']}, queue of {plan.queue_entries} prompts {parts['queue']}, "
        f"responses {parts['responses']}, temporaries {parts['temporaries']}), and {show_bytes(plan.capacity.usable)} "
        f"are available: {show_bytes(plan.capacity.bytes)} ({plan.capacity.source}) less a reserve of "
        f"{show_bytes(plan.capacity.reserve)}; {would}{fewer}lower the longest prompt or response "
        "(prompts.max_length, sampling.max_new_tokens; of a judge, annotation.self_judge's), choose a smaller "
        "sampling.kv_dtype or a larger mesh.tensor, or take devices with "
        "more memory"
    )


def queue_length(slots: int, *, num_samples: int, fill_rows: int) -> int:
    """Return the prompts that wait prefilled for `slots` rows.

    An entry is free again when the last of its K samples has started. The host fills the queue up between two calls,
    knowing what the one before had left: twice what refills every slot, and a call's prompts more, last that long
    where responses are not much shorter than a call.
    """
    return 2 * math.ceil(slots / num_samples) + fill_rows


def weight_bytes(config: ModelConfig, *, mesh: AnyMesh, dtype: Any) -> int:
    """Return the bytes that one policy takes on one device, in the DECODE layout and computing in a dtype."""
    shapes = computing_params(config, dtype)
    shardings = weight_shardings(mesh, DECODE, axes=param_axes(config), shapes=shapes)

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return _local_bytes(jax.tree.map(placed, shapes, shardings))


def _local_bytes(tree: Any) -> int:
    """Bytes that abstract arrays with shardings take on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def show_bytes(count: int) -> str:
    """Return a number of bytes for a person, such as "1.50 GiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(count) >= 1024**power:
            return f"{count / 1024**power:.2f} {unit}"
    return f"{count} B"
