"""The jitted sampler: slots that decode together, and a queue of prefilled prompts from which a free slot refills.

    fill    a prompt's keys and values, and the hidden state after its last token, into the queue
    decode  some tokens for all slots; a slot whose response has ended starts the queue's next sample at its next step

Both keep the state in place; what it is, and how rows move in it, is in state.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dno_jax.logprobs import token_logprobs
from dno_jax.model.cache import Cache, init_cache
from dno_jax.model.decoder import Decoder, logits
from dno_jax.sampling.state import (
    CompiledPrograms,
    Counts,
    Drawn,
    Outputs,
    Prompts,
    Slots,
    State,
    Text,
    enqueue,
    laid_out,
    refill,
    release,
    write,
)
from dno_jax.sampling.transforms import address, drawn_logprobs, sample_token, without_padding


@partial(jax.jit, static_argnames="programs", donate_argnames="state")
def fill(
    policies: tuple[Any, ...], state: State, prompts: Prompts, *, iteration: Int[Array, ""], programs: CompiledPrograms
) -> State:
    """Prefill prompts into the queue, one program per padded length T; the host makes sure that they fit.

    Args:
        policies: parameters of each policy in the DECODE layout.
        iteration: scalar int32, part of every key.
    """
    model = programs.model
    rows, width = prompts.token.shape
    piece = min(width, programs.shape.prefill_chunk)

    def read(params: Any) -> tuple[Array, Cache]:
        """Put whole prompts through the model, piece after piece; return the state after the last token of each."""
        dtype = jnp.dtype(programs.shape.kv_dtype)
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

    samples = jnp.arange(programs.sampling_params.num_samples, dtype=jnp.int32) + programs.sampling_params.first_sample
    keys = address(
        purpose=programs.sampling_params.purpose,
        seed=programs.sampling_params.seed,
        iteration=iteration,
        prompt=jnp.repeat(prompts.name, len(samples)),
        sample=jnp.tile(samples, rows),
    ).reshape(rows, len(samples), 2)
    return replace(state, queue=enqueue(state.queue, text, prompts, keys, mesh=programs.mesh))


def _ids_of(prompts: Prompts, seen: Any) -> Any:
    """Say which ids each prompt has: [R, V]; None where nobody asks."""
    if seen is None:
        return None
    rows, width = prompts.token.shape
    # Padding is an id beyond the vocabulary, which marks nothing.
    token = jnp.where(jnp.arange(width)[None] < prompts.length[:, None], prompts.token, seen.shape[1])
    return jnp.zeros((rows, seen.shape[1]), bool).at[jnp.arange(rows)[:, None], token].set(True, mode="drop")


@partial(jax.jit, static_argnames="programs", donate_argnames="state")
def decode(
    policies: tuple[Any, ...],
    state: State,
    outputs: Outputs,
    weight: Any,
    *,
    fresh: Array,
    cancelled: Array,
    programs: CompiledPrograms,
) -> tuple[State, Outputs, Counts]:
    """Draw up to `chunk_steps` tokens for every slot, and refill slots on the way.

    Text depends on (seed, iteration, prompt, sample) and the weights; on slots, order, mesh or chunk by rounding alone.

    Args:
        outputs: not donated, so that the host can read them while the next call runs.
        weight: the mixture's; not read where there is one policy.
        fresh: [O * K] bool, output rows that belong to prompts filled since the last call.
        cancelled: [O * K] bool, responses whose text the host has found ended.
    """
    sampling_params, model, mesh = programs.sampling_params, programs.model, programs.mesh
    place, config = model.constrain, model.config
    end_ids = jnp.asarray(sampling_params.end_ids, jnp.int32)
    outputs = replace(
        outputs,
        length=jnp.where(fresh, 0, outputs.length),
        done=jnp.where(fresh, False, outputs.done) | cancelled,
        stopped=jnp.where(fresh, False, outputs.stopped),
    )

    def mixed(row_logits: list[Array]) -> Array:
        if len(row_logits) == 1:
            return row_logits[0]
        # Raw logits do: they are log-probabilities up to a constant per row, so their mixture is too, and sample_token
        # is blind to that constant. Two products, not a + weight * (b - a): weights 0 and 1 give a and b exactly.
        return (1.0 - weight) * row_logits[0] + weight * row_logits[1]

    def take_step(loop: _Loop) -> _Loop:
        slots, started = refill(loop.slots, loop.started, state.queue, mesh=mesh)
        alive = slots.output >= 0
        text = slots.text
        # Every row draws over the whole vocabulary: gather it where the head is split, and not the head, which is what
        # the compiler would do if it were not told that the product is split too.
        row_logits = [
            place(place(logits(config, params, hidden), ("batch", "vocab")), ("batch", None))
            for params, hidden in zip(policies, text.hidden, strict=True)
        ]
        drawable = without_padding(mixed(row_logits), num_ids=sampling_params.num_ids)
        token = sample_token(
            slots.key, drawable, step=slots.step, truncation=sampling_params.truncation, seen=text.seen
        )
        token = jnp.where(alive, token, 0)
        stopped = jnp.any(token[:, None] == end_ids[None, :], axis=1)
        logprob, *others = (token_logprobs(each, token) for each in row_logits)
        for (
            other
        ) in others:  # a reference that is not finite spoils what is drawn, and pi_t's own numbers do not show it
            logprob = jnp.where(jnp.isfinite(other), logprob, jnp.nan)
        drawn = Drawn(
            token=token,
            logprob=logprob,
            drawn_logprob=drawn_logprobs(drawable, token, truncation=sampling_params.truncation, seen=text.seen)
            if programs.record_drawn
            else None,
            stopped=stopped,
            ended=stopped | (slots.step + 1 >= slots.limit),
        )
        outputs = write(loop.outputs, slots, drawn, mesh=mesh)
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
        waiting = state.queue.filled * sampling_params.num_samples > loop.started
        return (loop.step < programs.shape.chunk_steps) & (jnp.any(waiting) | jnp.any(loop.slots.output >= 0))

    loop = jax.lax.while_loop(
        unfinished,
        take_step,
        _Loop(
            step=jnp.int32(0),
            busy=jnp.int32(0),
            slots=release(state.slots, cancelled, mesh=mesh),
            outputs=outputs,
            started=state.queue.started,
        ),
    )
    counts = Counts(started=loop.started, busy=loop.busy, steps=loop.step)
    whole = NamedSharding(mesh, PartitionSpec())
    counts = jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, whole), counts)
    state = State(slots=loop.slots, queue=replace(state.queue, started=loop.started))
    # As `start` gives them, or the next call would be another program.
    state, outputs = laid_out((state, loop.outputs), mesh=mesh)
    return state, outputs, counts


@flax.struct.dataclass
class _Loop:
    step: Any  # scalar int32
    busy: Any  # scalar int32
    slots: Slots
    outputs: Outputs
    started: Any  # [1] int32 per row shard


def _apply(model: Decoder, params: Any, token: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
    # flax also types the mutable collections that `apply` would return if there were any.
    return cast(tuple[Array, Cache], model.apply({"params": params}, token, position, cache))
