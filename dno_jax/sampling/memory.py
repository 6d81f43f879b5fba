"""What decoding holds in the memory of one device, and for how many slots that leaves room; arithmetic alone."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dno_jax.errors import DnoError
from dno_jax.model.cache import cache_axes, init_cache
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import abstract_params, param_axes
from dno_jax.parallel.sharding import DECODE, AnyMesh, Axes, num_row_shards, resolve, weight_shardings

# Slots where none are configured. On a CPU more rows than this fall out of the processor's cache; elsewhere the weights
# that a step reads are long paid for by then.
CPU_SLOTS, ACCELERATOR_SLOTS = 64, 256
# Of the capacity, for what is not counted here: activations of a prefill, compiled programs, gaps between arrays.
RESERVE = 0.1
# Prompts that go through the model together: few, so that a short queue wastes none.
FILL_ROWS = 4
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
    """Rows that decode together on one row shard of a mesh; all bytes are those of one device.

    Attributes:
        slots: rows decoded at once.
        chosen_by: what decided on their number: "sampling.slots", "memory", "responses to draw" or "the default".
        num_samples: K, slots that start from one queue entry.
        prompt_length, total_length: columns of an entry's cache and of a slot's, tokens.
        kv_dtype: of keys and values.
        slot_bytes: cache of one slot, of every policy.
        entry_bytes: one prefilled prompt: cache and last hidden state of every policy.
        output_bytes: the K responses of one prompt.
        weight_bytes: of one policy.
        num_policies: 2 for a mixture.
        logits_bytes: logits of one slot and what drawing a token from them needs.
    """

    slots: int
    chosen_by: str
    num_samples: int
    prompt_length: int
    total_length: int
    kv_dtype: str
    slot_bytes: int
    entry_bytes: int
    output_bytes: int
    weight_bytes: int
    num_policies: int
    logits_bytes: int
    capacity: Capacity

    @property
    def queue_entries(self) -> int:
        return queue_length(self.slots, num_samples=self.num_samples)

    @property
    def fill_rows(self) -> int:
        """Prompts that are prefilled by one call."""
        return min(FILL_ROWS, self.queue_entries)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they hold."""
        return {
            "weights": self.num_policies * self.weight_bytes,
            "slots": self.slots * self.slot_bytes,
            "queue": self.queue_entries * self.entry_bytes,
            # Every slot may draw for a prompt of its own. Twice: the host reads one while the other is written.
            "responses": 2 * (self.slots + self.queue_entries) * self.output_bytes,
            "logits": self.slots * self.logits_bytes,
        }

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def most_slots(self) -> int:
        """The largest number of slots that fits, whatever `slots` is; 0 where not even one does."""
        bound = max(self.capacity.usable, 0) // self.slot_bytes
        fitting = range(1, bound + 1)
        return bisect_right(fitting, self.capacity.usable, key=lambda slots: replace(self, slots=slots).total)


def plan_slots(
    config: ModelConfig,
    *,
    mesh: AnyMesh,
    capacity: Capacity,
    dtype: str,
    kv_dtype: str,
    num_samples: int,
    num_prompts: int,
    prompt_length: int,
    max_new_tokens: int,
    total_length: int | None = None,
    num_policies: int = 1,
    slots: int | None = None,
    platform: str | None = None,
    drawn_logprobs: bool = False,
) -> SlotPlan:
    """Return how many rows decode together on each row shard, and what they take.

    Args:
        mesh: the rows are one row shard's; its tensor axis divides weights and key heads.
        capacity: of the smallest device. Where it is the host's free memory, ask before weights are loaded.
        dtype: of activations and of the weights as decoding holds them.
        kv_dtype: of keys and values; "auto" is `dtype`.
        num_samples: K.
        num_prompts: over all row shards; no more slots are taken than they have responses.
        prompt_length, max_new_tokens, total_length: most tokens of a prompt, a response, and both (None: their sum).
        num_policies: 2 for a mixture.
        slots: the configured number; None takes the largest that fits and is of use.
        platform: of the devices; decides on CPU_SLOTS or ACCELERATOR_SLOTS.
        drawn_logprobs: responses carry a second log-probability a token.

    Raises:
        DnoError: the configured slots do not fit, or not even one does.
    """
    kv_dtype = dtype if kv_dtype == "auto" else kv_dtype
    whole = prompt_length + max_new_tokens
    total_length = whole if total_length is None else min(total_length, whole)
    hidden = config.hidden_size * jnp.dtype(dtype).itemsize
    response = max_new_tokens * (3 if drawn_logprobs else 2) * 4  # int32 ids, float32 log-probabilities
    plan = SlotPlan(
        slots=1,
        chosen_by="sampling.slots",
        num_samples=num_samples,
        prompt_length=prompt_length,
        total_length=total_length,
        kv_dtype=kv_dtype,
        slot_bytes=num_policies * cache_bytes(config, mesh=mesh, length=total_length, kv_dtype=kv_dtype),
        entry_bytes=num_policies * (cache_bytes(config, mesh=mesh, length=prompt_length, kv_dtype=kv_dtype) + hidden),
        output_bytes=num_samples * response,
        weight_bytes=weight_bytes(config, mesh=mesh, dtype=dtype),
        num_policies=num_policies,
        logits_bytes=LOGITS_COPIES * config.vocab_size * 4,  # the whole vocabulary, on every device of a tensor group
        capacity=capacity,
    )
    if slots is None:
        limits = {
            "memory": plan.most_slots,
            "responses to draw": num_samples * math.ceil(num_prompts / num_row_shards(mesh)),
            "the default": CPU_SLOTS if platform == "cpu" else ACCELERATOR_SLOTS,
        }
        reason = min(limits, key=lambda name: limits[name])
        # One slot, where none fits, is what the message below speaks of.
        plan = replace(plan, slots=max(limits[reason], 1), chosen_by=reason)
    else:
        plan = replace(plan, slots=slots)
    if plan.total > capacity.usable:
        raise DnoError(_refusal(plan, configured=slots))
    return plan


