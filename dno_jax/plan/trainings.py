"""What a training takes that is no iteration of a run, and whether it fits: of `dno sft` and `dno reward`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dno_jax.config import RewardConfig, SftConfig
from dno_jax.data.reading import Reading, examples_of
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.parallel.sharding import AnyMesh
from dno_jax.plan.run import Asked, ProgramPlan, plan_programs, programs_on
from dno_jax.plan.shape import Shape, shape_of
from dno_jax.plan.texts import has_tokenizer
from dno_jax.plan.topology import Target, target_of
from dno_jax.runtime.fit import check_fit, check_shape
from dno_jax.runtime.runtime import load_tokenizer
from dno_jax.runtime.training_memory import TrainingMemory, training_memory
from dno_jax.sampling.memory import SlotPlan
from dno_jax.stages.reward import held_out_prompts, labelled_of


@dataclass(frozen=True)
class Rows:
    """Examples or pairs, those that are found too long included.

    Attributes:
        trained: None where nobody says how many.
        held_out: pairs that are measured by.
        note: what was assumed, or why they are not known.
    """

    trained: int | None
    held_out: int = 0
    note: str = ""


@dataclass(frozen=True)
class TrainingPlan:
    """
    Attributes:
        rows: what is trained on.
        training: bytes of a device, by arithmetic.
        programs: train; of a reward model that pairs are held out for, score.
        notes: what was assumed.
    """

    config: SftConfig | RewardConfig
    asked: Asked
    shape: Shape
    target: Target
    mesh: AnyMesh
    rows: Rows
    training: TrainingMemory
    programs: dict[str, ProgramPlan]
    notes: tuple[str, ...]

    @property
    def model_config(self) -> ModelConfig:
        return self.shape.config

    @property
    def num_rows(self) -> int | None:
        return self.rows.trained

    @property
    def sampling(self) -> Mapping[str, SlotPlan]:
        """Nothing is sampled."""
        return {}

    @property
    def what(self) -> str:
        return "examples" if isinstance(self.config, SftConfig) else "pairs"


def plan_training(config: SftConfig | RewardConfig, *, asked: Asked) -> TrainingPlan:
    """Plan a training on this machine's devices, or on others.

    Raises:
        DnoError: whatever does not fit together; or a question that concerns sampling or judges.
    """
    for name in ("response_tokens", "reply_tokens", "tokens_per_second"):
        if getattr(asked, name) is not None:
            command = "dno sft" if isinstance(config, SftConfig) else "dno reward"
            raise DnoError(f"--{name.replace('_', '-')}: nothing is sampled or judged by `{command}`; leave it out")
    target = target_of(asked.topology, num_devices=asked.num_devices, memory=asked.memory, compiled=asked.compiled)
    shape = shape_of(config, asked.model)
    programs = programs_on(config, shape, target)
    if asked.model is None and has_tokenizer(config.model):
        tokenizer = load_tokenizer(config.model)
        check_fit(config, model_config=shape.config, tokenizer=tokenizer, row_shards=programs.texts_in_step)
    else:
        check_shape(config, model_config=shape.config, row_shards=programs.texts_in_step)
    rows = _rows(config, asked)
    training = training_memory(programs, num_rows=rows.trained)
    compiled = asked.topology is not None and asked.compiled and target.devices is not None
    names = ("train", "score") if isinstance(config, RewardConfig) and config.pairs.held_out else ("train",)
    found = plan_programs(
        programs, {}, target, asked=replace(asked, compiled=compiled), num_rows=rows.trained or 0, only=names
    )
    notes = tuple(note for note in (target.note, rows.note) if note)
    return TrainingPlan(config, asked, shape, target, programs.mesh, rows, training, found, notes)


def _rows(config: SftConfig | RewardConfig, asked: Asked) -> Rows:
    """Count what is trained on; raises as the training does, unless the shape is a bundled one."""
    if asked.num_prompts is not None:
        return Rows(asked.num_prompts, note=f"{asked.num_prompts:,} rows are assumed")
    try:
        if isinstance(config, SftConfig):
            section = config.data
            reading = Reading(section.path)
            return Rows(sum(1 for _ in examples_of(read_rows(section.path), reading, turns=section.turns)))
        pairs = labelled_of(config).pairs
        aside = held_out_prompts(pairs, config.pairs.held_out, seed=config.seed)
        held_out = sum(pair.prompt_id in aside for pair in pairs)
        return Rows(len(pairs) - held_out, held_out)
    except DnoError as error:
        if asked.model is None:
            raise
        return Rows(None, note=f"nothing was counted ({error}); --prompts N assumes so many rows")


def steps_of(plan: TrainingPlan) -> tuple[int, int]:
    """Return how often a training runs its step, and how often it scores held-out pairs."""
    section = plan.config.training
    size = section.micro_batch_size or section.batch_size
    return math.ceil((plan.rows.trained or 0) / section.batch_size) * section.num_epochs, -(-plan.rows.held_out // size)
