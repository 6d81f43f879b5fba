"""What decoding keeps on the device from call to call, and how rows move through it: queue, slots, outputs.

Each row shard of the mesh has slots and a queue of its own, so that nothing but what the model itself asks for crosses
devices. A response is written where its prompt's output rows are, not where its slot is: the host reads outputs and
never hears of slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dno_jax.model.cache import Cache, KVCache, MixerState, init_cache
from dno_jax.model.decoder import Decoder
from dno_jax.parallel.cache import cache_specs
from dno_jax.parallel.sharding import DECODE, ROW_AXES, AnyMesh, num_row_shards
from dno_jax.sampling.requests import SamplingParams


@dataclass(frozen=True)
class EngineShape:
    """How much is decoded at once; static. Counts are of one row shard of the mesh.

    Attributes:
        slots: responses that decode together.
        prompt_length: tokens of the longest prompt.
        entries: prompts that stand prefilled in the queue.
        fill_rows: prompts prefilled by one call.
        prefill_chunk: tokens of a prompt that go through the model at once.
        chunk_steps: tokens that a slot draws before the host looks.
        kv_dtype: of the cache; see model/cache.py.
    """

    slots: int
    prompt_length: int
    entries: int = 8
    fill_rows: int = 4
    prefill_chunk: int = 512
    chunk_steps: int = 32
    kv_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("slots", "prompt_length", "entries", "fill_rows", "prefill_chunk", "chunk_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.fill_rows > self.entries:
            raise ValueError(f"fill_rows is {self.fill_rows}; the queue holds only {self.entries} entries")

    @property
    def outputs(self) -> int:
        """Prompts whose responses have a place: as many as can be in slots and queue, so that none ever waits."""
        return self.slots + self.entries


def prompt_bucket(length: int, *, max_length: int, piece: int) -> int:
    """Return the padded length of a prompt: a power of two from 16, or the maximum; few lengths mean few programs.

    A prompt that goes through the model in pieces is padded to whole ones.
    """
    bucket = 16
    while bucket < length:
        bucket *= 2
    bucket = min(bucket, max_length)
    return bucket if bucket <= piece else -(-bucket // piece) * piece


@dataclass(frozen=True)
class CompiledPrograms:
    """Everything static of the two programs: equal ones are compiled once.

    Attributes:
        model: the decoder, its activations pinned to the mesh.
        shape: how much is decoded at once, on each row shard of the mesh.
        record_drawn: give also the log-probabilities under the distribution that was drawn from.
    """

    model: Decoder
    sampling_params: SamplingParams
    shape: EngineShape
    mesh: AnyMesh
    record_drawn: bool = False

    @property
    def num_slots(self) -> int:
        """Columns of a slot's cache."""
        whole = self.shape.prompt_length + self.sampling_params.max_new_tokens
        total = self.sampling_params.max_total_tokens
        return whole if total is None else min(whole, total)


@flax.struct.dataclass
class Mixture:
    """The second policy of a geometric mixture, token by token (Algorithm 4, Option II; Nash-MD's pi_t^tau):

    mixed(token | prefix) ∝ pi_t(token | prefix)^(1 - weight) * pi_ref(token | prefix)^weight, weight = tau / eta.

    Normalised at every token, hence not the mixture of whole responses that stands in Algorithm 3's loss.
    """

    params: Any  # the initial policy's parameters: the same decoder, in the same layout
    weight: Any  # scalar float32 in [0, 1], pi_ref's share; traced, so that a schedule compiles nothing anew


@flax.struct.dataclass
class Text:
    """Where rows stand in their texts: B slots, or E queue entries."""

    cache: tuple[Cache, ...]  # one per policy
    hidden: tuple[Any, ...]  # one [B, D] per policy: of the last token, which predicts the next
    length: Any  # [B] int32, tokens so far, hence the position of the next
    seen: Any  # [B, V] bool, which ids the text has; None without a repetition penalty


@flax.struct.dataclass
class Slots:
    text: Text
    key: Any  # [B, 2] uint32, made of the row's address
    output: Any  # [B] int32, the output row that is written; -1 in a free slot
    step: Any  # [B] int32, tokens drawn so far
    limit: Any  # [B] int32, tokens that may be drawn


@flax.struct.dataclass
class Queue:
    """A ring: prompt number i stands in entry i mod E and has output rows of its own."""

    text: Text
    key: Any  # [E, K, 2] uint32, of each sample
    output: Any  # [E] int32, first of the prompt's K output rows
    limit: Any  # [E] int32, tokens that may be drawn for each
    filled: Any  # [1] int32 per row shard, prompts that came
    started: Any  # [1] int32 per row shard, samples that were started


@flax.struct.dataclass
class Drawn:
    """One token per slot."""

    token: Any  # [B] int32
    logprob: Any  # [B] float32
    drawn_logprob: Any  # [B] float32, or None
    stopped: Any  # [B] bool, whether it is an end id
    ended: Any  # [B] bool, whether it is the response's last


