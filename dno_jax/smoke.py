"""The first thing to run on a new machine: sixteen prompts and two steps of every stage, at the shapes of the real run.

Each program is compiled and run once before it is timed. What is made is thrown away; what is left are figures: peak
memory, speed, MFU and MBU by stage, and what the whole run would take at that speed.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import RenderableType

from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.data.prompts import TokenizedPrompt
from dno_jax.errors import DnoError
from dno_jax.files import write_lines_atomically
from dno_jax.model.sizes import attention_layers, state_bytes
from dno_jax.parallel.chips import chip_of
from dno_jax.parallel.cluster import barrier, is_primary, wait_until
from dno_jax.parallel.sharding import num_row_shards
from dno_jax.plan.roofline import BUSY
from dno_jax.plan.run import Asked, plan_run
from dno_jax.records import Judgement, Prompt, Rollout
from dno_jax.report.tables import stacked
from dno_jax.run_dir import RunDir
from dno_jax.runtime.capacity import known_capacity
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.sampler import Sampler, SampleSpec
from dno_jax.runtime.scoring import frozen_logprobs, scoring_batches
from dno_jax.runtime.slots import plan, wanted_by_stage
from dno_jax.runtime.training_memory import refuse_training
from dno_jax.stages import annotate, disk, sample
from dno_jax.stages.overlap import sample_and_annotate
from dno_jax.stages.pair import new_pairs
from dno_jax.stages.preflight import prepared
from dno_jax.stages.train import Training, train
from dno_jax.training.batches import TrainingRow, text_lengths
from dno_jax.training.flops import peak_flops, train_flops, work_of
from dno_jax.training.objectives import preference_loss

PROMPTS, STEPS = 16, 2


@dataclass(frozen=True)
class StageFigures:
    """
    Attributes:
        seconds: of one step: a token of every slot, a batch scored, an optimiser's step; of the judge, of one prompt.
        tokens_per_second: of all devices; None of the judge.
        peak_bytes: of the fullest device since the start; None where it does not say.
        mfu, mbu: None where the chip is not known, or the other one limits.
        hours: of the whole run, all iterations.
        planned_seconds, planned_bytes: what `dno plan` has in their place; None where it has nothing.
    """

    seconds: float
    tokens_per_second: float | None
    peak_bytes: int | None
    mfu: float | None
    mbu: float | None
    hours: float
    planned_seconds: float | None = None
    planned_bytes: int | None = None


@dataclass(frozen=True)
class Smoke:
    """What was measured, and what it makes of the whole run.

    Attributes:
        devices: their number, over which hours are summed.
        pairs_per_prompt: what the rule made of the judged prompts; 1 where it made none.
    """

    stages: dict[str, StageFigures]
    devices: int
    pairs_per_prompt: float
    price_per_hour: float | None

    @property
    def hours(self) -> float:
        """Of the devices: the judge answers meanwhile."""
        return sum(stage.hours for name, stage in self.stages.items() if name != "annotate")

    def as_dict(self) -> dict[str, Any]:
        device_hours = self.hours * self.devices
        usd = None if self.price_per_hour is None else device_hours * self.price_per_hour
        return {
            "stages": {name: vars(stage) for name, stage in self.stages.items()},
            "devices": self.devices,
            "pairs_per_prompt": self.pairs_per_prompt,
            "hours": self.hours,
            "device_hours": device_hours,
            "usd": usd,
        }


def run(config: RunConfig, *, price_per_hour: float | None = None) -> Smoke:
    """Measure every stage of a run on these devices, in a directory of its own that is removed again.

    Raises:
        DnoError: whatever would stop the run itself; the directory is there already, and not one of these.
    """
    whole = Runtime.start(config)
    refuse_training(whole.programs, known_capacity(whole.mesh.local_devices))
    if is_primary():
        disk.check(whole)
    folder = f"{whole.run_dir.path}-smoke"
    marker = RunDir(folder).path / "SMOKE"
    if is_primary():
        if marker.parent.exists() and not marker.exists():
            raise DnoError(
                f"{folder}: is there already, and not of an earlier --smoke; move it, or set another run_dir"
            )
        shutil.rmtree(folder, ignore_errors=True)
        marker.parent.mkdir(parents=True)
        marker.write_text("thrown away at the end of `dno run --smoke`\n")
    barrier("smoke")
    try:
        return _measure(whole, folder, price_per_hour)
    finally:
        if is_primary():
            shutil.rmtree(folder, ignore_errors=True)


def _measure(whole: Runtime[RunConfig], folder: str, price: float | None) -> Smoke:
    config, split = whole.config, whole.prompts.split
    prompts = _longest([prompt for part in split.training for prompt in part])
    path = f"{folder}/prompts.jsonl"
    if is_primary():
        rows = (prompt.model_dump(include={"prompt_id", "messages", "gold"}, exclude_none=True) for prompt in prompts)
        write_lines_atomically(path, (json.dumps(row) for row in rows))
    barrier("smoke prompts")
    runtime = Runtime.start(_small(config, folder, path, slots=_slots(whole)))
    total = sum(map(len, split.training))
    found: dict[str, StageFigures] = {}
    with prepared(runtime, only=("sample", 0)):
        sample.run(runtime, 0)  # compiles
        found |= _sampled(runtime, total=total)
        rollouts = list(runtime.run_dir.stage("sample", 0).read(Rollout))
        if config.annotation.on_devices:
            sample_and_annotate(runtime, 0)
        elif is_primary():  # nothing beside it
            annotate.run(runtime.config, runtime.run_dir, 0)
        judged = runtime.run_dir.stage("annotate", 0)
        wait_until(judged.manifest_path.exists)
        seconds = judged.require().seconds / len(prompts)
        found["annotate"] = StageFigures(seconds, None, None, None, None, hours=seconds * total / 3600)
        pairs = len(new_pairs(judged.read(Judgement), rollouts, config, iteration=0).pairs) / len(prompts) or 1.0
        rows = _rows(rollouts, count=(STEPS + 1) * config.training.batch_size)
        found["score"] = _scored(runtime, rows, pairs=math.ceil(pairs * total))
        found["train"] = _trained(runtime, rows, pairs=math.ceil(pairs * total))
        planned = plan_run(runtime.config, asked=Asked(compiled=False)).programs
    for name, program in (("sample", "decode"), ("score", "score"), ("train", "train")):
        if name in found and program in planned:
            one = planned[program]
            seconds = None if one.time is None else one.time.seconds
            found[name] = replace(found[name], planned_seconds=seconds, planned_bytes=one.figures.peak)
    return Smoke(found, jax.device_count(), pairs, price)


def _longest(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that fill the longest shapes, of those that may be sampled from; by characters, as that is cheap."""
    ordered = sorted(prompts, key=lambda prompt: (-sum(len(m.content) for m in prompt.messages), prompt.prompt_id))
    return ordered[len(ordered) // 20 :][:PROMPTS]  # the very longest may be too long to be kept


def _slots(whole: Runtime[RunConfig]) -> int | None:
    """As many as the real run would decode together."""
    split = whole.prompts.split
    wanted = wanted_by_stage(
        whole.config, num_prompts=max(map(len, split.training)), num_held_out=len(split.held_out)
    ).get("sample")
    return None if wanted is None else plan(whole, wanted).slots


def _small(config: RunConfig, folder: str, path: str, *, slots: int | None) -> RunConfig:
    """The configuration, with what decides shapes as it is and the rest small."""

    def changed(section: Any, **values: Any) -> Any:
        return section.model_copy(update=values)

    return changed(
        config,
        run_dir=folder,
        iterations=1,
        prompts=changed(config.prompts, path=path, held_out=0, held_out_path=None),
        sampling=changed(config.sampling, slots=slots or config.sampling.slots, audit_prompts=0),
        annotation=changed(config.annotation, teacher=None, apart=False),
        training=changed(config.training, num_epochs=1, save_every=1 << 30, profile=None),
        report=changed(config.report, tensorboard=False),
    )


def _peak() -> int | None:
    """Of the fullest device of this process; where processors are devices, of the process."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [number for number in found if number is not None]
    if not known and jax.local_devices()[0].platform == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(known, default=None)


def _sampled(runtime: Runtime[RunConfig], *, total: int) -> dict[str, StageFigures]:
    """Decode once more, compiled; what a step reads of memory is the weights and the keys and values so far."""
    config = runtime.config
    if config.sampling.engine != "jax" or config.sampling.source == "data":
        return {}
    kept, part = runtime.prompts.training(0).kept, runtime.submesh
    own: list[TokenizedPrompt] = list(kept[part.index :: part.count])
    sampler = Sampler(
        runtime, own, [SampleSpec("policy", config.sampling.num_samples)], policy=0, num_prompts=len(kept)
    )
    (stream,) = sampler.streams({"policy": runtime.run_dir.policy(0)})
    start, tokens = time.perf_counter(), 0
    for finished in stream:
        tokens += sum(len(response.token_ids) for response in finished.responses)
    seconds = time.perf_counter() - start
    figures, mesh = sampler.details["slots"], runtime.submesh.mesh
    slots = figures["slots"] * num_row_shards(mesh)
    steps = tokens / max(figures["utilisation"], 1e-9) / slots
    step, mean = seconds / max(steps, 1.0), tokens / max(len(own) * config.sampling.num_samples, 1)
    length = float(np.mean([len(item.token_ids) for item in kept])) + mean / 2
    shapes, model = runtime.computing_shapes, runtime.model_config
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    token_bytes = 2 * attention_layers(model) * model.num_key_value_heads * model.head_dim
    token_bytes *= jnp.dtype(config.model.dtype).itemsize
    read = weights * num_row_shards(mesh) + slots * (length * token_bytes + 2 * state_bytes(model))
    chip = chip_of(mesh.devices.flat[0].device_kind)
    rate = slots / step * runtime.submesh.count  # with every slot busy
    drawn = mean * config.sampling.num_samples * total
    mbu = None if chip is None else read / step / (chip.bandwidth * mesh.devices.size)
    return {"sample": StageFigures(step, rate, _peak(), None, mbu, hours=drawn / (rate * BUSY) / 3600)}


def _rows(rollouts: Sequence[Rollout], *, count: int) -> list[TrainingRow]:
    """Two responses to each prompt, again and again: real lengths, for as many full batches as are timed."""
    by_prompt: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    found = []
    for own in by_prompt.values():
        one, two = own[0], own[-1]
        prompt = tuple(one.prompt_token_ids)
        found.append(TrainingRow((prompt, prompt), (tuple(one.token_ids), tuple(two.token_ids))))
    return [found[index % len(found)] for index in range(count)]


def _scored(runtime: Runtime[RunConfig], rows: Sequence[TrainingRow], *, pairs: int) -> StageFigures:
    section = runtime.config.training
    size = section.micro_batch_size or section.batch_size
    lengths = np.asarray([row.num_tokens for row in rows])
    batches = [
        np.arange(first, first + size) for first in range(0, min(len(rows), (STEPS + 1) * size) - size + 1, size)
    ]
    if not batches:
        batches = scoring_batches(runtime, lengths, size=size)
    times = []
    for logprobs in frozen_logprobs(runtime, runtime.run_dir.policy(0), rows, batches, size=size):
        jax.block_until_ready(logprobs)
        times.append(time.perf_counter())
    seconds = (times[-1] - times[0]) / max(len(times) - 1, 1)
    tokens = sum(rows[int(index)].num_tokens for batch in batches[1:] for index in batch) / max(len(batches) - 1, 1)
    policies = 2 if runtime.config.uses_initial else 1
    work = work_of(runtime.model_config, text_lengths([rows[int(index)] for index in batches[-1]]))
    return StageFigures(
        seconds,
        tokens / max(seconds, 1e-9),
        _peak(),
        _mfu(runtime, train_flops(runtime.model_config, work) / 3.0 / max(seconds, 1e-9)),
        None,
        hours=math.ceil(pairs / size) * seconds * policies / 3600,
    )


def _mfu(runtime: Runtime[RunConfig], flops_per_second: float) -> float | None:
    peak = peak_flops(runtime.mesh.devices.flat[0].device_kind)
    return None if peak is None else flops_per_second / (peak * runtime.mesh.devices.size)


def _trained(runtime: Runtime[RunConfig], rows: Sequence[TrainingRow], *, pairs: int) -> StageFigures:
    config = runtime.config
    trained, frozen = runtime.load_trained(runtime.run_dir.policy(0), exact=True)
    loss = preference_loss(config.loss_at(0), config.reference)
    step = runtime.programs.step_config(loss, load_balance_weight=config.loss.load_balance_weight)
    place = Training("train", 0, runtime.run_dir.path / "states", max_length=config.max_length)
    start = time.perf_counter()
    train(runtime, trained, rows, step, place, frozen=frozen)
    taken = [row for row in runtime.run_dir.read_metrics() if row["stage"] == "train"][1:]  # the first was compiled
    if not taken:  # another process than the one that writes figures
        return StageFigures(time.perf_counter() - start, None, _peak(), None, None, hours=0.0)
    seconds = float(np.mean([row["step_seconds"] for row in taken]))
    mfu = [row["mfu"] for row in taken if "mfu" in row]
    return StageFigures(
        seconds,
        float(np.mean([row["tokens_per_second"] for row in taken])),
        _peak(),
        float(np.mean(mfu)) if mfu else None,
        None,
        hours=math.ceil(pairs / config.training.batch_size) * config.training.num_epochs * seconds / 3600,
    )


def smoke_table(found: Smoke) -> RenderableType:
    """One row for each stage, and one for the whole."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    rows = [
        (
            name, f"{stage.seconds:.3g}", shown(stage.tokens_per_second, "{:,.0f}"),
            shown(None if stage.peak_bytes is None else stage.peak_bytes / 2**30, "{:.1f} GiB"),
            shown(stage.mfu, "{:.1%}"), shown(stage.mbu, "{:.1%}"), f"{stage.hours:,.3g}",
            shown(stage.planned_seconds, "{:.3g}"),
            shown(None if stage.planned_bytes is None else stage.planned_bytes / 2**30, "{:.1f} GiB"),
        )
        for name, stage in found.stages.items()
    ]  # fmt: skip
    rows.append(("all on devices", "", "", "", "", "", f"{found.hours:,.3g}", "", ""))
    columns = ("", "s/step", "tokens/s", "peak", "MFU", "MBU", "hours of the run", "planned s/step", "planned peak")
    return stacked("measured here, after compiling; hours of all iterations at this speed", columns, rows)


def tell(found: Smoke) -> None:
    """Say what the hours cost."""
    figures = found.as_dict()
    money = "" if figures["usd"] is None else f", {figures['usd']:,.2f} dollars"
    say(
        f"{found.hours:,.3g} hours on {found.devices} devices are {figures['device_hours']:,.3g} device hours{money}; "
        f"with {found.pairs_per_prompt:.2g} pairs for each prompt; evaluation and the judge's bill aside (`dno plan`)"
    )
