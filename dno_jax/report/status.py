"""What `dno status` shows of a directory: tables for people, one object for programs, a line while it runs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from dno_jax.config import RunConfig
from dno_jax.console import results
from dno_jax.report import verify as verification
from dno_jax.report.measured import last_matrix
from dno_jax.report.summary import (
    StageStatus,
    fine_tuning_table,
    iteration_table,
    policy_table,
    rate_text,
    stage_of,
    stage_statuses,
    status_table,
)
from dno_jax.report.tables import duration
from dno_jax.report.training import training_table
from dno_jax.run_dir import RunDir


def tables(folder: RunDir, *, verify: bool = False) -> Iterator[RenderableType]:
    """Yield a run's tables, or those of a single training.

    Args:
        verify: read everything first, and hold it to its digests.

    Raises:
        DnoError: there is no run, or something is not as it was written.
    """
    kind, trainings = folder.kind(), training_table(folder)
    if kind is not RunConfig:
        yield fine_tuning_table(folder, stage=stage_of(kind))
    else:
        settings = folder.load_config()
        if verify:
            verification.check(folder, settings)
        yield status_table(stage_statuses(folder, settings))
        yield policy_table(folder, iterations=settings.iterations)
        yield last_matrix(folder, iterations=settings.iterations)
        yield iteration_table(folder, settings)
    if trainings is not None:
        yield trainings


def facts(folder: RunDir) -> dict[str, Any]:
    """How a directory stands, as plain values; the keys are the same in every state.

    Raises:
        DnoError: there is no run, or it is damaged.
    """
    kind = folder.kind()
    steps = [row for row in folder.read_metrics() if {"iteration", "stage", "step", "loss"} <= row.keys()]
    step = {name: steps[-1].get(name) for name in ("iteration", "stage", "step", "loss")} if steps else None
    place = str(folder.path) if folder.bucket is None else folder.bucket.url
    found = {"run_dir": place, "in_use_by": folder.holder(), "training": step}
    if kind is not RunConfig:
        return found | {"kind": stage_of(kind), "finished": folder.export_path.exists()}
    config: RunConfig = folder.load_config()
    statuses = stage_statuses(folder, config)
    left = [status for status in statuses if status.manifest is None]
    evaluated = [status.manifest.details for status in statuses if status.stage == "evaluate" and status.manifest]
    newest = evaluated[-1] if evaluated else {}
    return found | {
        "kind": "run",
        "finished": not left and folder.export_path.exists(),
        "iterations": config.iterations,
        "next": {"iteration": left[0].iteration, "stage": left[0].stage, "shards": left[0].shards} if left else None,
        "stages_done": len(statuses) - len(left),
        "stages_left": len(left),
        "seconds_left": _seconds_left(statuses),
        "policy": newest.get("policy"),
        "best": newest.get("best"),
        "win_rates": newest.get("win_rates", {}),
        "mean_words": {name: own.get("mean_words") for name, own in newest.get("lengths", {}).items() if own},
        "usd": folder.paid(),
        "stages": [_stage(status) for status in statuses],
    }


def _stage(status: StageStatus) -> dict[str, Any]:
    manifest = status.manifest
    own = {"rows": manifest.rows, "dropped": manifest.dropped, "seconds": manifest.seconds} if manifest else {}
    return {"iteration": status.iteration, "stage": status.stage, "done": manifest is not None,
            "shards": status.shards, "rows": None, "dropped": {}, "seconds": None} | own  # fmt: skip


def _seconds_left(statuses: list[StageStatus]) -> float | None:
    """What is left takes as long as the same stages took before; None where one has no example yet."""
    took: dict[str, list[float]] = {}
    for status in statuses:
        if status.manifest is not None:
            took.setdefault(status.stage, []).append(status.manifest.seconds)
    left = [status.stage for status in statuses if status.manifest is None and status.stage != "annotate"]
    if any(stage not in took for stage in left):  # annotation runs beside sampling, which counts
        return None
    return round(math.fsum(sum(took[stage]) / len(took[stage]) for stage in left), 1)


def line(found: dict[str, Any]) -> str:
    """Say in a line how a directory stands: what comes next, the win rate so far, dollars, the time left."""
    step = found["training"]
    if found["kind"] != "run":
        return "finished" if found["finished"] else _step(step) if step else "begun"
    parts = []
    if found["next"] is None:
        parts.append("finished" if found["finished"] else "all stages are done")
    else:
        upcoming = found["next"]
        parts.append(f"{upcoming['stage']} of iteration {upcoming['iteration']} (of {found['iterations']})")
        if step and all(step[name] == upcoming[name] for name in ("iteration", "stage")):
            parts.append(_step(step))
        elif upcoming["shards"]:
            parts.append(f"{upcoming['shards']} shards")
    return "; ".join([*parts, *_reached(found)])


def standing(folder: RunDir, iteration: int) -> str:
    """What an iteration has reached, for a log: win rate, length, dollars, the time left; empty of an earlier one."""
    found = facts(folder)
    if found["policy"] != iteration + 1:
        return ""
    return "; ".join([f"iteration {iteration} (of {found['iterations']}) is done", *_reached(found)])


def _reached(found: dict[str, Any]) -> list[str]:
    parts = []
    if rate := found["win_rates"].get("0"):
        parts.append(f"policy {found['policy']} beats policy 0 in {rate_text(rate)}")
    words = found["mean_words"]
    if str(found["policy"]) in words and "0" in words:
        parts.append(f"{words[str(found['policy'])]:.1f} words ({words['0']:.1f} at the start)")
    if found["usd"]:
        parts.append(f"${found['usd']:,.2f}")
    if found["stages_left"] and found["seconds_left"] is not None:
        parts.append(f"about {duration(found['seconds_left'])} left")
    return parts


def _step(step: dict[str, Any]) -> str:
    loss = "no finite loss" if step["loss"] is None else f"loss {step['loss']:.4f}"
    return f"step {step['step']}, {loss}"


def watch(folder: RunDir, *, every: float, as_json: bool = False) -> None:
    """Show how a run stands until it is finished: in place on a terminal, else a line whenever it has changed."""
    if as_json or not results.is_terminal:
        said: Any = None
        while True:
            found = facts(folder)
            shown = found if as_json else line(found)
            if shown != said:
                typer.echo(json.dumps(found)) if as_json else results.print(line(found), soft_wrap=True)
                sys.stdout.flush()
                said = shown
            if found["finished"]:
                return
            time.sleep(every)
    with Live(console=results, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            found = facts(folder)
            live.update(Group(line(found), *tables(folder)), refresh=True)
            if found["finished"]:
                return
            time.sleep(every)