@flax.struct.dataclass
class Outputs:
    """Row o * K + k is sample k of the prompt that has place o."""

    token: Any  # [O * K, N] int32
    logprob: Any  # [O * K, N] float32, log pi_t(token | prefix) at temperature 1
    drawn_logprob: Any  # [O * K, N] float32 under the sampling distribution, or None
    length: Any  # [O * K] int32, tokens so far, the end id included
    done: Any  # [O * K] bool
    stopped: Any  # [O * K] bool, whether an end id was drawn


@flax.struct.dataclass
class Counts:
    started: Any  # int32 per row shard, samples started, of all prompts that came
    busy: Any  # scalar int32, slot-steps of the call that drew a token
    steps: Any  # scalar int32, steps of the call


@flax.struct.dataclass
class State:
    """What a call hands to the next; given to a program, it is gone."""

    slots: Slots
    queue: Queue


@flax.struct.dataclass
class Prompts:
    """What is prefilled by one call, R rows per row shard, the real ones first in each shard."""

    token: Any  # [R, T] int32, right-padded
    length: Any  # [R] int32; 0 is a filler
    name: Any  # [R] uint32
    output: Any  # [R] int32, first output row of each, in its shard
    limit: Any  # [R] int32, tokens of its longest response


@partial(jax.jit, static_argnames=("programs", "policies"))
def start(programs: CompiledPrograms, *, policies: int) -> tuple[State, Outputs]:
    """Return empty slots, an empty queue and outputs, laid out on the mesh."""
    return laid_out(_empty(programs, policies), mesh=programs.mesh)


def abstract_start(programs: CompiledPrograms, *, policies: int) -> tuple[State, Outputs]:
    """Return what `start` returns as jax.ShapeDtypeStruct with shardings, without making arrays."""
    shapes = jax.eval_shape(partial(_empty, programs, policies))

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, shapes, _shardings(shapes, programs.mesh))


def _empty(programs: CompiledPrograms, policies: int) -> tuple[State, Outputs]:
    shape, sampling_params = programs.shape, programs.sampling_params
    config, dtype = programs.model.config, programs.model.dtype
    shards = num_row_shards(programs.mesh)

    def text(rows: int, num_slots: int) -> Text:
        cache = init_cache(config, batch_size=rows, num_slots=num_slots, dtype=jnp.dtype(shape.kv_dtype))
        penalised = sampling_params.truncation.repetition_penalty != 1.0
        return Text(
            cache=(cache,) * policies,
            hidden=(jnp.zeros((rows, config.hidden_size), dtype),) * policies,
            length=jnp.zeros(rows, jnp.int32),
            seen=jnp.zeros((rows, config.vocab_size), bool) if penalised else None,
        )

    slots, entries = shards * shape.slots, shards * shape.entries
    outputs, length = shards * shape.outputs * sampling_params.num_samples, sampling_params.max_new_tokens
    state = State(
        slots=Slots(
            text=text(slots, programs.num_slots),
            key=jnp.zeros((slots, 2), jnp.uint32),
            output=jnp.full(slots, -1, jnp.int32),
            step=jnp.zeros(slots, jnp.int32),
            limit=jnp.zeros(slots, jnp.int32),
        ),
        queue=Queue(
            text=text(entries, shape.prompt_length),
            key=jnp.zeros((entries, sampling_params.num_samples, 2), jnp.uint32),
            output=jnp.zeros(entries, jnp.int32),
            limit=jnp.zeros(entries, jnp.int32),
            filled=jnp.zeros(shards, jnp.int32),
            started=jnp.zeros(shards, jnp.int32),
        ),
    )
    return state, Outputs(
        token=jnp.zeros((outputs, length), jnp.int32),
        logprob=jnp.zeros((outputs, length), jnp.float32),
        drawn_logprob=jnp.zeros((outputs, length), jnp.float32) if programs.record_drawn else None,
        length=jnp.zeros(outputs, jnp.int32),
        done=jnp.zeros(outputs, bool),
        stopped=jnp.zeros(outputs, bool),
    )


def laid_out(tree: Any, *, mesh: AnyMesh) -> Any:
    """Pin a State or Outputs to the layout that `start` gives them."""
    return jax.lax.with_sharding_constraint(tree, _shardings(tree, mesh))


def _shardings(tree: Any, mesh: AnyMesh) -> Any:
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), _specs(tree), is_leaf=lambda spec: isinstance(spec, PartitionSpec)
    )


def _specs(tree: Any) -> Any:
    """Where everything of a struct lies: rows on the row axes, heads on the tensor axis."""

    def spec(leaf: Any) -> Any:
        if isinstance(leaf, KVCache | MixerState):
            return cache_specs(leaf, DECODE)
        return PartitionSpec(ROW_AXES) if leaf.ndim else PartitionSpec()

    return jax.tree.map(spec, tree, is_leaf=lambda leaf: isinstance(leaf, KVCache | MixerState))


