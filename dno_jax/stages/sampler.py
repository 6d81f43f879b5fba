"""The engine that a run samples with, as its configuration says: ours on this process's devices, or a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from dno_jax.config import RunConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder
from dno_jax.parallel.mesh import same_everywhere
from dno_jax.parallel.sharding import DECODE, AnyMesh
from dno_jax.records import Prompt
from dno_jax.sampling.completion import Codec
from dno_jax.sampling.engine import Statistics, generate
from dno_jax.sampling.memory import Capacity, SlotPlan, plan_slots
from dno_jax.sampling.requests import Finished, Generation, Request
from dno_jax.sampling.server import complete
from dno_jax.sampling.state import Mixture, Program, Sizes
from dno_jax.sampling.transforms import Truncation
from dno_jax.stages.capacity import device_capacity
from dno_jax.stages.runtime import Runtime


@dataclass(frozen=True)
class Wanted:
    """What a stage is about to sample: the longest texts, and how many."""

    num_samples: int
    num_prompts: int
    prompt_length: int
    max_new_tokens: int
    num_policies: int = 1
    max_total_tokens: int | None = None


def wanted_by_stage(config: RunConfig, *, num_prompts: int, num_held_out: int) -> dict[str, Wanted]:
    """What each stage samples on devices; a server's memory is its own affair.

    Args:
        num_prompts: of the largest iteration.
    """
    section = config.sampling

    def policy(num_samples: int, num_prompts: int, *, num_policies: int = 1) -> Wanted:
        return Wanted(
            num_samples=num_samples,
            num_prompts=num_prompts,
            prompt_length=config.prompts.max_length,
            max_new_tokens=section.max_new_tokens,
            num_policies=num_policies,
            max_total_tokens=section.max_total_tokens,
        )

    wanted: dict[str, Wanted] = {}
    if section.engine == "jax" and section.source != "data":
        mixes = section.source == "mixture" or section.num_opponents > 0
        most = max(section.num_samples, section.num_opponents)
        wanted["sample"] = policy(most, num_prompts, num_policies=2 if mixes else 1)
    if config.annotation.kind == "self":
        judge = config.annotation.self_judge
        wanted["annotate"] = Wanted(
            num_samples=judge.num_judgements,
            num_prompts=num_prompts * (section.num_samples + section.num_opponents),
            prompt_length=judge.max_prompt_length,
            max_new_tokens=judge.max_new_tokens,
        )
    if section.engine == "jax" and num_held_out:
        wanted["evaluate"] = policy(config.evaluation.num_samples, num_held_out)
    return wanted


def plan(runtime: Runtime[RunConfig], wanted: Wanted) -> SlotPlan:
    """Say how many rows decode together; to be asked before weights are loaded, alike on every process.

    Raises:
        DnoError: the configured slots do not fit, or not even one does.
    """
    mesh = runtime.part.mesh
    found = plan_on(
        mesh,
        wanted,
        config=runtime.config,
        model_config=runtime.model_config,
        capacity=device_capacity(mesh.local_devices),
        platform=mesh.local_devices[0].platform,
    )
    if all(device in mesh.local_devices for device in mesh.devices.flat):
        return found
    # Processes that share a model must decode the same rows; those that do not need not even wait for each other.
    return found.with_slots(int(same_everywhere(np.asarray(found.slots))))


def plan_on(
    mesh: AnyMesh,
    wanted: Wanted,
    *,
    config: RunConfig,
    model_config: ModelConfig,
    capacity: Capacity,
    platform: str | None,
) -> SlotPlan:
    """Say how many rows decode together on a mesh whose devices need not be here; see `plan_slots`."""
    section, dtype = config.sampling, config.model.dtype
    generation = Generation(
        num_samples=wanted.num_samples,
        max_new_tokens=wanted.max_new_tokens,
        end_ids=(0,),  # which ids end a response takes no memory
        truncation=Truncation(repetition_penalty=section.repetition_penalty),
        seed=config.seed,
        max_total_tokens=wanted.max_total_tokens,
    )
    sizes = Sizes(
        slots=1,
        prompt_length=wanted.prompt_length,
        prefill_chunk=section.prefill_chunk,
        chunk_steps=section.chunk_steps,
        kv_dtype=dtype if section.kv_dtype == "auto" else section.kv_dtype,
    )
    return plan_slots(
        Program(Decoder(model_config, dtype=jnp.dtype(dtype)), generation, sizes, mesh, section.record_drawn_logprob),
        capacity=capacity,
        num_prompts=wanted.num_prompts,
        slots=section.slots,
        num_policies=wanted.num_policies,
        platform=platform,
    )


def generation_of(runtime: Runtime[RunConfig], *, num_samples: int, first_sample: int = 0) -> Generation:
    """The distribution of the run's own samples."""
    section = runtime.config.sampling
    return Generation(
        num_samples=num_samples,
        first_sample=first_sample,
        max_new_tokens=section.max_new_tokens,
        end_ids=runtime.end_ids,
        num_ids=runtime.tokenizer.vocab_size,
        truncation=Truncation(
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=section.top_p,
            min_p=section.min_p,
            repetition_penalty=section.repetition_penalty,
        ),
        seed=runtime.config.seed,
        max_total_tokens=section.max_total_tokens,
    )


