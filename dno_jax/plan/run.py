"""What a run takes and whether it fits, before it starts: read from its configuration, the model's shape and prompts.

Each part of a run that devices hold in memory has its plan here, and `render` shows them one after the other.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dno_jax.config import RunConfig
from dno_jax.data.prompts import PromptSplit, TokenizedPrompt, split_prompts, tokenize_prompts
from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import abstract_adapters, abstract_params
from dno_jax.parallel.mesh import abstract_mesh, make_mesh
from dno_jax.parallel.sharding import AnyMesh, num_row_shards
from dno_jax.plan.annotation import AnnotationPlan, plan_annotation
from dno_jax.plan.costs import cost_tables
from dno_jax.records import Prompt
from dno_jax.runtime.capacity import device_capacity
from dno_jax.runtime.fit import check_fit, read_shape, trained_adapter
from dno_jax.runtime.programs import Programs
from dno_jax.runtime.runtime import load_tokenizer
from dno_jax.runtime.slots import plan_on, wanted_by_stage
from dno_jax.sampling.memory import Capacity, SlotPlan, show_bytes

Tokenize = Callable[[tuple[Prompt, ...]], tuple[list[TokenizedPrompt], Counter[str]]]


@dataclass(frozen=True)
class PromptCount:
    """Prompts of an iteration, or held-out ones, and what is sampled from them.

    Attributes:
        prompts, prompt_tokens: those that are sampled from.
        dropped: prompts that are not.
        responses: of one policy, the mixture's included.
        response_tokens: at most; most responses end before.
        shards: files of rollouts.
    """

    prompts: int
    prompt_tokens: int
    dropped: int
    responses: int
    response_tokens: int
    shards: int


@dataclass(frozen=True)
class RunPlan:
    """
    Attributes:
        counts: by "iteration 0" and so on, and "held out".
        sampling: slots of every stage that samples, by its name.
        annotation: what judges and teachers cost; None where nobody is paid.
    """

    config: RunConfig
    model_config: ModelConfig
    mesh: AnyMesh
    counts: dict[str, PromptCount]
    sampling: dict[str, SlotPlan]
    annotation: AnnotationPlan | None


def plan_run(
    config: RunConfig,
    *,
    memory: int | None = None,
    num_devices: int | None = None,
    response_tokens: int | None = None,
    reply_tokens: int | None = None,
) -> RunPlan:
    """Plan a run on this machine's devices, or on others.

    Args:
        memory: bytes of one device; None asks this machine's devices.
        num_devices: of the machine to plan for; None takes this machine's.
        response_tokens, reply_tokens: of a response that a judge reads, and of what it replies; None takes the longest.

    Raises:
        DnoError: whatever does not fit, together or into memory.
    """
    if num_devices is not None and num_devices < 1:
        raise DnoError(f"--devices is {num_devices}; expected at least 1")
    if num_devices is not None and memory is None:
        raise DnoError(f"--devices {num_devices} are not asked for their memory: add --memory, such as --memory 16GiB")
    mesh = make_mesh(config.mesh) if num_devices is None else abstract_mesh(config.mesh, num_devices)
    model_config, tokenizer = read_shape(config), load_tokenizer(config.model)
    programs = Programs(config, model_config, mesh)
    check_fit(config, model_config=model_config, tokenizer=tokenizer, row_shards=programs.texts_in_step)
    split = split_prompts(config)
    tokenize = functools.cache(functools.partial(tokenize_prompts, tokenizer=tokenizer, config=config))
    counts = _prompt_counts(config, split, tokenize)
    return RunPlan(
        config=config,
        model_config=model_config,
        mesh=mesh,
        counts=counts,
        sampling=_plan_sampling(programs, counts, memory=memory),
        annotation=plan_annotation(
            config,
            split=split,
            tokenize=lambda part: tokenize(part)[0],
            count=tokenizer.num_tokens,
            response_tokens=response_tokens,
            reply_tokens=reply_tokens,
        ),
    )


def _prompt_counts(config: RunConfig, split: PromptSplit, tokenize: Tokenize) -> dict[str, PromptCount]:
    section = config.sampling
    own = 0 if section.source == "data" else section.num_samples + section.num_opponents

    def count(part: tuple[Prompt, ...], num_samples: int) -> PromptCount:
        kept, dropped = tokenize(part)
        return PromptCount(
            prompts=len(kept),
            prompt_tokens=sum(len(item.token_ids) for item in kept),
            dropped=dropped.total(),
            responses=len(kept) * num_samples,
            response_tokens=num_samples * sum(section.response_limit(len(item.token_ids)) for item in kept),
            shards=math.ceil(len(kept) / section.shard_prompts),
        )

    counts = {f"iteration {iteration}": count(part, own) for iteration, part in enumerate(split.training)}
    if split.held_out:
        counts["held out"] = count(split.held_out, config.evaluation.num_samples)
    return counts


def _plan_sampling(
    programs: Programs[RunConfig], counts: dict[str, PromptCount], *, memory: int | None
) -> dict[str, SlotPlan]:
    config, mesh = programs.config, programs.mesh
    here = mesh.local_devices if isinstance(mesh, Mesh) else []
    capacity = device_capacity(here) if memory is None else Capacity(memory, "--memory")
    platform = here[0].platform if here else None
    most = max(count.prompts for name, count in counts.items() if name != "held out")
    held_out = counts["held out"].prompts if "held out" in counts else 0
    plans = {}
    for stage, wanted in wanted_by_stage(config, num_prompts=most, num_held_out=held_out).items():
        try:
            plans[stage] = plan_on(programs, wanted, mesh=mesh, capacity=capacity, platform=platform)
        except DnoError as error:
            raise DnoError(f"{stage}: {error}") from None
    return plans


def render(plan: RunPlan) -> RenderableType:
    """Show a plan to a person."""
    config, model, mesh = plan.config, plan.model_config, plan.mesh
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))
    trained = f"{parameters:,} parameters"
    if (adapter := trained_adapter(config, model)) is not None:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_adapters(model, adapter)))
        trained += f", of adapters of rank {adapter.rank} beside them {count:,}, which are trained"
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    shape = (
        f"model: {model.family}, {trained}, computed in {config.model.dtype}\n"
        f"mesh: {axes}; devices: {mesh.size:,}; row shards: {num_row_shards(mesh):,}\n"
    )
    tables = [_count_table(plan.counts)]
    if plan.sampling:
        tables.append(_sampling_table(plan))
    costs = [] if plan.annotation is None else cost_tables(plan.annotation)
    return Group(Text(shape), *tables, *costs)


def _count_table(counts: dict[str, PromptCount]) -> Table:
    table = _table("prompts, and at most so many response tokens")
    for column in ("prompts", "dropped", "prompt tokens", "responses", "response tokens", "shards"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, count in counts.items():
        numbers = (count.prompts, count.dropped, count.prompt_tokens, count.responses, count.response_tokens)
        table.add_row(name, *(f"{number:,}" for number in numbers), f"{count.shards:,}")
    return table


def _sampling_table(plan: RunPlan) -> Table:
    stages, shards = plan.sampling, num_row_shards(plan.mesh)
    capacity = next(iter(stages.values())).capacity
    table = _table(f"sampling, on devices of {show_bytes(capacity.bytes)} ({capacity.source})")
    for stage in stages:
        table.add_column(stage, justify="right", no_wrap=True)

    def row(name: str, cell: Callable[[SlotPlan], str], *, end_section: bool = False) -> None:
        table.add_row(name, *(cell(slots) for slots in stages.values()), end_section=end_section)

    row("slots on each row shard", lambda slots: f"{slots.slots:,}")
    row("decided by", lambda slots: slots.chosen_by)
    row("slots that would fit", lambda slots: f"{slots.most_slots:,}")
    row("rows decoded at once", lambda slots: f"{slots.slots * shards:,}")
    row("prompts in the queue", lambda slots: f"{slots.queue_entries:,}", end_section=True)
    row("policies in memory", lambda slots: f"{slots.loaded_policies}")
    row("draws in turn", lambda slots: f"{1 + len(slots.beside)}")
    row("layers x key heads x head_dim", lambda _: _head_numbers(plan))
    row("keys and values in", lambda slots: slots.programs.shape.kv_dtype)
    row("tokens of a slot", lambda slots: f"{slots.programs.num_slots:,}")
    row("one slot", lambda slots: show_bytes(slots.slot_bytes))
    row("tokens of a queued prompt", lambda slots: f"{slots.programs.shape.prompt_length:,}")
    row("one queued prompt", lambda slots: show_bytes(slots.entry_bytes), end_section=True)
    for part in next(iter(stages.values())).parts:
        row(part, lambda slots, part=part: show_bytes(slots.parts[part]))
    row("total of a device", lambda slots: show_bytes(slots.total))
    row("reserve", lambda slots: show_bytes(slots.capacity.reserve))
    row("free", lambda slots: show_bytes(slots.capacity.usable - slots.total))
    return table


def _head_numbers(plan: RunPlan) -> str:
    model, tensor = plan.model_config, plan.mesh.shape["tensor"]
    return f"{model.num_hidden_layers} x {model.num_key_value_heads // tensor} x {model.head_dim}"


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    return table
