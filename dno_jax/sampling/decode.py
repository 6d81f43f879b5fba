"""The jitted sampler: slots that decode together, and a queue of prefilled prompts from which a free slot refills.

    fill    a prompt's keys and values, and the hidden state after its last token, into the queue
    decode  some tokens for all slots; a slot whose response has ended starts the queue's next sample at its next step

Both keep the state in place. Each row shard of the mesh has slots and a queue of its own, so that nothing but what the
model itself asks for crosses devices. A response is written where its prompt's output rows are, not where its slot is:
the host reads outputs and never hears of slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dno_jax.logprobs import token_logprobs
from dno_jax.model.cache import Cache, KVCache, init_cache
from dno_jax.model.decoder import Decoder, logits
from dno_jax.parallel.cache import cache_specs
from dno_jax.parallel.sharding import DECODE, ROW_AXES, AnyMesh, num_row_shards
from dno_jax.sampling.requests import Generation
from dno_jax.sampling.transforms import address, drawn_logprobs, sample_token, without_padding


@dataclass(frozen=True)
class Sizes:
    """How much is decoded at once; static. Counts are of one row shard of the mesh.

    Attributes:
        slots: responses that decode together.
        prompt_length: tokens of the longest prompt.
        entries: prompts that stand prefilled in the queue.
        fill_rows: prompts prefilled by one call.
        prefill_chunk: tokens of a prompt that go through the model at once.
        chunk_steps: tokens a slot draws before the host looks.
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


@dataclass(frozen=True)
class Program:
    """Everything static of the two programs."""

    model: Decoder
    generation: Generation
    sizes: Sizes
    mesh: AnyMesh
    record_drawn: bool = False

    @property
    def num_slots(self) -> int:
        """Columns of a slot's cache."""
        whole = self.sizes.prompt_length + self.generation.max_new_tokens
        total = self.generation.max_total_tokens
        return whole if total is None else min(whole, total)


@flax.struct.dataclass
class Mixture:
    """The second policy of a geometric mixture, token by token (Algorithm 4, Option II; Nash-MD's pi_t^tau):

    mixed(token | prefix) ∝ pi_t(token | prefix)^(1 - weight) * pi_ref(token | prefix)^weight, weight = tau / eta.

    Normalised at every token, hence not the mixture of whole responses that stands in Algorithm 3's loss.
    """

    params: Any  # pi_ref's parameters: the same decoder, in the same layout
    weight: Any  # scalar float32 in [0, 1], pi_ref's share; traced, so that a schedule compiles nothing anew


@flax.struct.dataclass
class Text:
    """Where rows stand in their texts: B slots, or E queue entries."""

    cache: tuple[Cache, ...]  # one a policy
    hidden: tuple[Any, ...]  # one [B, D] a policy: of the last token, which predicts the next
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
    filled: Any  # [1] int32 a row shard, prompts that came
    started: Any  # [1] int32 a row shard, samples that were started


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
    started: Any  # int32 a row shard, samples started, of all prompts that came
    busy: Any  # scalar int32, slot-steps of the call that drew a token
    steps: Any  # scalar int32, steps of the call


@flax.struct.dataclass
class State:
    """What a call hands to the next; given to a program, it is gone."""

    slots: Slots
    queue: Queue


@flax.struct.dataclass
class Prompts:
    """What is prefilled by one call, R rows a row shard, the real ones first in each shard."""

    token: Any  # [R, T] int32, right-padded
    length: Any  # [R] int32; 0 is a filler
    name: Any  # [R] uint32
    output: Any  # [R] int32, first output row of each, in its shard
    limit: Any  # [R] int32, tokens of its longest response


def _specs(tree: Any) -> Any:
    """Where everything of a State, Outputs or Prompts lies: rows on the row axes, heads on the tensor axis."""

    def spec(leaf: Any) -> Any:
        if isinstance(leaf, KVCache):
            return cache_specs(leaf, DECODE)
        return PartitionSpec(ROW_AXES) if leaf.ndim else PartitionSpec()

    return jax.tree.map(spec, tree, is_leaf=lambda leaf: isinstance(leaf, KVCache))


def _shardings(tree: Any, mesh: AnyMesh) -> Any:
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), _specs(tree), is_leaf=lambda spec: isinstance(spec, PartitionSpec)
    )


