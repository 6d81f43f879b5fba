"""What a run takes and whether it fits, before it starts: of its configuration, the model's shape and prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dno_jax.config import RunConfig
from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.parallel.mesh import own_submesh
from dno_jax.parallel.sharding import DECODE, AnyMesh
from dno_jax.plan.annotation import AnnotationPlan, plan_annotation
from dno_jax.plan.compiled import Figures, Job, compile_all
from dno_jax.plan.roofline import Load, Time, decode_load, prefill_load, score_load, time_of, train_load
from dno_jax.plan.shape import Shape, shape_of
from dno_jax.plan.texts import Texts, texts_of
from dno_jax.plan.topology import Target, target_of
from dno_jax.records import Prompt
from dno_jax.runtime.arguments import (
    Call,
    decode_call,
    fill_call,
    largest,
    longest_texts,
    score_call,
    score_plan,
    train_call,
    train_plan,
)
from dno_jax.runtime.decode_mesh import with_decode_mesh
from dno_jax.runtime.fit import check_fit, check_shape
from dno_jax.runtime.programs import ConfigT, Programs
from dno_jax.runtime.slots import plan_on, wanted_by_stage
from dno_jax.runtime.training_memory import TrainingMemory, training_memory
from dno_jax.sampling.memory import SlotPlan

_MANY = 1 << 20  # prompts, where nobody says how many there are


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for beside the configuration.

    Attributes:
        topology, num_devices, memory: devices to plan for; see `target_of`.
        model: a bundled shape in place of model.path.
        num_prompts: assumed in place of those of the files.
        compiled: whether the programs of a topology are compiled.
        response_tokens, reply_tokens: of a response that is read, and of what a judge replies; None: the longest.
        price_per_hour: dollars of one device.
        mfu, tokens_per_second: measured elsewhere, in place of the roofline's.
        cache: where compiled figures are remembered; None: nowhere.
    """

    topology: str | None = None
    num_devices: int | None = None
    memory: int | None = None
    model: str | None = None
    num_prompts: int | None = None
    compiled: bool = True
    response_tokens: int | None = None
    reply_tokens: int | None = None
    price_per_hour: float | None = None
    mfu: float | None = None
    tokens_per_second: float | None = None
    cache: Path | None = None


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
class ProgramPlan:
    """One program of the run.

    Attributes:
        closed: bytes of a device by arithmetic, by what they hold.
        load: of one run on one device.
        time: of one run; None where the chip is not known.
        fits: whether a device has room for it.
    """

    figures: Figures
    closed: Mapping[str, int]
    load: Load
    time: Time | None
    fits: bool


@dataclass(frozen=True)
class RunPlan:
    """
    Attributes:
        config: with all that the plan settled.
        counts: by "iteration 0" and so on, and "held out"; empty where prompts are not known.
        sampling: slots of every stage that samples, by its name.
        submeshes: parts of the mesh that sample apart.
        training: bytes of a device, by arithmetic.
        programs: train, score, prefill and decode; without decoding where nothing is sampled.
        annotation: what judges and teachers cost; None where nobody is paid.
        notes: what was assumed.
    """

    config: RunConfig
    asked: Asked
    shape: Shape
    target: Target
    mesh: AnyMesh
    counts: dict[str, PromptCount]
    sampling: dict[str, SlotPlan]
    submeshes: int
    training: TrainingMemory
    programs: dict[str, ProgramPlan]
    annotation: AnnotationPlan | None
    notes: tuple[str, ...] = field(default=())

    @property
    def model_config(self) -> ModelConfig:
        return self.shape.config

    @property
    def num_rows(self) -> int:
        """Pairs of an iteration's training, one of a prompt; many, where prompts are not known."""
        return max((count.prompts for name, count in self.counts.items() if name != "held out"), default=_MANY)


