"""A run's programs, compiled for devices that need not be here: what they take of each, and what they send.

Nothing is run. What was compiled once is remembered by the text of the lowered program: a second plan of the
same is there at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from dno_jax.console import Meter
from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.model.config import ModelConfig
from dno_jax.model.stack import Section, is_uniform, sections
from dno_jax.plan.hlo import Collective, collectives
from dno_jax.runtime.arguments import Call

# Decoding goes layer by layer, so that its programs grow with their number: deeper ones are compiled at these two
# depths, and what a layer adds is added for the rest.
_DEPTHS = (2, 4)
_MOST_LAYERS = 8
_COUNTING = "2"  # another one where figures are read of a program in another way: what is remembered is read anew
_USED = re.compile(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm")


@dataclass(frozen=True)
class Figures:
    """What a program takes of one device, and sends.

    Attributes:
        parts: bytes of the arguments by what they hold.
        temporaries: bytes beside them, at the fullest moment.
        peak: of all, by the compiler.
        source: how it is known.
        fingerprint: of the lowered program; empty where depths were extrapolated.
        refused: what the compiler said, where it found no room; peak is then what it wanted, where it said so.
    """

    parts: Mapping[str, int]
    temporaries: int
    peak: int
    source: str
    collectives: tuple[Collective, ...] = ()
    fingerprint: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
        call: makes it, of a model's shape.
        unrolled: whether it grows with the model's layers.
    """

    name: str
    model: ModelConfig
    call: Callable[[ModelConfig], Call]
    unrolled: bool = False


def compile_all(jobs: list[Job], *, cache: Path | None = None) -> dict[str, Figures]:
    """Compile programs side by side, as far as there are processors."""
    if not jobs:
        return {}
    steps = [(job, depth) for job in jobs for depth in _depths(job)]
    found: dict[tuple[str, int], Figures] = {}
    with (
        Meter("plan", total=len(steps), unit="programs") as meter,
        ThreadPoolExecutor(max_workers=max(1, min(4, os.cpu_count() or 1))) as pool,
    ):
        waiting = []
        for job, depth in steps:
            call = job.call(_with_depth(job.model, depth))
            waiting.append((job.name, depth, pool.submit(_figures, call, call.lowered(), cache)))
        for name, depth, figures in waiting:
            found[name, depth] = figures.result()
            meter.advance(1, note=name)
    return {job.name: _joined([found[job.name, depth] for depth in _depths(job)], job) for job in jobs}


def _depths(job: Job) -> tuple[int, ...]:
    layers = job.model.num_hidden_layers
    found = sections(job.model.layer_mixers)
    # Layers that differ are added by whole patterns; where these change on the way, all are compiled.
    depths = tuple(len(found[0].mixers) * depth for depth in _DEPTHS) if is_uniform(job.model) else _periods(found)
    return depths if job.unrolled and layers > max(_MOST_LAYERS, *depths) else (layers,)


def _periods(found: tuple[Section, ...]) -> tuple[int, int]:
    width = len(found[0].mixers)
    return (width, 2 * width) if len(found) == 1 else (found[-1].end, found[-1].end)


def _with_depth(model: ModelConfig, layers: int) -> ModelConfig:
    if layers == model.num_hidden_layers:
        return model
    cut = {
        name: None if (each := getattr(model, name)) is None else each[:layers]
        for name in ("windows", "layer_ropes", "mixers")
    }
    return replace(model, num_hidden_layers=layers, **cut)


def fingerprint_of(lowered: Any) -> str:
    """Name a lowered program: equal ones are one program."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def _figures(call: Call, lowered: Any, cache: Path | None) -> Figures:
    fingerprint = fingerprint_of(lowered)
    place = None if cache is None else cache / f"{_key(fingerprint, call)}.json"
    if place is not None and place.exists():
        try:
            return _read(place)
        except (ValueError, KeyError, TypeError):
            place.unlink(missing_ok=True)
    try:
        figures = _measured(call, lowered.compile(), fingerprint)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise DnoError(f"the compiler refused a program: {str(error).strip()[:400]}") from None
        figures = _refused(call, str(error), fingerprint)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps(asdict(figures)))
    return figures


def _measured(call: Call, compiled: Any, fingerprint: str) -> Figures:
    memory, parts = compiled.memory_analysis(), call.parts
    arguments = int(memory.argument_size_in_bytes)
    whole = arguments + int(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)
    # XLA for CPUs names a peak that leaves temporaries out.
    told = 0 if _device(call).platform == "cpu" else int(memory.peak_memory_in_bytes)
    peak = max(told or whole, arguments)
    # Padding to tiles is nobody's in particular; arguments that a program does not read are left out.
    parts = {**parts, "padded, or not read": arguments - sum(parts.values())}
    return Figures(parts, peak - arguments, peak, "compiled", tuple(collectives(compiled.as_text() or "")), fingerprint)


def _refused(call: Call, said: str, fingerprint: str) -> Figures:
    parts, used = call.parts, _USED.search(said)
    held = sum(parts.values())
    peak = held if used is None else max(held, _bytes(used[1]))
    line = "the compiler found no room" if used is None else f"the compiler wants {used[1]}B of {used[2]}B"
    return Figures(parts, peak - held, peak, "compiled", (), fingerprint, refused=line)


def _bytes(text: str) -> int:
    power = " KMGT".index(text[-1]) if text[-1] in "KMGT" else 0
    return int(float(text.rstrip("KMGT")) * 1024**power)


def _joined(found: list[Figures], job: Job) -> Figures:
    """Add for every layer that was not compiled what one of those between the two depths added."""
    if len(found) == 1:
        return found[0]
    few, more = found
    first, second = _depths(job)
    rest = (job.model.num_hidden_layers - second) / (second - first)

    def grown(a: int, b: int) -> int:
        return int(b + rest * (b - a))

    parts = {name: grown(few.parts.get(name, 0), size) for name, size in more.parts.items()}
    before = {one.kind: one for one in few.collectives}
    sent = tuple(
        replace(
            one,
            runs=grown(before.get(one.kind, Collective(one.kind)).runs, one.runs),
            bytes=grown(before.get(one.kind, Collective(one.kind)).bytes, one.bytes),
            looped=grown(before.get(one.kind, Collective(one.kind)).looped, one.looped),
        )
        for one in more.collectives
    )
    peak = grown(few.peak, more.peak)
    source = f"compiled at {first} and {second} layers, extrapolated to {job.model.num_hidden_layers}"
    return Figures(parts, peak - sum(parts.values()), peak, source, sent, "", more.refused or few.refused)


def _key(fingerprint: str, call: Call) -> str:
    """Name what was compiled: the program, for which devices, by which compiler."""
    device = _device(call)
    versions = [jax.__version__, *map(_version, ("libtpu", "jax-cuda13-plugin"))]
    text = [_COUNTING, fingerprint, device.platform, device.device_kind, os.environ.get("XLA_FLAGS", ""), *versions]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _device(call: Call) -> Any:
    """One of those that the program is for."""
    place = next(leaf.sharding for leaf in jax.tree.leaves(call.arguments) if leaf.sharding is not None)
    return place.mesh.devices.flat[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(place: Path) -> Figures:
    tree = json.loads(place.read_text())
    return Figures(**tree | {"collectives": tuple(Collective(**one) for one in tree["collectives"])})
