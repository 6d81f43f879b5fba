"""A run in tables: what is done, what comes next, and what every iteration brought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from rich.box import SIMPLE_HEAD
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
    table = Table(title="stages", box=SIMPLE_HEAD)
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


def policy_table(run_dir: RunDir, *, iterations: int) -> Table:
    """One row a policy: win rates with 95 % intervals, and length."""
    evaluated = _evaluated(run_dir, iterations)
    best = best_policy_of(run_dir, iterations=iterations) if evaluated else None
    table = Table(title="policies on held-out prompts (* best)", box=SIMPLE_HEAD)
    for column in ("policy", "beats policy 0", "beats previous", "beats gold", "words"):
        table.add_column(column, justify="right", no_wrap=True)
    for iteration in evaluated:
        details, policy = run_dir.stage("evaluate", iteration).require().details, iteration + 1
        if iteration == 0:
            table.add_row(f"{'* ' if best == 0 else ''}0", "", "", "", _words(details, 0))
        rates = (details["win_rates"].get(opponent) for opponent in ("0", str(iteration), "gold"))
        table.add_row(f"{'* ' if best == policy else ''}{policy}", *map(_rate, rates), _words(details, policy))
    return table


def iteration_table(run_dir: RunDir, *, iterations: int) -> Table:
    """One row an iteration: pairs by kind (S student, G gold), replayed ones, and seconds by stage."""
    table = Table(title="pairs by kind, seconds by stage (annotate runs beside sample)", box=None, padding=(0, 0, 0, 2))
    for column in ("", *(kind.replace("student", "S").replace("gold", "G") for kind in PAIR_KINDS), "replay", *STAGES):
        table.add_column(column, justify="right", no_wrap=True)
    for iteration in _evaluated(run_dir, iterations):
        manifests = {name: run_dir.stage(name, iteration).require() for name in STAGES}
        paired = manifests["pair"].details
        table.add_row(
            str(iteration),
            *(str(paired["kinds"].get(kind, 0)) for kind in PAIR_KINDS),
            str(paired["replayed"]),
            *(f"{manifest.seconds:.1f}" for manifest in manifests.values()),
        )
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