def plan_run(
    config: RunConfig,
    *,
    memory: int | None = None,
    num_devices: int | None = None,
    response_tokens: int | None = None,
    reply_tokens: int | None = None,
    asked: Asked | None = None,
) -> RunPlan:
    """Plan a run on this machine's devices, or on others.

    Args:
        memory, num_devices, response_tokens, reply_tokens: of `asked`, where that is None.

    What does not fit into memory is planned too: `refuse` of `plan.search` says so, and what fits.

    Raises:
        DnoError: whatever does not fit together; no slot fits.
    """
    asked = asked or Asked(
        num_devices=num_devices, memory=memory, response_tokens=response_tokens, reply_tokens=reply_tokens
    )
    target = target_of(asked.topology, num_devices=asked.num_devices, memory=asked.memory, compiled=asked.compiled)
    shape = shape_of(config, asked.model)
    programs = programs_on(config, shape, target)
    config = programs.config
    texts = texts_of(config, num_prompts=asked.num_prompts, named_shape=asked.model is not None)
    if texts.tokenizer is None:
        check_shape(config, model_config=shape.config, row_shards=programs.texts_in_step)
    else:
        check_fit(config, model_config=shape.config, tokenizer=texts.tokenizer, row_shards=programs.texts_in_step)
    counts = _prompt_counts(config, texts)
    most = max((count.prompts for name, count in counts.items() if name != "held out"), default=_MANY)
    training = training_memory(programs, num_rows=most)
    sampling, submeshes = _plan_sampling(programs, counts, target, shape, texts, most)
    compiled = asked.topology is not None and asked.compiled and target.devices is not None
    notes = [note for note in (target.note, texts.note) if note]
    return RunPlan(
        config=config,
        asked=asked,
        shape=shape,
        target=target,
        mesh=programs.mesh,
        counts=counts,
        sampling=sampling,
        submeshes=submeshes,
        training=training,
        programs=plan_programs(programs, sampling, target, asked=replace(asked, compiled=compiled), num_rows=most),
        annotation=_annotation(config, texts, asked),
        notes=tuple(notes),
    )


def programs_on(config: ConfigT, shape: Shape, target: Target) -> Programs[ConfigT]:
    """Return the run's programs on the devices that are planned for.

    Raises:
        DnoError: the mesh does not fit them, or the model the mesh.
    """
    mesh = target.mesh(config.mesh)
    if target.platform != "cpu":
        config = with_decode_mesh(config, shape.config, mesh=mesh, capacity=target.capacity)
    return Programs(config, shape.config, mesh)


def _annotation(config: RunConfig, texts: Texts, asked: Asked) -> AnnotationPlan | None:
    if texts.split is None:
        return None
    return plan_annotation(
        config,
        split=texts.split,
        tokenize=lambda part: texts.tokenized(part)[0],
        count=texts.count,
        response_tokens=asked.response_tokens,
        reply_tokens=asked.reply_tokens,
    )


def _prompt_counts(config: RunConfig, texts: Texts) -> dict[str, PromptCount]:
    section = config.sampling
    own = 0 if section.source == "data" else section.num_samples + section.num_opponents

    def count(part: tuple[Prompt, ...], num_samples: int) -> PromptCount:
        kept, dropped = texts.tokenized(part)
        return PromptCount(
            prompts=len(kept),
            prompt_tokens=sum(len(item.token_ids) for item in kept),
            dropped=dropped.total(),
            responses=len(kept) * num_samples,
            response_tokens=num_samples * sum(section.response_limit(len(item.token_ids)) for item in kept),
            shards=math.ceil(len(kept) / section.shard_prompts),
        )

    if texts.split is None:
        return {}
    counts = {f"iteration {iteration}": count(part, own) for iteration, part in enumerate(texts.split.training)}
    if texts.split.held_out:
        counts["held out"] = count(texts.split.held_out, config.evaluation.num_samples)
    return counts


