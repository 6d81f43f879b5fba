"""The whole run: steps, hours of each stage, accelerator hours and their dollars, disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dno_jax.config import RunConfig
from dno_jax.parallel.sharding import num_row_shards
from dno_jax.plan.roofline import decode_seconds
from dno_jax.plan.run import PromptCount, RunPlan
from dno_jax.plan.trainings import TrainingPlan, steps_of
from dno_jax.runtime.programs import Programs
from dno_jax.stages.disk import checkpoint_bytes

# Pairs of a prompt, by rule: what runs found; of the rules that name them, their number.
_FOUND = {"large_margin": 2.0, "restrictive": 1.0, "best_worst": 1.0}
_TEXT_BYTES = 14  # of a sampled token in its rollout: id, log-probability and text, compressed by nobody


@dataclass(frozen=True)
class StageTotal:
    """
    Attributes:
        runs: of its program.
        hours: None where the chip is not known.
    """

    runs: int
    hours: float | None


@dataclass(frozen=True)
class Totals:
    """
    Attributes:
        pairs: of all iterations, replayed ones counted where they are trained on; or a training's rows.
        stages: of all iterations.
        hours: of all that the devices do.
        device_hours, usd: of all devices; None where hours, or a price, are not known.
        requests, tokens, judge_usd: of judges and teachers; dollars None where a price is not known.
        disk: bytes by what lies there.
    """

    pairs: int
    stages: Mapping[str, StageTotal]
    hours: float | None
    device_hours: float | None
    usd: float | None
    requests: int
    tokens: int
    judge_usd: float | None
    disk: Mapping[str, int]

    @property
    def total_usd(self) -> float | None:
        return None if self.usd is None or self.judge_usd is None else self.usd + self.judge_usd


def totals(plan: RunPlan | TrainingPlan) -> Totals | None:
    """Add a run up; None where nobody says how many prompts, or rows, there are."""
    if isinstance(plan, TrainingPlan):
        return _of_training(plan)
    if not plan.counts:
        return None
    config, section = plan.config, plan.config.training
    parts = [count for name, count in plan.counts.items() if name != "held out"]
    fresh = [pairs_per_prompt(config) * count.prompts for count in parts]
    pairs = [math.ceil(count / (1.0 - _replayed(config, t))) for t, count in enumerate(fresh)]
    steps = sum(-(-count // section.batch_size) for count in pairs) * section.num_epochs
    scored = sum(-(-count // (section.micro_batch_size or section.batch_size)) for count in pairs)
    scored *= 2 if config.uses_initial else 1
    stages = {"score": _stage(plan, "score", scored), "train": _stage(plan, "train", steps)}
    if "sample" in plan.sampling:
        stages["sample"] = _sampled(plan, "sample", [*parts])
    if "evaluate" in plan.sampling and "held out" in plan.counts:
        stages["evaluate"] = _sampled(plan, "evaluate", [plan.counts["held out"]] * config.iterations)
    annotation = plan.annotation.parts if plan.annotation else {}
    bills = [part.usd for part in annotation.values()]
    whole = _devices(plan, stages)
    return replace(
        whole,
        pairs=sum(pairs),
        requests=sum(part.total.requests for part in annotation.values()),
        tokens=sum(part.total.tokens_in + part.total.tokens_out for part in annotation.values()),
        judge_usd=None if None in bills else sum((bill for bill in bills if bill is not None), 0.0),
        disk=disk(plan, responses=sum(_tokens(plan, count.response_tokens) for count in plan.counts.values())),
    )


def _of_training(plan: TrainingPlan) -> Totals | None:
    if plan.rows.trained is None:
        return None
    steps, scored = steps_of(plan)
    stages = {"train": _stage(plan, "train", steps)}
    if scored:
        stages["score"] = _stage(plan, "score", scored)
    programs = Programs(plan.config, plan.model_config, plan.mesh)
    return replace(_devices(plan, stages), pairs=plan.rows.trained, disk=checkpoint_bytes(programs))


def _stage(plan: RunPlan | TrainingPlan, program: str, runs: int) -> StageTotal:
    time = plan.programs[program].time if program in plan.programs else None
    return StageTotal(runs, None if time is None else runs * time.seconds / 3600.0)


def _devices(plan: RunPlan | TrainingPlan, stages: Mapping[str, StageTotal]) -> Totals:
    """Add up what the devices do."""
    known = [stage.hours for stage in stages.values()]
    total = None if None in known else sum((hour for hour in known if hour is not None), 0.0)
    device_hours = None if total is None else total * plan.target.count
    price = plan.asked.price_per_hour
    usd = None if device_hours is None or price is None else device_hours * price
    return Totals(0, stages, total, device_hours, usd, requests=0, tokens=0, judge_usd=0.0, disk={})


def pairs_per_prompt(config: RunConfig) -> float:
    """Pairs that are made of a prompt's pool; of rules with floors and margins, what runs found."""
    section, count = config.pairing, config.sampling.num_samples
    pool = count + 1
    every = pool * (pool - 1) / 2
    most: dict[str, float] = {"spin": count, "matching": count / 2, "all": every, "verdict": every}
    found = (most | _FOUND).get(section.rule, 1.0)
    return found if section.max_pairs_per_prompt is None else min(found, section.max_pairs_per_prompt)


def _replayed(config: RunConfig, iteration: int) -> float:
    """Share of an iteration's pairs that is of earlier ones, at most."""
    return sum((config.pairing.replay * config.pairing.replay_decay**age for age in range(iteration)), 0.0)


def _tokens(plan: RunPlan, most: int) -> int:
    """Tokens of responses of which so many are possible: as long as was said, or the longest."""
    said = plan.asked.response_tokens
    return most if said is None else math.ceil(most * min(1.0, said / plan.config.sampling.max_new_tokens))


def _sampled(plan: RunPlan, stage: str, counts: list[PromptCount]) -> StageTotal:
    slots, tokens = plan.sampling[stage], sum(_tokens(plan, count.response_tokens) for count in counts)
    rows = slots.programs.shape.fill_rows * num_row_shards(slots.programs.mesh) * plan.submeshes
    fills = sum(-(-count.prompts // rows) for count in counts)
    decode, prefill = (plan.programs[name].time for name in ("decode", "prefill"))
    if decode is None or prefill is None:
        return StageTotal(fills, None)
    rate = plan.asked.tokens_per_second
    seconds = decode_seconds(slots, decode, tokens=tokens, tokens_per_second=rate)
    if not rate:  # however many rows there are, the longest response takes its tokens
        longest = len(counts) * plan.config.sampling.max_new_tokens * decode.seconds
        seconds = max(seconds / plan.submeshes, longest)
    return StageTotal(fills, (seconds + fills * prefill.seconds) / 3600.0)


def disk(plan: RunPlan, *, responses: int) -> dict[str, int]:
    """Bytes of a run directory at its largest."""
    programs = Programs(plan.config, plan.model_config, plan.mesh)
    return {**checkpoint_bytes(programs), "rollouts": responses * _TEXT_BYTES}
