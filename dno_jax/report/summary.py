"""A run in tables: what is done, what comes next, and what every iteration brought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from rich.table import Table

from dno_jax.errors import DnoError
from dno_jax.records import PairKind
from dno_jax.run_dir import STAGES, Manifest, RunDir

PAIR_KINDS = get_args(PairKind)


@dataclass(frozen=True)
class StageStatus:
    iteration: int
    stage: str
    manifest: Manifest | None
    shards: int


def stage_statuses(run_dir: RunDir, *, iterations: int) -> list[StageStatus]:
    """Every stage of every iteration in the order in which they run."""
    statuses = []
    for iteration in range(iterations):
        for name in STAGES:
            stage = run_dir.stage(name, iteration)
            statuses.append(StageStatus(iteration, name, stage.manifest(), len(stage.shard_names())))
    return statuses


def status_table(statuses: list[StageStatus]) -> Table:
    """Stages done with rows, drops and seconds; the first unfinished one is what comes next."""
    table = Table(title="stages")
    for column in ("iteration", "stage", "state", "rows", "dropped", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "state") else "right")
    is_next = True
    for status in statuses:
        manifest = status.manifest
        if manifest is not None:
            dropped = sum(manifest.dropped.values())
            cells = ("done", str(manifest.rows), str(dropped or ""), f"{manifest.seconds:.1f}")
        else:
            state = f"{status.shards} shards" if status.shards else ""
            cells = (f"next {state}".strip() if is_next else state, "", "", "")
            is_next = False
        table.add_row(str(status.iteration), status.stage, *cells)
    return table


def iteration_table(run_dir: RunDir, *, iterations: int) -> Table:
    """One row a policy: win rates with 95 % intervals, length, new pairs by kind and replayed ones."""
    evaluated = _evaluated(run_dir, iterations)
    best = best_policy_of(run_dir, iterations=iterations) if evaluated else None
    table = Table(title="policies on held-out prompts (* best)")
    columns = ("policy", "beats 0", "beats previous", "beats gold", "words", "S>S", "S>G", "G>S", "replayed")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for iteration in evaluated:
        paired = run_dir.stage("pair", iteration).require().details
        details, policy = run_dir.stage("evaluate", iteration).require().details, iteration + 1
        if iteration == 0:
            table.add_row(f"0{' *' if best == 0 else ''}", "", "", "", _words(details, 0))
        rates = details["win_rates"]
        table.add_row(
            f"{policy}{' *' if best == policy else ''}",
            *(_rate(rates.get(opponent)) for opponent in ("0", str(iteration), "gold")),
            _words(details, policy),
            *(str(paired["kinds"].get(kind, 0)) for kind in PAIR_KINDS),
            str(paired["replayed"]),
        )
    return table


def seconds_table(run_dir: RunDir, *, iterations: int) -> Table:
    """Seconds by stage, one row an iteration; annotation runs beside sampling."""
    table = Table(title="seconds by stage")
    for column in ("iteration", *STAGES):
        table.add_column(column, justify="right", no_wrap=True)
    for iteration in _evaluated(run_dir, iterations):
        manifests = (run_dir.stage(name, iteration).require() for name in STAGES)
        table.add_row(str(iteration), *(f"{manifest.seconds:.1f}" for manifest in manifests))
    return table


def _evaluated(run_dir: RunDir, iterations: int) -> list[int]:
    return [t for t in range(iterations) if run_dir.stage("evaluate", t).manifest_path.exists()]


def best_policy_of(run_dir: RunDir, *, iterations: int) -> int:
    """The best policy by the last evaluation.

    Raises:
        DnoError: nothing has been evaluated.
    """
    for iteration in range(iterations - 1, -1, -1):
        manifest = run_dir.stage("evaluate", iteration).manifest()
        if manifest is not None:
            return int(manifest.details["best"])
    raise DnoError(f"{run_dir.path}: no iteration has been evaluated; name the policy with --policy")


def _rate(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{100 * found['rate']:.0f} % [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _words(details: dict[str, Any], policy: int) -> str:
    lengths = details["lengths"].get(str(policy)) or {}
    return f"{lengths['mean_words']:.1f}" if lengths else ""