def _refusal(plan: SlotPlan, *, configured: int | None) -> str:
    most, parts = plan.most_slots, {name: show_bytes(count) for name, count in plan.parts.items()}
    policies = "a policy" if plan.num_policies == 1 else f"{plan.num_policies} policies"
    rows = f"{plan.slots} slot{'' if plan.slots == 1 else 's'} of {plan.total_length} tokens on each row shard"
    wanted = "not even one sampling slot fits:" if configured is None else f"sampling.slots is {configured}, but"
    would = "" if configured is None else f"{most} would fit: " if most else "not even one would fit: "
    fewer = f"set sampling.slots to at most {most}, or " if most else ""
    return (
        f"{wanted} {rows} would take {show_bytes(plan.total)} of every device (weights of {policies} "
        f"{parts['weights']}, slots {parts['slots']}, queue of {plan.queue_entries} prompts {parts['queue']}, "
        f"responses {parts['responses']}, logits {parts['logits']}), and {show_bytes(plan.capacity.usable)} are to be "
        f"had: {show_bytes(plan.capacity.bytes)} "
        f"({plan.capacity.source}) less a reserve of {show_bytes(plan.capacity.reserve)}; {would}{fewer}lower the "
        "longest prompt or response (prompts.max_length, sampling.max_new_tokens; of a judge, "
        "annotation.self_judge's), choose a smaller sampling.kv_dtype or a larger mesh.tensor, or take devices with "
        "more memory"
    )


def queue_length(slots: int, *, num_samples: int) -> int:
    """Return the prompts that a shard of `slots` rows holds prefilled.

    An entry is free again when the last of its K samples has started. The host fills the queue up between two calls,
    knowing what the one before had left: twice what refills every slot, and a call's prompts more, last that long
    where responses are not much shorter than a call.
    """
    return 2 * math.ceil(slots / num_samples) + FILL_ROWS


def weight_bytes(config: ModelConfig, *, mesh: AnyMesh, dtype: str) -> int:
    """Return the bytes that one policy takes on one device, in the DECODE layout and in the compute dtype."""
    shapes = abstract_params(config)
    shardings = weight_shardings(mesh, DECODE, axes=param_axes(config), shapes=shapes)
    local = jax.tree.map(lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)), shapes, shardings)
    return sum(jax.tree.leaves(local)) * jnp.dtype(dtype).itemsize


def cache_bytes(config: ModelConfig, *, mesh: AnyMesh, length: int, kv_dtype: str) -> int:
    """Return the bytes that one row of `length` columns takes in the cache of one device."""
    rows = num_row_shards(mesh)  # one for each, so that a device's part is one row

    def empty() -> Any:
        return init_cache(config, batch_size=rows, num_slots=length, dtype=jnp.dtype(kv_dtype))

    cache = jax.eval_shape(empty)
    names = jax.tree.leaves(cache_axes(cache), is_leaf=lambda axes: isinstance(axes, tuple))
    leaves = jax.tree.leaves(cache)
    return sum(_local_bytes(leaf, axes, mesh=mesh) for leaf, axes in zip(leaves, names, strict=True))


def _local_bytes(leaf: Any, axes: Axes, *, mesh: AnyMesh) -> int:
    sharding = resolve(mesh, DECODE.activation_spec(axes), shape=tuple(leaf.shape), name="the KV cache")
    return math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize


def show_bytes(count: int) -> str:
    """Return a number of bytes for a person, such as "1.50 GiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(count) >= 1024**power:
            return f"{count / 1024**power:.2f} {unit}"
    return f"{count} B"


@dataclass(frozen=True)
class Compared:
    """Bytes of one device by this plan and by the compiler."""

    planned: int
    compiled: int


def compare_with_compiler(plan: SlotPlan, stats: Any) -> dict[str, Compared]:
    """Put a plan beside the memory analysis of a compiled decode program.

    Args:
        stats: `jax.jit(...).lower(...).compile().memory_analysis()`, of a program whose arguments are weights, slots
            and queue; its sizes are those of one device.

    Returns:
        "held": the arguments. "temporaries": what the program allocates; the plan counts logits, and leaves the rest
        to the reserve. "copied": results that are not donated arguments; the plan has none, as a cache is donated.
    """
    parts = plan.parts
    return {
        "held": Compared(plan.total - parts["logits"], stats.argument_size_in_bytes),
        "temporaries": Compared(parts["logits"], stats.temp_size_in_bytes),
        "copied": Compared(0, stats.output_size_in_bytes - stats.alias_size_in_bytes),
    }