@partial(jax.jit, static_argnames=("program", "policies"))
def start(program: Program, *, policies: int) -> tuple[State, Outputs]:
    """Return empty slots, an empty queue and outputs, laid out on the mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_start(program, policies=policies))
    return jax.lax.with_sharding_constraint(_empty(program, policies), shardings)


def abstract_start(program: Program, *, policies: int) -> tuple[State, Outputs]:
    """Return what `start` returns as jax.ShapeDtypeStruct with shardings, without making arrays."""
    shapes = jax.eval_shape(partial(_empty, program, policies))

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, shapes, _shardings(shapes, program.mesh))


def _empty(program: Program, policies: int) -> tuple[State, Outputs]:
    sizes, generation = program.sizes, program.generation
    config, dtype = program.model.config, program.model.dtype
    shards = num_row_shards(program.mesh)

    def text(rows: int, num_slots: int) -> Text:
        cache = init_cache(config, batch_size=rows, num_slots=num_slots, dtype=jnp.dtype(sizes.kv_dtype))
        penalised = generation.truncation.repetition_penalty != 1.0
        return Text(
            cache=(cache,) * policies,
            hidden=(jnp.zeros((rows, config.hidden_size), dtype),) * policies,
            length=jnp.zeros(rows, jnp.int32),
            seen=jnp.zeros((rows, config.vocab_size), bool) if penalised else None,
        )

    slots, entries = shards * sizes.slots, shards * sizes.entries
    outputs, length = shards * sizes.outputs * generation.num_samples, generation.max_new_tokens
    state = State(
        slots=Slots(
            text=text(slots, program.num_slots),
            key=jnp.zeros((slots, 2), jnp.uint32),
            output=jnp.full(slots, -1, jnp.int32),
            step=jnp.zeros(slots, jnp.int32),
            limit=jnp.zeros(slots, jnp.int32),
        ),
        queue=Queue(
            text=text(entries, sizes.prompt_length),
            key=jnp.zeros((entries, generation.num_samples, 2), jnp.uint32),
            output=jnp.zeros(entries, jnp.int32),
            limit=jnp.zeros(entries, jnp.int32),
            filled=jnp.zeros(shards, jnp.int32),
            started=jnp.zeros(shards, jnp.int32),
        ),
    )
    return state, Outputs(
        token=jnp.zeros((outputs, length), jnp.int32),
        logprob=jnp.zeros((outputs, length), jnp.float32),
        drawn_logprob=jnp.zeros((outputs, length), jnp.float32) if program.record_drawn else None,
        length=jnp.zeros(outputs, jnp.int32),
        done=jnp.zeros(outputs, bool),
        stopped=jnp.zeros(outputs, bool),
    )


def _apply(model: Decoder, params: Any, token: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
    # flax also types the mutable collections that `apply` would return if there were any.
    return cast(tuple[Array, Cache], model.apply({"params": params}, token, position, cache))


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def fill(
    policies: tuple[Any, ...], state: State, prompts: Prompts, *, iteration: Int[Array, ""], program: Program
) -> State:
    """Prefill prompts into the queue, one program a padded length T; the host sees to it that there is room.

    Args:
        policies: parameters of each policy in the DECODE layout.
        iteration: scalar int32, part of every key.
    """
    model = program.model
    rows, width = prompts.token.shape
    piece = min(width, program.sizes.prefill_chunk)

    def read(params: Any) -> tuple[Array, Cache]:
        """Put whole prompts through the model, piece after piece; return the state after the last token of each."""
        dtype = jnp.dtype(program.sizes.kv_dtype)
        cache = init_cache(model.config, batch_size=rows, num_slots=width, dtype=dtype)

        def one(start: Array, carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            cache, last = carry
            position = start + jnp.broadcast_to(jnp.arange(piece, dtype=jnp.int32), (rows, piece))
            position = jnp.where(position < prompts.length[:, None], position, -1)
            token = jax.lax.dynamic_slice_in_dim(prompts.token, start, piece, axis=1)
            hidden, cache = _apply(model, params, token, position, cache)
            index = prompts.length - 1 - start
            own = jnp.take_along_axis(hidden, jnp.clip(index, 0, piece - 1)[:, None, None], axis=1)[:, 0]
            return cache, jnp.where(((index >= 0) & (index < piece))[:, None], own, last)

        carry = cache, jnp.zeros((rows, model.config.hidden_size), model.dtype)
        if piece == width:
            cache, last = one(jnp.int32(0), carry)
        else:
            pieces = -(-width // piece)
            cache, last = jax.lax.fori_loop(0, pieces, lambda i, carry: one(i * piece, carry), carry)
        return last, cache

    hidden, cache = zip(*map(read, policies), strict=True)
    text = Text(cache=cache, hidden=hidden, length=prompts.length, seen=_ids_of(prompts, state.queue.text.seen))

    samples = jnp.arange(program.generation.num_samples, dtype=jnp.int32) + program.generation.first_sample
    keys = address(
        seed=program.generation.seed,
        iteration=iteration,
        prompt=jnp.repeat(prompts.name, len(samples)),
        sample=jnp.tile(samples, rows),
    ).reshape(rows, len(samples), 2)

    def put(queue: Queue, text: Text, prompts: Prompts, keys: Array) -> Queue:
        def one(row: Array, queue: Queue) -> Queue:
            entry = queue.filled[0] % queue.output.shape[0]
            return replace(
                queue,
                text=_moved(queue.text, text, to=entry, row=row),
                key=queue.key.at[entry].set(keys[row]),
                output=queue.output.at[entry].set(prompts.output[row]),
                limit=queue.limit.at[entry].set(prompts.limit[row]),
                filled=queue.filled + 1,
            )

        return jax.lax.fori_loop(0, jnp.sum(prompts.length > 0), one, queue)

    return replace(state, queue=_locally(put, program.mesh)(state.queue, text, prompts, keys))


def _ids_of(prompts: Prompts, seen: Any) -> Any:
    """Say which ids each prompt has: [R, V]; None where nobody asks."""
    if seen is None:
        return None
    rows, width = prompts.token.shape
    # Padding is an id beyond the vocabulary, which marks nothing.
    token = jnp.where(jnp.arange(width)[None] < prompts.length[:, None], prompts.token, seen.shape[1])
    return jnp.zeros((rows, seen.shape[1]), bool).at[jnp.arange(rows)[:, None], token].set(True, mode="drop")


def _moved(into: Text, text: Text, *, to: Any, row: Any) -> Text:
    """Copy one row of a text into another, in place; a shorter cache into the first columns of a longer one."""

    def copy(target: Array, source: Array) -> Array:
        own = jax.lax.dynamic_slice_in_dim(source, row, 1)
        if source.ndim > 2 and source.shape[-1] > target.shape[-1]:  # a cache; padding may go on where the other ends
            own = own[..., : target.shape[-1]]
        return jax.lax.dynamic_update_slice(target, own, (to, *(0,) * (target.ndim - 1)))

    return jax.tree.map(copy, into, text)


def _locally(function: Any, mesh: AnyMesh, *, results: int = 1) -> Any:
    """Run a function on every row shard by itself; what it returns is like its first arguments, `results` of them."""

    def run(*trees: Any) -> Any:
        specs = tuple(map(_specs, trees))
        out = specs[0] if results == 1 else specs[:results]
        # Loops whose number of rounds is a shard's own cannot be checked for what they leave replicated.
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*trees)

    return run


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def decode(
    policies: tuple[Any, ...],
    state: State,
    outputs: Outputs,
    weight: Any,
    *,
    fresh: Array,
    cancelled: Array,
    program: Program,
) -> tuple[State, Outputs, Counts]:
    """Draw up to `chunk_steps` tokens for every slot, and refill slots on the way.

    Text depends on (seed, iteration, prompt, sample) and the weights, not on slots, order, mesh or chunk.

    Args:
        outputs: not given away, so that the host can read them while the next call runs.
        weight: the mixture's; not read where there is one policy.
        fresh: [O * K] bool, output rows that belong to prompts filled since the last call.
        cancelled: [O * K] bool, responses whose text the host has found ended.
    """
    generation, sizes, model = program.generation, program.sizes, program.model
    place, config = model.constrain, model.config
    end_ids = jnp.asarray(generation.end_ids, jnp.int32)
    locally = partial(_locally, mesh=program.mesh)
    outputs = replace(
        outputs,
        length=jnp.where(fresh, 0, outputs.length),
        done=jnp.where(fresh, False, outputs.done) | cancelled,
        stopped=jnp.where(fresh, False, outputs.stopped),
    )

    def release(slots: Slots, cancelled: Array) -> Slots:
        stop = (slots.output >= 0) & cancelled[jnp.maximum(slots.output, 0)]
        return replace(slots, output=jnp.where(stop, -1, slots.output))

    def refill(slots: Slots, started: Array, queue: Queue) -> tuple[Slots, Array]:
        """Start samples in free slots until one of both runs out; `started` counts them."""
        waiting = queue.filled[0] * generation.num_samples - started[0]

        def one(_: Array, carry: tuple[Slots, Array]) -> tuple[Slots, Array]:
            slots, started = carry
            slot = jnp.argmax(slots.output < 0)
            prompt, sample = jnp.divmod(started[0], generation.num_samples)
            entry = prompt % sizes.entries
            slots = Slots(
                text=_moved(slots.text, queue.text, to=slot, row=entry),
                key=slots.key.at[slot].set(queue.key[entry, sample]),
                output=slots.output.at[slot].set(queue.output[entry] + sample),
                step=slots.step.at[slot].set(0),
                limit=slots.limit.at[slot].set(queue.limit[entry]),
            )
            return slots, started + 1

        count = jnp.minimum(jnp.sum(slots.output < 0), waiting)
        return jax.lax.fori_loop(0, count, one, (slots, started))

    def mixed(row_logits: list[Array]) -> Array:
        if len(row_logits) == 1:
            return row_logits[0]
        # Raw logits do: they are log-probabilities up to a constant a row, so their mixture is too, and sample_token
        # is blind to that constant. Two products, not a + weight * (b - a): weights 0 and 1 give a and b exactly.
        return (1.0 - weight) * row_logits[0] + weight * row_logits[1]

    def write(outputs: Outputs, slots: Slots, drawn: _Drawn) -> Outputs:
        # A row that does not exist drops what is written there.
        row = jnp.where(slots.output >= 0, slots.output, outputs.length.shape[0])

        def put(target: Array | None, value: Array, *column: Array) -> Array | None:
            return None if target is None else target.at[(row, *column)].set(value, mode="drop")

        return Outputs(
            token=put(outputs.token, drawn.token, slots.step),
            logprob=put(outputs.logprob, drawn.logprob, slots.step),
            drawn_logprob=put(outputs.drawn_logprob, drawn.drawn_logprob, slots.step),
            length=put(outputs.length, slots.step + 1),
            done=put(outputs.done, drawn.ended),
            stopped=put(outputs.stopped, drawn.stopped),
        )

    def take_step(loop: _Loop) -> _Loop:
        slots, started = locally(refill, results=2)(loop.slots, loop.started, state.queue)
        alive = slots.output >= 0
        text = slots.text
        # Every row draws over the whole vocabulary: gather it where the head is split, and not the head, which is what
        # the compiler would do if it were not told that the product is split too.
        row_logits = [
            place(place(logits(config, params, hidden), ("batch", "vocab")), ("batch", None))
            for params, hidden in zip(policies, text.hidden, strict=True)
        ]
        drawable = without_padding(mixed(row_logits), num_ids=generation.num_ids)
        token = sample_token(slots.key, drawable, step=slots.step, truncation=generation.truncation, seen=text.seen)
        token = jnp.where(alive, token, 0)
        stopped = jnp.any(token[:, None] == end_ids[None, :], axis=1)
        drawn = _Drawn(
            token=token,
            logprob=token_logprobs(row_logits[0], token),
            drawn_logprob=drawn_logprobs(drawable, token, truncation=generation.truncation, seen=text.seen)
            if program.record_drawn
            else jnp.zeros(token.shape, jnp.float32),
            stopped=stopped,
            ended=stopped | (slots.step + 1 >= slots.limit),
        )
        outputs = locally(write)(loop.outputs, slots, drawn)
        goes_on = alive & ~drawn.ended
        position = jnp.where(goes_on, text.length, -1)
        steps = [
            _apply(model, params, token[:, None], position[:, None], cache)
            for params, cache in zip(policies, text.cache, strict=True)
        ]
        seen = text.seen
        if seen is not None:
            seen = seen | (jnp.arange(seen.shape[1])[None] == token[:, None])
        slots = replace(
            slots,
            text=Text(
                cache=tuple(cache for _, cache in steps),
                hidden=tuple(hidden[:, 0] for hidden, _ in steps),
                length=text.length + 1,
                seen=seen,
            ),
            output=jnp.where(goes_on, slots.output, -1),
            step=slots.step + 1,
        )
        return _Loop(step=loop.step + 1, busy=loop.busy + jnp.sum(alive), slots=slots, outputs=outputs, started=started)

    def unfinished(loop: _Loop) -> Array:
        waiting = state.queue.filled * generation.num_samples > loop.started
        return (loop.step < sizes.chunk_steps) & (jnp.any(waiting) | jnp.any(loop.slots.output >= 0))

    loop = jax.lax.while_loop(
        unfinished,
        take_step,
        _Loop(
            step=jnp.int32(0),
            busy=jnp.int32(0),
            slots=locally(release)(state.slots, cancelled),
            outputs=outputs,
            started=state.queue.started,
        ),
    )
    counts = Counts(started=loop.started, busy=loop.busy, steps=loop.step)
    whole = NamedSharding(program.mesh, PartitionSpec())
    counts = jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, whole), counts)
    queue = replace(state.queue, started=loop.started)
    # Laid out as `start` gives them, or the next call would be another program.
    given = State(slots=loop.slots, queue=queue), loop.outputs
    state, outputs = jax.lax.with_sharding_constraint(given, _shardings(given, program.mesh))
    return state, outputs, counts


@flax.struct.dataclass
class _Drawn:
    token: Any  # [B] int32
    logprob: Any  # [B] float32
    drawn_logprob: Any  # [B] float32
    stopped: Any  # [B] bool, whether it is an end id
    ended: Any  # [B] bool, whether it is the response's last


@flax.struct.dataclass
class _Loop:
    step: Any  # scalar int32
    busy: Any  # scalar int32
    slots: Slots
    outputs: Outputs
    started: Any  # [1] int32 a row shard