def draw(
    runtime: Runtime[RunConfig],
    params: Any,
    requests: Sequence[Request],
    *,
    before: Callable[[int], Sequence[int]],
    generation: Generation,
    sizes: Sizes,
    iteration: int,
    mixture: Mixture | None = None,
    statistics: Statistics | None = None,
) -> Iterator[Finished]:
    """Sample on the devices of this process's part of the mesh.

    Args:
        before: the ids that a request's response goes on from where its text is decoded; see `ChatTokenizer.decode`.
    """
    section = runtime.config.sampling
    tokenizer, texts = runtime.tokenizer, section.stop

    def stop(index: int, ids: Sequence[int]) -> tuple[int, str] | None:
        text = tokenizer.decode(ids, after=before(index))
        if (end := _first(texts, text)) is None:
            return None
        # The text of a prefix of the ids is a prefix of the text, but for a character that is not whole yet.
        ends = (_first(texts, tokenizer.decode(ids[:n], after=before(index))) for n in range(1, len(ids) + 1))
        return next(n for n, found in enumerate(ends, 1) if found is not None), text[:end]

    return generate(
        params,
        requests,
        model=runtime.model(DECODE, mesh=runtime.part.mesh),
        generation=generation,
        sizes=sizes,
        iteration=iteration,
        mesh=runtime.part.mesh,
        mixture=mixture,
        stop=stop if texts else None,
        record_drawn=section.record_drawn_logprob,
        statistics=statistics,
    )


def ask_server(
    runtime: Runtime[RunConfig],
    requests: Sequence[Request],
    *,
    prompts: Callable[[int], Prompt],
    before: Callable[[int], Sequence[int]],
    generation: Generation,
    iteration: int,
    counts: Counter[str],
) -> Iterator[Finished]:
    """Sample from the configured server."""
    section, tokenizer = runtime.config.sampling, runtime.tokenizer

    def encode(index: int, text: str) -> Sequence[int]:
        prompt = prompts(index)
        ids = tokenizer.response_ids(
            prompt.messages, text, end_id=runtime.end_ids[0], assistant_prefix=prompt.assistant_prefix
        )
        return ids[:-1]

    return complete(
        requests,
        section=section.server,
        generation=generation,
        codec=Codec(
            encode=encode,
            decode=lambda index, ids: tokenizer.decode(ids, after=before(index)),
            text_ids=tokenizer.text_ids,
        ),
        iteration=iteration,
        stop=section.stop,
        counts=counts,
    )


def _first(needles: Sequence[str], text: str) -> int | None:
    """Where the first of some strings begins in a text."""
    found = [place for needle in needles if (place := text.find(needle)) >= 0]
    return min(found, default=None)
