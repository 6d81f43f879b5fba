"""A plan as tables for a person, and as JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dno_jax.config import RewardConfig, RunConfig, SftConfig
from dno_jax.model.params import abstract_adapters, abstract_params
from dno_jax.model.sizes import attention_layers
from dno_jax.parallel.sharding import num_row_shards
from dno_jax.plan.costs import cost_tables
from dno_jax.plan.roofline import BUSY, SHARES
from dno_jax.plan.run import PromptCount, RunPlan
from dno_jax.plan.search import AnyPlan, Found
from dno_jax.plan.totals import Totals, pairs_per_prompt, totals
from dno_jax.plan.trainings import TrainingPlan
from dno_jax.runtime.fit import trained_adapter
from dno_jax.sampling.memory import SlotPlan, show_bytes

_OF_JUDGES = ("judge\nrequests", "judge\ntokens", "judge\ndollars", "dollars")


def render(plan: AnyPlan, *, found: Found | None = None) -> RenderableType:
    """Show a plan to a person.

    Args:
        found: by a search.
    """
    tables: list[RenderableType] = [Text(_heading(plan))]
    if isinstance(plan, RunPlan) and plan.counts:
        tables.append(_count_table(plan.counts))
    if isinstance(plan, RunPlan) and plan.sampling:
        tables.append(_sampling_table(plan))
    tables += [_memory_table(plan), _time_table(plan)]
    if any(one.figures.collectives for one in plan.programs.values()):
        tables.append(_collective_table(plan))
    tables.append(Text(_assumptions(plan)))
    if isinstance(plan, RunPlan) and plan.annotation is not None:
        tables += cost_tables(plan.annotation)
    if (whole := totals(plan)) is not None:
        tables += _total_tables(plan, whole)
    if found is not None:
        tables.append(Text(_found_text(found)))
    return Group(*tables)


def _heading(plan: AnyPlan) -> str:
    config, model, mesh = plan.config, plan.model_config, plan.mesh
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))
    trained = f"{parameters:,} parameters"
    if (adapter := trained_adapter(config, model)) is not None:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_adapters(model, adapter)))
        trained += f", of adapters of rank {adapter.rank} beside them {count:,}, which are trained"
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"model: {model.family}, {trained}, computed in {config.model.dtype}",
        f"mesh: {axes}; devices: {mesh.size:,}; row shards: {num_row_shards(mesh):,}",
    ]
    if isinstance(plan, RunPlan) and plan.config.sampling.mesh is not None and plan.sampling:
        decoding = next(iter(plan.sampling.values())).programs.mesh
        own = " ".join(f"{axis}={size}" for axis, size in decoding.shape.items())
        parts = f", {plan.submeshes} times over" if plan.submeshes > 1 else ""
        lines.append(f"decoding mesh: {own}{parts}")
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)]) + "\n"


def _count_table(counts: dict[str, PromptCount]) -> Table:
    table = _table("prompts, and at most so many response tokens")
    for column in ("prompts", "dropped", "prompt tokens", "responses", "response tokens", "shards"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, count in counts.items():
        numbers = (count.prompts, count.dropped, count.prompt_tokens, count.responses, count.response_tokens)
        table.add_row(name, *(f"{number:,}" for number in numbers), f"{count.shards:,}")
    return table


def _sampling_table(plan: RunPlan) -> Table:
    stages = plan.sampling
    shards = num_row_shards(next(iter(stages.values())).programs.mesh) * plan.submeshes
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
    row("layers x key heads x head_dim", lambda slots: _head_numbers(slots))
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


def _head_numbers(slots: SlotPlan) -> str:
    model, tensor = slots.programs.model.config, slots.programs.mesh.shape["tensor"]
    return f"{attention_layers(model)} x {model.num_key_value_heads // tensor} x {model.head_dim}"


def _memory_table(plan: AnyPlan) -> Table:
    capacity = plan.target.capacity
    table = _table(
        f"bytes of a device, of {show_bytes(capacity.bytes)} ({capacity.source}); in brackets by arithmetic alone"
    )
    for name in plan.programs:
        table.add_column(name, justify="right", no_wrap=True)
    programs = list(plan.programs.values())
    table.add_row("", *(one.figures.source.split(" to ")[0].replace(" layers, extrapolated", "") for one in programs))
    parts = dict.fromkeys(part for one in programs for part in one.figures.parts)
    for part in parts:
        cells = [_pair(one.figures.parts.get(part), one.closed.get(part)) for one in programs]
        table.add_row(part, *cells)
    beside = ("gradients", "activations", "temporaries")
    lower = [sum(one.closed.get(part, 0) for part in beside) for one in programs]
    cells = [_pair(one.figures.temporaries, low) for one, low in zip(programs, lower, strict=True)]
    table.add_row("gradients, activations, temporaries", *cells, end_section=True)
    table.add_row("peak", *(_pair(one.figures.peak, sum(one.closed.values())) for one in programs))
    table.add_row("fits", *("yes" if one.fits else "NO" for one in programs))
    return table


def _pair(size: int | None, closed: int | None) -> str:
    if size is None:
        return "" if closed is None else f"({show_bytes(closed)})"
    return show_bytes(size) + ("" if closed is None or closed == size else f" ({show_bytes(closed)})")


def _time_table(plan: AnyPlan) -> Table:
    decode = "; decode: one token of every slot" if "decode" in plan.programs else ""
    table = _table(f"one run of each program{decode}")
    for name in plan.programs:
        table.add_column(name, justify="right", no_wrap=True)
    programs = list(plan.programs.values())
    table.add_row("FLOPs of a device", *(f"{one.load.needed:.3g}" for one in programs))
    table.add_row("with what is computed again", *(f"{one.load.executed:.3g}" for one in programs))
    table.add_row("bytes read", *(show_bytes(int(one.load.read)) for one in programs))
    table.add_row("bytes sent", *(show_bytes(int(one.load.sent)) for one in programs), end_section=True)
    times = [one.time for one in programs]
    table.add_row("seconds, estimated", *("-" if time is None else f"{time.seconds:.3g}" for time in times))
    table.add_row("decided by", *("-" if time is None else time.bound for time in times))
    table.add_row("MFU", *("-" if time is None else f"{time.mfu:.1%}" for time in times))
    table.add_row("MBU", *("-" if time is None else f"{time.mbu:.1%}" for time in times))
    return table


def _collective_table(plan: AnyPlan) -> Table:
    table = _table("sent between devices, by the compiled programs: runs, bytes of all, and the largest")
    for column in ("kind", "runs", "in loops", "bytes", "largest", "of shape"):
        table.add_column(column, justify="left" if column in ("kind", "of shape") else "right", no_wrap=True)
    for name, one in plan.programs.items():
        for sent in one.figures.collectives:
            numbers = (f"{sent.runs:,}", f"{sent.looped:,}", show_bytes(sent.bytes), show_bytes(sent.largest))
            table.add_row(name, sent.kind, *numbers, sent.shape)
    return table


def _assumptions(plan: AnyPlan) -> str:
    shares = ", ".join(f"{share:.0%} of {name}" for name, share in SHARES.items())
    chip = plan.target.chip
    half = "; decoding, half of that on average" if "decode" in plan.programs else ""
    lines = [f"All texts are taken to be as long as they may be{half}."]
    if chip is None:
        lines.append("No times: what these devices can do is not known; --topology names some that are.")
    else:
        busy = f", {BUSY:.0%} of slots busy" if "decode" in plan.programs else ""
        lines.append(
            f"Times are a roofline, no measurement: {shares}{busy}; a {chip.name} does "
            f"{chip.flops / 1e12:,.0f} TFLOP/s in bfloat16, reads {chip.bandwidth / 1e12:.2f} TB/s and sends "
            f"{chip.link / 1e9:,.0f} GB/s (makers' data sheets)."
        )
    return "\n".join(lines) + "\n"


def _total_tables(plan: AnyPlan, whole: Totals) -> list[RenderableType]:
    if isinstance(plan, TrainingPlan):
        aside = f", and {plan.rows.held_out:,} held out" if plan.rows.held_out else ""
        table = _table(f"the training, on {whole.pairs:,} {plan.what}{aside}")
    else:
        table = _table(f"the run, with {pairs_per_prompt(plan.config):g} pairs a prompt: {whole.pairs:,} pairs")
    for column in ("steps or calls", "hours"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, stage in whole.stages.items():
        table.add_row(name, f"{stage.runs:,}", _number(stage.hours))
    lying = _table("disk")
    lying.add_column("bytes", justify="right", no_wrap=True)
    for name, size in whole.disk.items():
        lying.add_row(name, show_bytes(size))
    total = Table(title="total", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    cells = {
        "hours": _number(whole.hours),
        "device\nhours": _number(whole.device_hours),
        "their\ndollars": _number(whole.usd),
        "judge\nrequests": f"{whole.requests:,}",
        "judge\ntokens": f"{whole.tokens:,}",
        "judge\ndollars": _number(whole.judge_usd),
        "dollars": _number(whole.total_usd),
        "disk": show_bytes(sum(whole.disk.values())),
    }
    if isinstance(plan, TrainingPlan):
        cells = {name: cell for name, cell in cells.items() if name not in _OF_JUDGES}
    for column in cells:
        total.add_column(column, justify="right", no_wrap=True)
    total.add_row(*cells.values())
    return [table, lying, total]


def _number(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:,.2f}" if amount < 1_000 else f"{amount:,.0f}"


def _command(plan: AnyPlan) -> str:
    return {RunConfig: "dno run", SftConfig: "dno sft", RewardConfig: "dno reward"}[type(plan.config)]


def _found_text(found: Found) -> str:
    seconds = "" if found.seconds is None else f", {found.seconds:.3g} s a step by roofline"
    return (
        f"search: {' '.join(found.overrides)} fits with {show_bytes(found.peak)} ({found.source}; "
        f"{found.compiles} tried){seconds}"
    )


def command_of(plan: AnyPlan, found: Found, arguments: Sequence[str]) -> str:
    """Return the command that runs what a search found: what it sets anew is set once.

    Args:
        arguments: of the command that was planned.
    """
    fields = {override.partition("=")[0] for override in found.overrides}
    kept = [argument for argument in arguments if argument.partition("=")[0] not in fields]
    return f"{_command(plan)} {shlex.join([*kept, *found.overrides])}"


def as_json(plan: AnyPlan, *, found: Found | None = None) -> dict[str, Any]:
    """Return a plan as what JSON holds."""
    whole, target = totals(plan), plan.target
    run = plan if isinstance(plan, RunPlan) else None
    programs = {
        name: {
            "fits": one.fits,
            "source": one.figures.source,
            "fingerprint": one.figures.fingerprint,
            "bytes": dict(one.figures.parts) | {"temporaries": one.figures.temporaries},
            "peak": one.figures.peak,
            "closed_form": dict(one.closed),
            "collectives": [asdict(sent) for sent in one.figures.collectives],
            "load": asdict(one.load),
            "time": None if one.time is None else asdict(one.time),
            "refused": one.figures.refused,
        }
        for name, one in plan.programs.items()
    }
    return {
        "target": {"name": target.name, "devices": target.count, "memory": target.capacity.bytes,
                   "chip": None if target.chip is None else target.chip.name},
        "model": {"name": plan.shape.name, "family": plan.model_config.family},
        "mesh": dict(plan.mesh.shape),
        "prompts": {} if run is None else {name: asdict(count) for name, count in run.counts.items()},
        "sampling": {
            stage: {"slots": slots.slots, "most_slots": slots.most_slots, "chosen_by": slots.chosen_by,
                    "mesh": dict(slots.programs.mesh.shape), "bytes": dict(slots.parts)}
            for stage, slots in plan.sampling.items()
        },
        "programs": programs,
        "annotation": None if run is None or run.annotation is None else {
            name: {"requests": part.total.requests, "tokens_in": part.total.tokens_in,
                   "tokens_out": part.total.tokens_out, "usd": part.usd, "batch_usd": part.batch_usd}
            for name, part in run.annotation.parts.items()
        },
        "total": None if whole is None else asdict(whole) | {"total_usd": whole.total_usd},
        "search": None if found is None else asdict(found),
        "assumptions": {"shares": SHARES, "busy": BUSY},
        "notes": list(plan.notes),
    }  # fmt: skip


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    return table
