"""The smallest change that lets a program fit, and the settings that go fastest of those that do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dno_jax.config import AnyConfig, SftConfig
from dno_jax.errors import DnoError
from dno_jax.parallel.sharding import num_row_shards
from dno_jax.plan.roofline import time_of, train_load
from dno_jax.plan.run import ProgramPlan, RunPlan, plan_programs, programs_on
from dno_jax.plan.trainings import TrainingPlan
from dno_jax.runtime.arguments import largest, longest_texts, train_call, train_plan
from dno_jax.runtime.programs import Programs
from dno_jax.runtime.training_memory import overridden, refusal, smallest_change, training_memory
from dno_jax.sampling.memory import show_bytes

MOST_COMPILES = 6
AnyPlan = RunPlan | TrainingPlan


def refuse(plan: AnyPlan, found: Found | None = None) -> None:
    """
    Args:
        found: settings that fit, where they were searched.

    Raises:
        DnoError: a program does not fit; the message says by how much, and the smallest change that fits.
    """
    lacking = [name for name, one in plan.programs.items() if not one.fits]
    if lacking:
        raise DnoError(_suggestion(plan, lacking, found))


def _suggestion(plan: AnyPlan, lacking: list[str], found: Found | None) -> str:
    lines = []
    training = plan.programs["train"].figures.source == "estimated"
    for name in lacking:
        if training and found is None and name in ("train", "score"):
            continue  # told by arithmetic below
        one = plan.programs[name]
        said = f"; {one.figures.refused}" if one.figures.refused else ""
        parts = {**one.figures.parts, "temporaries": one.figures.temporaries}
        taken = ", ".join(f"{part} {show_bytes(size)}" for part, size in parts.items() if 50 * size >= one.figures.peak)
        lines.append(
            f"{name} does not fit: {show_bytes(one.figures.peak)} of a device's "
            f"{show_bytes(plan.target.capacity.bytes)} ({plan.target.capacity.source}): {taken}{said}"
        )
    if "train" in lacking or "score" in lacking:
        if found is not None:
            lines.append(f"found by --search, and fits: {' '.join(found.overrides)}")
        elif training:
            lines.append(refusal(_programs(plan), plan.training, plan.target.capacity, num_rows=plan.num_rows))
        else:
            way = _verified(plan, "train" if "train" in lacking else "score")
            lines.append(
                "no change of micro batch, remat, chunk, moments, optimiser or adapters fits; take more devices"
                if way is None
                else f"the smallest change that fits, compiled: {' '.join(way)}"
            )
    if set(lacking) & {"decode", "prefill"}:
        slots = plan.sampling.get("sample") or next(iter(plan.sampling.values()))
        over = max(plan.programs[name].figures.peak for name in lacking if name in ("decode", "prefill"))
        fewer = slots.slots - -(-(over - plan.target.capacity.bytes) // slots.slot_bytes)
        tensor = slots.programs.mesh.shape["tensor"]
        lines.append(f"set sampling.slots={max(fewer, 1)}, or sampling.mesh.tensor={2 * tensor}")
    return "\n".join(lines)


def _verified(plan: AnyPlan, name: str) -> list[str] | None:
    """Return the smallest change with which the compiler finds room too."""
    programs = _programs(plan)
    scale = _scale(plan.programs[name], plan.training.total)
    for _ in range(MOST_COMPILES):
        way = smallest_change(programs, room=plan.target.capacity.bytes, scale=scale, num_rows=plan.num_rows)
        if way is None:
            return None
        found = _compiled(plan, overridden(programs.config, way), name)
        if found.fits:
            return way
        scale = max(1.05 * scale, _scale(found, training_memory(_programs(plan, way), num_rows=plan.num_rows).total))
    return None


def _scale(found: ProgramPlan, counted: int) -> float:
    return max(found.figures.peak / max(counted, 1), 0.5)


def _programs(plan: AnyPlan, overrides: list[str] | None = None) -> Programs[Any]:
    config = overridden(plan.config, overrides) if overrides else plan.config
    return programs_on(config, plan.shape, plan.target)


def _compiled(plan: AnyPlan, config: AnyConfig, name: str) -> ProgramPlan:
    programs = programs_on(config, plan.shape, plan.target)
    compiled = plan.target.devices is not None and plan.asked.topology is not None and plan.asked.compiled
    asked = replace(plan.asked, compiled=compiled)
    rows = plan.num_rows or 0
    return plan_programs(programs, plan.sampling, plan.target, asked=asked, num_rows=rows, only=(name,))[name]


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        overrides: of the fastest settings that fit.
        seconds: of a step with them; None where the chip is not known.
        peak: bytes of a device.
        compiles: how many it took.
        source: of the peak.
    """

    overrides: list[str]
    seconds: float | None
    peak: int
    compiles: int
    source: str


def search(plan: AnyPlan) -> Found:
    """Find the largest micro batch and the cheapest remat that fit, and as many slots.

    Candidates are ordered by what a step takes by roofline; those that fit by arithmetic, which each compilation
    corrects, are compiled until one fits.

    Raises:
        DnoError: none fits.
    """
    room, scale, compiles = plan.target.capacity.bytes, 1.0, 0
    own = plan.programs["train"]
    if own.figures.source == "compiled":
        scale = _scale(own, plan.training.total)
    slots = plan.sampling.get("sample")
    for overrides, programs, counted in sorted(_candidates(plan), key=lambda one: _seconds(plan, one[1])):
        if counted * scale > room or compiles >= MOST_COMPILES:
            continue
        compiles += 1
        found = _compiled(plan, programs.config, "train")
        scale = _scale(found, counted)
        if found.fits:
            chosen = [*overrides, *([f"sampling.slots={slots.slots}"] if slots else [])]
            seconds = None if found.time is None else found.time.seconds
            return Found(chosen, seconds, found.figures.peak, compiles, found.figures.source)
    way = smallest_change(_programs(plan), room=room, scale=scale, num_rows=plan.num_rows) or ["more devices"]
    raise DnoError(
        f"--search: no micro batch and remat fits {show_bytes(room)} of each device ({compiles} compiled); the next "
        f"change that may: {' '.join(way)}"
    )


def _candidates(plan: AnyPlan) -> Iterator[tuple[list[str], Programs[Any], int]]:
    programs = _programs(plan)
    section = plan.config.training
    shards = 1 if programs.packing.packed else num_row_shards(programs.mesh)
    texts = 1 if isinstance(plan.config, SftConfig) else 2
    for size in range(section.batch_size, 0, -1):
        if section.batch_size % size or texts * size % shards:
            continue
        for remat in ("none", "dots", "full"):
            overrides = [f"training.micro_batch_size={size}", f"model.remat={remat}"]
            changed = _programs(plan, overrides)
            yield overrides, changed, training_memory(changed, num_rows=plan.num_rows).total


def _seconds(plan: AnyPlan, programs: Programs[Any]) -> tuple[float, int]:
    lengths = longest_texts(programs, num_rows=programs.config.training.batch_size)
    call = train_call(programs, largest(train_plan(programs, lengths)))
    load, chip = train_load(programs, lengths, call), plan.target.chip
    seconds = load.executed + load.read if chip is None else time_of(load, chip).seconds
    return seconds, -(programs.config.training.micro_batch_size or 0)