def enqueue(queue: Queue, text: Text, prompts: Prompts, key: Array, *, mesh: AnyMesh) -> Queue:
    """Put prefilled prompts at the end of the queue.

    Args:
        text: of R rows per row shard.
        key: [R, K, 2] uint32, of each sample.
    """

    def local(queue: Queue, text: Text, prompts: Prompts, key: Array) -> Queue:
        def one(row: Array, queue: Queue) -> Queue:
            entry = queue.filled[0] % queue.output.shape[0]
            return replace(
                queue,
                text=_moved(queue.text, text, to=entry, row=row),
                key=queue.key.at[entry].set(key[row]),
                output=queue.output.at[entry].set(prompts.output[row]),
                limit=queue.limit.at[entry].set(prompts.limit[row]),
                filled=queue.filled + 1,
            )

        return jax.lax.fori_loop(0, jnp.sum(prompts.length > 0), one, queue)

    return _locally(local, mesh)(queue, text, prompts, key)


def refill(slots: Slots, started: Array, queue: Queue, *, mesh: AnyMesh) -> tuple[Slots, Array]:
    """Start samples in free slots until one of both runs out.

    Args:
        started: [1] int32 per row shard, samples that were started; the queue's own count is not read.
    """

    def local(slots: Slots, started: Array, queue: Queue) -> tuple[Slots, Array]:
        entries, samples, _ = queue.key.shape

        def one(_: Array, carry: tuple[Slots, Array]) -> tuple[Slots, Array]:
            slots, started = carry
            slot = jnp.argmax(slots.output < 0)
            prompt, sample = jnp.divmod(started[0], samples)
            entry = prompt % entries
            slots = Slots(
                text=_moved(slots.text, queue.text, to=slot, row=entry),
                key=slots.key.at[slot].set(queue.key[entry, sample]),
                output=slots.output.at[slot].set(queue.output[entry] + sample),
                step=slots.step.at[slot].set(0),
                limit=slots.limit.at[slot].set(queue.limit[entry]),
            )
            return slots, started + 1

        waiting = queue.filled[0] * samples - started[0]
        count = jnp.minimum(jnp.sum(slots.output < 0), waiting)
        return jax.lax.fori_loop(0, count, one, (slots, started))

    return _locally(local, mesh, results=2)(slots, started, queue)


def release(slots: Slots, cancelled: Array, *, mesh: AnyMesh) -> Slots:
    """Free the slots whose responses are cancelled, [O * K] bool."""

    def local(slots: Slots, cancelled: Array) -> Slots:
        stop = (slots.output >= 0) & cancelled[jnp.maximum(slots.output, 0)]
        return replace(slots, output=jnp.where(stop, -1, slots.output))

    return _locally(local, mesh)(slots, cancelled)


def write(outputs: Outputs, slots: Slots, drawn: Drawn, *, mesh: AnyMesh) -> Outputs:
    """Add the token that each slot drew to its response; free slots write nothing."""

    def local(outputs: Outputs, slots: Slots, drawn: Drawn) -> Outputs:
        # A row that does not exist drops what is written there.
        row = jnp.where(slots.output >= 0, slots.output, outputs.length.shape[0])

        def put(target: Any, value: Any, *column: Array) -> Any:
            return None if target is None else target.at[(row, *column)].set(value, mode="drop")

        return Outputs(
            token=put(outputs.token, drawn.token, slots.step),
            logprob=put(outputs.logprob, drawn.logprob, slots.step),
            drawn_logprob=put(outputs.drawn_logprob, drawn.drawn_logprob, slots.step),
            length=put(outputs.length, slots.step + 1),
            done=put(outputs.done, drawn.ended),
            stopped=put(outputs.stopped, drawn.stopped),
        )

    return _locally(local, mesh)(outputs, slots, drawn)


def _locally(function: Callable[..., Any], mesh: AnyMesh, *, results: int = 1) -> Callable[..., Any]:
    """Run a function on every row shard by itself; what it returns is like its first arguments, `results` of them."""

    def run(*trees: Any) -> Any:
        specs = tuple(map(_specs, trees))
        out = specs[0] if results == 1 else specs[:results]
        # Loops whose number of rounds is a shard's own cannot be checked for what they leave replicated.
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*trees)

    return run


def _moved(into: Text, text: Text, *, to: Any, row: Any) -> Text:
    """Copy one row of a text into another, in place; a shorter cache into the first columns of a longer one."""

    def copy(target: Array, source: Array) -> Array:
        own = jax.lax.dynamic_slice_in_dim(source, row, 1)
        if (
            source.ndim > 2 and source.shape[-1] > target.shape[-1]
        ):  # a cache; padding may extend beyond the other's end
            own = own[..., : target.shape[-1]]
        return jax.lax.dynamic_update_slice(target, own, (to, *(0,) * (target.ndim - 1)))

    return jax.tree.map(copy, into, text)
