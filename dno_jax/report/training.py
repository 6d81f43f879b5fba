"""How trainings went, by metrics.jsonl: speed, padding, drift; and where an iteration's wall time went."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import RenderableType

from dno_jax.config import RunConfig
from dno_jax.report.tables import stacked
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import stage_names
from dno_jax.tracker import open_sinks

ITERATION = "iteration"  # the stage that an iteration's own figures are filed under


def note_shares(run_dir: RunDir, config: RunConfig, iteration: int) -> dict[str, float]:
    """Write down, when an iteration is done, what share of its wall time each stage took; return the figures.

    Wall time is from the first stage's beginning to the last one's end. What no finished call of a stage covers is
    `share_waiting`: interruptions, work that was lost with them, and waiting for machines or for another process.
    Stages that run beside each other both count.
    """
    spans: dict[str, tuple[float, float]] = {}
    for name in stage_names(config, iteration):
        stage = run_dir.stage(name, iteration)
        end = float(stage.manifest_path.stat().mtime)
        spans[name] = end - stage.require().seconds, end
    begin, end = min(start for start, _ in spans.values()), max(end for _, end in spans.values())
    wall = max(end - begin, 1e-9)
    figures = {"ended": end, "wall_seconds": wall, "share_waiting": max(1.0 - _covered(spans.values()) / wall, 0.0)}
    figures |= {f"share_{name}": (end - start) / wall for name, (start, end) in spans.items()}
    place = {"iteration": iteration, "stage": ITERATION, "step": 0}
    if not any(row.items() >= place.items() and row.get("ended") == end for row in run_dir.read_metrics()):
        run_dir.forget_metrics(iteration=iteration, stage=ITERATION, from_step=0)
        run_dir.append_metrics(place | {name: round(value, 4) for name, value in figures.items()} | {"ended": end})
        sinks = open_sinks(config.report, run_dir, curve=ITERATION, first_step=iteration)
        sinks.write(iteration, {f"{ITERATION}/{name}": value for name, value in figures.items() if name != "ended"})
        sinks.close()
    return figures


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that at least one span covers."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return float(total)


def training_table(run_dir: RunDir) -> RenderableType | None:
    """One row per training: medians of its steps' speed, and where it ended; None where nothing was trained."""
    steps: dict[tuple[int, str], list[dict[str, Any]]] = {}
    shares: dict[int, dict[str, Any]] = {}
    for row in run_dir.read_metrics():
        if row.get("stage") == ITERATION:
            shares[row["iteration"]] = row
        elif "loss" in row:
            steps.setdefault((row["iteration"], row["stage"]), []).append(row)
    if not steps:
        return None
    columns = ("", "training", "steps", "loss", "tokens/s", "TFLOP/s", "MFU", "padding", "jitter", "KL", "chosen/token",
               "skipped", "alarms", "time in it", "waiting")  # fmt: skip
    rows = []
    for (iteration, stage), found in sorted(steps.items()):
        timed = found[1:] or found  # the first was compiled
        own = shares.get(iteration, {})
        rows.append((
            str(iteration), stage, str(len(found)), _shown(_last(found, "loss"), "{:.4f}"),
            _shown(_median(timed, "tokens_per_second"), "{:,.0f}"),
            _shown(_median(timed, "tflops_per_second"), "{:.3g}"),
            _shown(_median(timed, "mfu"), "{:.1%}"), _shown(_mean(found, "padding"), "{:.1%}"),
            _shown(_last(found, "jitter"), "{:.0%}"), _shown(_last(found, "kl"), "{:.3g}"),
            _shown(_last(found, "chosen_shift"), "{:+.3g}"), str(int(sum(row.get("skipped") or 0 for row in found))),
            str(int(_last(found, "alarms") or 0)), _shown(own.get(f"share_{stage}"), "{:.0%}"),
            _shown(own.get("share_waiting"), "{:.0%}"),
        ))  # fmt: skip
    return stacked("trainings (medians of steps; KL in nats a response)", columns, rows)


def _values(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _last(rows: list[dict[str, Any]], name: str) -> float | None:
    return next(reversed(_values(rows, name)), None)


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    values = _values(rows, name)
    return float(np.median(values)) if values else None


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    values = _values(rows, name)
    return float(np.mean(values)) if values else None


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
