"""The jitted sampler: prefill every prompt once, then decode its K samples together, one program a prompt length.

It draws from one policy, or token by token from the geometric mixture of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dno_jax.logprobs import token_logprobs
from dno_jax.model.cache import KVCache, cache_axes, grow_cache, init_cache, repeat_cache
from dno_jax.model.decoder import Decoder, logits
from dno_jax.sampling.transforms import Truncation, address, sample_token, without_padding


@dataclass(frozen=True)
class Generation:
    """What decides a generation besides weights and prompts; static, so each value compiles its own program.

    Attributes:
        num_samples: K, responses a prompt.
        max_new_tokens: tokens of the longest response, its end id included.
        end_ids: ids that end a response.
        truncation: the sampling distribution.
        seed: of the run, the first part of every row's address.
        num_ids: ids that may be drawn are below this, the tokenizer's count; further rows of the embedding are padding.
            None draws from all of it.
        first_sample: number of the first of the K samples; others of one prompt then draw from other keys.
    """

    num_samples: int
    max_new_tokens: int
    end_ids: tuple[int, ...]
    truncation: Truncation
    seed: int
    first_sample: int = 0
    num_ids: int | None = None


@flax.struct.dataclass
class PromptBatch:
    token: Any  # [P, T] int32, right-padded
    position: Any  # [P, T] int32, -1 is padding; a row of nothing but -1 is a filler
    name: Any  # [P] uint32, 32 bits of the prompt's id


def pack_prompts(
    token_ids: Sequence[Sequence[int]], names: Sequence[int], *, num_rows: int, length: int
) -> PromptBatch:
    """Lay prompts out for `generate`, in host memory; missing rows are fillers.

    Args:
        token_ids, names: of each prompt, at most num_rows of them.
        length: padded length, at least that of the longest prompt.
    """
    token = np.zeros((num_rows, length), np.int32)
    position = np.full((num_rows, length), -1, np.int32)
    name = np.zeros(num_rows, np.uint32)
    for row, (ids, own) in enumerate(zip(token_ids, names, strict=True)):
        token[row, : len(ids)] = ids
        position[row, : len(ids)] = np.arange(len(ids))
        name[row] = own
    return PromptBatch(token=token, position=position, name=name)


@flax.struct.dataclass
class Mixture:
    """The second policy of a geometric mixture, token by token (Algorithm 4, Option II; Nash-MD's pi_t^tau):

    mixed(token | prefix) ∝ pi_t(token | prefix)^(1 - weight) * pi_ref(token | prefix)^weight, weight = tau / eta.

    Normalised at every token, hence not the mixture of whole responses that stands in Algorithm 3's loss.
    """

    params: Any  # pi_ref's parameters: the same decoder, in the same layout
    weight: Any  # scalar float32 in [0, 1], pi_ref's share; traced, so that a schedule compiles nothing anew


@flax.struct.dataclass
class Responses:
    """Rows are prompts times samples: row p * K + k is sample k of prompt p."""

    token: Any  # [B, N] int32, 0 after the end
    length: Any  # [B] int32, tokens generated, the end id included
    # [B] float32, sum over them of log pi_t(token | prefix), nats, mixture or not: at temperature 1 over the whole
    # embedding, as the trainer has it, whatever truncation or padding kept some tokens from being drawn.
    logprob: Any
    stopped: Any  # [B] bool, whether an end id was emitted


@flax.struct.dataclass
class _Loop:
    step: Any  # scalar int32, index of the token to be drawn
    hidden: Any  # one [B, D] a policy: of the last token, which predicts the next
    position: Any  # [B] int32, where the next token stands
    responses: Responses
    cache: tuple[KVCache, ...]  # one a policy


@partial(jax.jit, static_argnames=("model", "generation"))
def generate(
    params: Any,
    prompts: PromptBatch,
    *,
    model: Decoder,
    generation: Generation,
    iteration: Int[Array, ""],
    mixture: Mixture | None = None,
) -> Responses:
    """Sample K responses to every prompt.

    Text depends on (seed, iteration, prompt, sample) and the weights, not on the batch, the order, or the mesh.

    Args:
        params: pi_t, the decoder's parameters, in the DECODE layout on a mesh of several devices.
        prompts: rows over (data, fsdp, expert).
        iteration: scalar int32, part of every key.
        mixture: draw from the geometric mixture with this policy; temperature and truncation then apply to the
            mixture, `Responses.logprob` stays pi_t's own. None holds no second cache.
    """
    config, samples = model.config, generation.num_samples
    policies = (params,) if mixture is None else (params, mixture.params)
    num_prompts, prompt_length = prompts.token.shape
    lengths = jnp.sum(prompts.position >= 0, axis=1)
    place = model.constrain

    def decode(policy: Any, token: Array, position: Array, cache: KVCache) -> tuple[Array, KVCache]:
        # flax also types the mutable collections that `apply` would return if there were any.
        return cast(tuple[Array, KVCache], model.apply({"params": policy}, token, position, cache))

    def prefill(policy: Any) -> tuple[Array, KVCache]:
        cache = init_cache(config, batch_size=num_prompts, num_slots=prompt_length, dtype=model.dtype)
        hidden, cache = decode(policy, prompts.token, prompts.position, cache)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        cache = grow_cache(repeat_cache(cache, samples), prompt_length + generation.max_new_tokens)
        cache = jax.tree.map(place, cache, cache_axes(config), is_leaf=_is_array)
        return place(jnp.repeat(last, samples, axis=0), ("batch", "embed")), cache

    hidden, cache = zip(*map(prefill, policies), strict=True)

    rows = num_prompts * samples
    row_key = address(
        seed=generation.seed,
        iteration=iteration,
        prompt=jnp.repeat(prompts.name, samples),
        sample=jnp.tile(generation.first_sample + jnp.arange(samples, dtype=jnp.int32), num_prompts),
    )
    filler = jnp.repeat(lengths == 0, samples)
    end_ids = jnp.asarray(generation.end_ids, jnp.int32)

    def mixed(row_logits: list[Array]) -> Array:
        if mixture is None:
            return row_logits[0]
        # Raw logits do: they are log-probabilities up to a constant a row, so their mixture is too, and sample_token
        # is blind to that constant. Two products, not a + weight * (b - a): weights 0 and 1 give a and b exactly.
        return (1.0 - mixture.weight) * row_logits[0] + mixture.weight * row_logits[1]

    def take_step(loop: _Loop) -> _Loop:
        done = loop.responses
        # Every row draws over the whole vocabulary: gather it where the head is split.
        row_logits = [
            place(logits(config, policy, hidden), ("batch", None))
            for policy, hidden in zip(policies, loop.hidden, strict=True)
        ]
        drawable = without_padding(mixed(row_logits), num_ids=generation.num_ids)
        token = sample_token(row_key, drawable, step=loop.step, truncation=generation.truncation)
        alive = ~done.stopped & ~filler
        token = jnp.where(alive, token, 0)
        responses = Responses(
            token=jax.lax.dynamic_update_slice_in_dim(done.token, token[:, None], loop.step, axis=1),
            length=done.length + alive,
            logprob=done.logprob + jnp.where(alive, token_logprobs(row_logits[0], token), 0.0),
            stopped=done.stopped | (alive & jnp.any(token[:, None] == end_ids[None, :], axis=1)),
        )
        # A finished row goes on as padding: its position is -1, so nothing it writes is ever seen.
        position = jnp.where(alive & ~responses.stopped, loop.position, -1)
        steps = [
            decode(policy, token[:, None], position[:, None], cache)
            for policy, cache in zip(policies, loop.cache, strict=True)
        ]
        return _Loop(
            step=loop.step + 1,
            hidden=tuple(hidden[:, 0] for hidden, _ in steps),
            position=loop.position + 1,
            responses=responses,
            cache=tuple(cache for _, cache in steps),
        )

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return (loop.step < generation.max_new_tokens) & ~jnp.all(loop.responses.stopped | filler)

    start = _Loop(
        step=jnp.int32(0),
        hidden=hidden,
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