def _plan_sampling(
    programs: Programs[RunConfig],
    counts: dict[str, PromptCount],
    target: Target,
    shape: Shape,
    texts: Texts,
    most: int,
) -> tuple[dict[str, SlotPlan], int]:
    config, mesh, submeshes = programs.config, programs.decode_mesh, 1
    # libtpu compiles for whole slices alone; a device has the same in both.
    if isinstance(mesh, Mesh) and target.platform != "tpu":
        submesh = own_submesh(mesh)
        mesh, submeshes = submesh.mesh, submesh.count
    held_out = counts["held out"].prompts if "held out" in counts else config.prompts.held_out
    wanted = wanted_by_stage(config, num_prompts=-(-most // submeshes), num_held_out=-(-held_out // submeshes))
    ids = texts.tokenizer.vocab_size if texts.tokenizer else None
    ends = texts.tokenizer.end_ids if texts.tokenizer else shape.end_ids
    plans = {}
    for stage, one in wanted.items():
        try:
            found = plan_on(programs, one, mesh=mesh, capacity=target.capacity, platform=target.platform)
        except DnoError as error:
            raise DnoError(f"{stage}: {error}") from None
        drawn = replace(found.programs.sampling_params, end_ids=ends, num_ids=ids)
        plans[stage] = replace(found, programs=replace(found.programs, sampling_params=drawn))
    return plans, submeshes


def plan_programs(
    programs: Programs[Any],
    sampling: Mapping[str, SlotPlan],
    target: Target,
    *,
    asked: Asked,
    num_rows: int = 0,
    only: tuple[str, ...] | None = None,
) -> dict[str, ProgramPlan]:
    """Say what each program takes: compiled, or by arithmetic.

    Args:
        num_rows: pairs of a training: longer ones have their batches cut closer.
        only: these, of train, score, prefill and decode; None: all.
    """
    config = programs.config
    lengths = longest_texts(programs, num_rows=max(num_rows, config.training.batch_size))
    shapes = {"train": largest(train_plan(programs, lengths)), "score": largest(score_plan(programs, lengths))}
    slots = sampling.get("sample") or next(iter(sampling.values()), None)

    def of(model: ModelConfig) -> Programs[Any]:
        return replace(programs, model_config=model)

    def slots_of(model: ModelConfig) -> SlotPlan:
        assert slots is not None
        decoder = of(model).model(DECODE, mesh=slots.programs.mesh)
        return replace(slots, programs=replace(slots.programs, model=decoder))

    calls: dict[str, Callable[[ModelConfig], Call]] = {
        "train": lambda model: train_call(of(model), shapes["train"]),
        "score": lambda model: score_call(of(model), shapes["score"]),
        "prefill": lambda model: fill_call(of(model), slots_of(model)),
        "decode": lambda model: decode_call(of(model), slots_of(model)),
    }
    names = [name for name in calls if (only is None or name in only) and (slots is not None or name in shapes)]
    training = training_memory(programs, num_rows=len(lengths))
    closed = {name: _closed(name, programs, slots, training) for name in names}
    if asked.compiled:
        jobs = [Job(name, programs.model_config, calls[name], unrolled=name in ("prefill", "decode")) for name in names]
        figures = compile_all(jobs, cache=asked.cache)
    else:
        figures = {name: _estimated(closed[name]) for name in names}
    batch = longest_texts(programs, num_rows=config.training.batch_size)
    part = longest_texts(programs, num_rows=config.training.micro_batch_size or config.training.batch_size)
    found = {}
    for name in names:
        if name == "train":
            load = train_load(programs, batch, train_call(programs, shapes["train"]))
        elif name == "score":
            load = score_load(programs, part)
        else:
            assert slots is not None
            load = prefill_load(slots) if name == "prefill" else decode_load(slots)
        if asked.compiled and name in ("train", "score"):
            sent = figures[name].collectives
            load = replace(load, sent=float(sum(one.bytes for one in sent)), messages=sum(one.runs for one in sent))
        time = None
        if target.chip is not None:
            time = time_of(load, target.chip, mfu=asked.mfu if name in ("train", "score") else None)
        one = figures[name]
        fits = not one.refused and one.peak <= target.capacity.bytes
        found[name] = ProgramPlan(one, closed[name], load, time, fits)
    return found


def _closed(name: str, programs: Programs[Any], slots: SlotPlan | None, training: TrainingMemory) -> dict[str, int]:
    if name == "train":
        return dict(training.parts)
    if name == "score":
        shape = largest(score_plan(programs, longest_texts(programs, num_rows=programs.config.training.batch_size)))
        activations = training.parts["activations"] // programs.model_config.num_hidden_layers
        return {**score_call(programs, shape).parts, "activations": activations}
    assert slots is not None
    parts = slots.parts
    names = {"weights": "parameters", "slots": "KV cache"}
    return {names.get(part, part): size for part, size in parts.items()}


def _estimated(closed: Mapping[str, int]) -> Figures:
    beside = ("gradients", "activations", "temporaries")
    parts = {name: size for name, size in closed.items() if name not in beside}
    return Figures(parts, sum(closed.get(name, 0) for name in beside), sum(closed.values()), "estimated")
