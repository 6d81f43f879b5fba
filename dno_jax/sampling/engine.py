"""The jitted sampler: prefill every prompt once, then decode its K samples together, one program a prompt length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dno_jax.logprobs import token_logprobs
from dno_jax.model.cache import KVCache, cache_axes, grow_cache, init_cache, repeat_cache
from dno_jax.model.decoder import Decoder, logits
from dno_jax.sampling.transforms import Truncation, address, sample_token


@dataclass(frozen=True)
class Generation:
    """What decides a generation besides weights and prompts; static, so each value compiles its own program.

    Attributes:
        num_samples: K, responses a prompt.
        max_new_tokens: tokens of the longest response, its end id included.
        end_ids: ids that end a response.
        truncation: the sampling distribution.
        seed: of the run, the first part of every row's address.
    """

    num_samples: int
    max_new_tokens: int
    end_ids: tuple[int, ...]
    truncation: Truncation
    seed: int


@flax.struct.dataclass
class PromptBatch:
    token: Any  # [P, T] int32, right-padded
    position: Any  # [P, T] int32, -1 is padding; a row of nothing but -1 is a filler
    name: Any  # [P] uint32, 32 bits of the prompt's id


@flax.struct.dataclass
class Responses:
    """Rows are prompts times samples: row p * K + k is sample k of prompt p."""

    token: Any  # [B, N] int32, 0 after the end
    length: Any  # [B] int32, tokens generated, the end id included
    logprob: Any  # [B] float32, sum over them of log pi(token | prefix) at temperature 1, nats
    stopped: Any  # [B] bool, whether an end id was emitted


@flax.struct.dataclass
class _Loop:
    step: Any  # scalar int32, index of the token to be drawn
    hidden: Any  # [B, D] of the last token, which predicts the next
    position: Any  # [B] int32, where the next token stands
    responses: Responses
    cache: KVCache


@partial(jax.jit, static_argnames=("model", "generation"))
def generate(
    params: Any, prompts: PromptBatch, *, model: Decoder, generation: Generation, iteration: Int[Array, ""]
) -> Responses:
    """Sample K responses to every prompt.

    Text depends on (seed, iteration, prompt, sample) and the weights, not on the batch, the order, or the mesh.

    Args:
        params: the decoder's parameters, in the DECODE layout on a mesh of several devices.
        prompts: rows over (data, fsdp).
        iteration: scalar int32, part of every key.
    """
    config, samples = model.config, generation.num_samples
    num_prompts, prompt_length = prompts.token.shape
    place = model.constrain

    def decode(token: Array, position: Array, cache: KVCache) -> tuple[Array, KVCache]:
        # flax also types the mutable collections that `apply` would return if there were any.
        return cast(tuple[Array, KVCache], model.apply({"params": params}, token, position, cache))

    cache = init_cache(config, batch_size=num_prompts, num_slots=prompt_length, dtype=model.dtype)
    hidden, cache = decode(prompts.token, prompts.position, cache)
    lengths = jnp.sum(prompts.position >= 0, axis=1)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    cache = grow_cache(repeat_cache(cache, samples), prompt_length + generation.max_new_tokens)
    cache = jax.tree.map(place, cache, cache_axes(config), is_leaf=_is_array)

    rows = num_prompts * samples
    row_key = address(
        seed=generation.seed,
        iteration=iteration,
        prompt=jnp.repeat(prompts.name, samples),
        sample=jnp.tile(jnp.arange(samples, dtype=jnp.int32), num_prompts),
    )
    filler = jnp.repeat(lengths == 0, samples)
    end_ids = jnp.asarray(generation.end_ids, jnp.int32)

    def take_step(loop: _Loop) -> _Loop:
        done = loop.responses
        # Every row draws over the whole vocabulary: gather it where the head is split.
        row_logits = place(logits(config, params, loop.hidden), ("batch", None))
        token = sample_token(row_key, row_logits, step=loop.step, truncation=generation.truncation)
        alive = ~done.stopped & ~filler
        token = jnp.where(alive, token, 0)
        responses = Responses(
            token=jax.lax.dynamic_update_slice_in_dim(done.token, token[:, None], loop.step, axis=1),
            length=done.length + alive,
            logprob=done.logprob + jnp.where(alive, token_logprobs(row_logits, token), 0.0),
            stopped=done.stopped | (alive & jnp.any(token[:, None] == end_ids[None, :], axis=1)),
        )
        # A finished row goes on as padding: its position is -1, so nothing it writes is ever seen.
        position = jnp.where(alive & ~responses.stopped, loop.position, -1)
        hidden, cache = decode(token[:, None], position[:, None], loop.cache)
        return _Loop(
            step=loop.step + 1, hidden=hidden[:, 0], position=loop.position + 1, responses=responses, cache=cache
        )

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return (loop.step < generation.max_new_tokens) & ~jnp.all(loop.responses.stopped | filler)

    start = _Loop(
        step=jnp.int32(0),
        hidden=place(jnp.repeat(last, samples, axis=0), ("batch", "embed")),
        position=jnp.repeat(lengths, samples).astype(jnp.int32),
        responses=Responses(
            token=jnp.zeros((rows, generation.max_new_tokens), jnp.int32),
            length=jnp.zeros(rows, jnp.int32),
            logprob=jnp.zeros(rows, jnp.float32),
            stopped=jnp.zeros(rows, bool),
        ),
        cache=cache,
    )
    return jax.lax.while_loop(unfinished, take_step, start).responses


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array)


def prompt_bucket(length: int, *, max_length: int) -> int:
    """Return the padded length of a prompt: a power of two from 16, or the maximum; few lengths mean few programs."""
    bucket = 16
    while bucket < length:
        bucket *= 2
    return min(bucket, max_length)
