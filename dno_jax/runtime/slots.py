"""How many rows a stage decodes together: what it is about to sample, against the memory of the devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from dno_jax.config import RunConfig
from dno_jax.parallel.cluster import gather_from_processes
from dno_jax.parallel.sharding import DECODE, AnyMesh
from dno_jax.runtime.capacity import device_capacity
from dno_jax.runtime.programs import Programs
from dno_jax.runtime.runtime import Runtime
from dno_jax.sampling.memory import Capacity, SlotPlan, plan_slots
from dno_jax.sampling.requests import SamplingParams
from dno_jax.sampling.state import CompiledPrograms, EngineShape
from dno_jax.sampling.transforms import Truncation


@dataclass(frozen=True)
class Wanted:
    """What a stage is about to sample: the longest texts, and how many; and what it samples meanwhile, `beside`."""

    num_samples: int
    num_prompts: int
    prompt_length: int
    max_new_tokens: int
    num_policies: int = 1
    max_total_tokens: int | None = None
    beside: tuple[Wanted, ...] = ()

    @classmethod
    def responses(
        cls,
        config: RunConfig,
        *,
        num_samples: int,
        num_prompts: int,
        num_policies: int = 1,
        beside: tuple[Wanted, ...] = (),
    ) -> Wanted:
        """Responses to prompts, of one policy or of the mixture of two."""
        return cls(
            num_samples=num_samples,
            num_prompts=num_prompts,
            prompt_length=config.prompts.max_length,
            max_new_tokens=config.sampling.max_new_tokens,
            num_policies=num_policies,
            max_total_tokens=config.sampling.max_total_tokens,
            beside=beside,
        )

    @classmethod
    def readings(cls, config: RunConfig, *, num_responses: int) -> Wanted:
        """The policy's judgements of responses."""
        judge = config.annotation.self_judge
        return cls(
            num_samples=judge.num_judgements,
            num_prompts=num_responses,
            prompt_length=judge.max_prompt_length,
            max_new_tokens=judge.max_new_tokens,
        )


def wanted_by_stage(config: RunConfig, *, num_prompts: int, num_held_out: int) -> dict[str, Wanted]:
    """What each stage samples on devices; a server's memory is its own affair.

    Args:
        num_prompts: of the largest iteration.
    """
    section = config.sampling
    wanted: dict[str, Wanted] = {}
    if section.engine == "jax" and section.source != "data":
        responses = partial(Wanted.responses, config, num_prompts=num_prompts)
        mixes, opponents = section.source == "mixture", section.num_opponents
        wanted["sample"] = responses(
            num_samples=section.num_samples,
            num_policies=2 if mixes else 1,
            beside=(responses(num_samples=opponents, num_policies=2),) if opponents and not mixes else (),
        )
    if config.annotation.kind == "self":
        candidates = num_prompts * max(map(config.num_candidates, range(config.iterations)))
        wanted["annotate"] = Wanted.readings(config, num_responses=candidates)
    if section.engine == "jax" and num_held_out:
        samples = config.evaluation.num_samples
        wanted["evaluate"] = Wanted.responses(config, num_samples=samples, num_prompts=num_held_out)
    return wanted


def plan(runtime: Runtime[RunConfig], wanted: Wanted) -> SlotPlan:
    """Say how many rows decode together; to be asked before weights are loaded, alike on every process.

    Raises:
        DnoError: the configured slots do not fit, or not even one does.
    """
    mesh = runtime.submesh.mesh
    found = plan_on(
        runtime.programs,
        wanted,
        mesh=mesh,
        capacity=device_capacity(mesh.local_devices),
        platform=mesh.local_devices[0].platform,
    )
    if runtime.submesh.count == jax.process_count():
        return found
    # Processes that share a model must decode the same rows. Every process asks, also one that shares none: all of
    # them together, or none. Where no model is shared they need not even wait for each other.
    slots = gather_from_processes(np.asarray(found.slots))
    return found.with_slots(min(int(slots[device.process_index]) for device in mesh.devices.flat))


def plan_on(
    programs: Programs[RunConfig], wanted: Wanted, *, mesh: AnyMesh, capacity: Capacity, platform: str | None
) -> SlotPlan:
    """Say how many rows decode together on a mesh whose devices need not be here; see `plan_slots`."""
    section = programs.config.sampling
    compiled = partial(_compiled, programs, mesh)
    return plan_slots(
        compiled(wanted),
        capacity=capacity,
        num_prompts=wanted.num_prompts,
        slots=section.slots,
        num_policies=wanted.num_policies,
        beside=[(compiled(other), other.num_policies) for other in wanted.beside],
        platform=platform,
    )


def _compiled(programs: Programs[RunConfig], mesh: AnyMesh, wanted: Wanted) -> CompiledPrograms:
    """Return what would sample it, of one slot; which ids end a response takes no memory."""
    section, dtype = programs.config.sampling, programs.config.model.dtype
    params = drawing(programs.config, num_samples=wanted.num_samples, end_ids=(0,))
    shape = EngineShape(
        slots=1,
        prompt_length=wanted.prompt_length,
        prefill_chunk=section.prefill_chunk,
        chunk_steps=section.chunk_steps,
        kv_dtype=dtype if section.kv_dtype == "auto" else section.kv_dtype,
    )
    return CompiledPrograms(
        model=programs.model(DECODE, mesh=mesh),
        sampling_params=replace(params, max_new_tokens=wanted.max_new_tokens, max_total_tokens=wanted.max_total_tokens),
        shape=shape,
        mesh=mesh,
        record_drawn=section.record_drawn_logprob,
    )


def drawing(
    config: RunConfig, *, num_samples: int, end_ids: tuple[int, ...], num_ids: int | None = None
) -> SamplingParams:
    """How a run's configuration draws, without its bound on prompt and response together."""
    section = config.sampling
    return SamplingParams(
        num_samples=num_samples,
        max_new_tokens=section.max_new_tokens,
        end_ids=end_ids,
        num_ids=num_ids,
        truncation=Truncation(
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=section.top_p,
            min_p=section.min_p,
            repetition_penalty=section.repetition_penalty,
        ),
        seed=config.seed,
    )
