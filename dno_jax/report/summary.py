"""A run in tables: what is done, what comes next, and what every iteration brought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from dno_jax.config import AnyConfig, RunConfig, SftConfig
from dno_jax.errors import DnoError
from dno_jax.records import PairKind
from dno_jax.report.judge import quality_lines
from dno_jax.report.tables import shares_text, stacked
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import Manifest, stage_names

PAIR_KINDS = get_args(PairKind)


@dataclass(frozen=True)
class StageStatus:
    iteration: int
    stage: str
    manifest: Manifest | None
    shards: int


def stage_statuses(run_dir: RunDir, config: RunConfig) -> list[StageStatus]:
    """Every stage of every iteration in the order in which they run."""
    statuses = []
    for iteration in range(config.iterations):
        for name in stage_names(config, iteration):
            stage = run_dir.stage(name, iteration)
            statuses.append(StageStatus(iteration, name, stage.manifest(), len(stage.shard_paths())))
    return statuses


def status_table(statuses: list[StageStatus]) -> Table:
    """Stages done with rows, drops and seconds; the first unfinished one is what comes next."""
    table = Table(title="stages", box=SIMPLE_HEAD)
    for column in ("iteration", "stage", "state", "rows", "dropped", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "state") else "right", no_wrap=True)
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


def stage_of(kind: type[AnyConfig]) -> str:
    """The command of a single training, which its figures are filed under."""
    return "sft" if kind is SftConfig else "reward"


def fine_tuning_table(run_dir: RunDir, *, stage: str) -> Table:
    """What a directory of `dno sft` or `dno reward` holds: how far it is, and where the model lies when it is done."""
    steps = [row for row in run_dir.read_metrics() if row.get("stage") == stage]
    done = run_dir.export_path.exists()
    table = Table(
        title="supervised fine-tuning" if stage == "sft" else "reward model", box=SIMPLE_HEAD, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("state", "done" if done else "begun" if steps else f"next: dno {stage}")
    if steps:
        table.add_row("last step", f"{steps[-1]['step']:,}")
        table.add_row("loss", f"{steps[-1]['loss']:.4f}")
    if done:
        table.add_row("checkpoint", str(run_dir.export_path))
    return table


def policy_table(run_dir: RunDir, *, iterations: int) -> Table:
    """One row per policy: win rates with 95 % intervals, and length."""
    evaluated = _evaluated(run_dir, iterations)
    was_measured = bool(evaluated) and is_measured(run_dir, evaluated[-1])
    best = best_policy_of(run_dir, iterations=iterations) if was_measured else None
    title = "policies on held-out prompts (* best)" if was_measured or not evaluated else "policies, not measured"
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("policy", "beats policy 0", "beats previous", "beats gold", "words"):
        table.add_column(column, justify="right", no_wrap=True)
    for iteration in evaluated:
        details, policy = run_dir.stage("evaluate", iteration).require().details, iteration + 1
        if iteration == 0:
            table.add_row(f"{'* ' if best == 0 else ''}0", "", "", "", _words(details, 0))
        rates = (details["win_rates"].get(opponent) for opponent in ("0", str(iteration), "gold"))
        table.add_row(f"{'* ' if best == policy else ''}{policy}", *map(rate_text, rates), _words(details, policy))
        if average := details.get("average"):
            rates = (average.get(opponent) for opponent in ("0", str(iteration), "gold"))
            table.add_row(f"mean of 0..{iteration}", *map(rate_text, rates), "")
    return table


def iteration_table(run_dir: RunDir, config: RunConfig, *, judge: bool = True) -> RenderableType:
    """One row per iteration: pairs by kind (S student, T teacher, D data), replayed ones, seconds; its judge."""
    evaluated = _evaluated(run_dir, config.iterations)
    stages = stage_names(config, 0)
    manifests = {t: {name: run_dir.stage(name, t).require() for name in stage_names(config, t)} for t in evaluated}
    found = {kind for stage in manifests.values() for kind in stage["pair"].details["kinds"]}
    kinds = [kind for kind in PAIR_KINDS if "data" not in kind or kind in found]
    rows = [
        (
            str(iteration),
            *(str(done["pair"].details["kinds"].get(kind, 0)) for kind in kinds),
            str(done["pair"].details["replayed"]),
            *(f"{done[name].seconds:.1f}" if name in done else "" for name in stages),
        )
        for iteration, done in manifests.items()
    ]
    title = "pairs by kind, seconds by stage (annotate runs beside sample)"
    table = stacked(title, ("", *map(_short, kinds), "replay", *stages), rows)
    cut = [
        f"iteration {t}: cut at the limit of tokens: {shares_text(shares)}"
        for t, done in manifests.items()
        if (shares := done["pair"].details.get("cut"))
    ]
    if not judge:
        return Group(table, *cut)
    return Group(table, *cut, quality_lines(_judge_figures(run_dir, config.iterations), config.annotation.quality))


def _judge_figures(run_dir: RunDir, iterations: int) -> dict[int, dict[str, Any]]:
    manifests = {t: run_dir.stage("annotate", t).manifest() for t in range(iterations)}
    return {t: found.details["quality"] for t, found in manifests.items() if found and found.details.get("quality")}


def _short(kind: str) -> str:
    return kind.replace("student", "S").replace("gold", "T").replace("data", "D")


def _evaluated(run_dir: RunDir, iterations: int) -> list[int]:
    return [t for t in range(iterations) if run_dir.stage("evaluate", t).manifest_path.exists()]


def is_measured(run_dir: RunDir, iteration: int) -> bool:
    """Whether an iteration's evaluation compared policies: without held-out prompts the newest only stands in."""
    return "matrix" in run_dir.stage("evaluate", iteration).require().details


def told_policy(run_dir: RunDir, *, iteration: int) -> str:
    """Say which policy a run returns, and why it is that one."""
    details = run_dir.stage("evaluate", iteration).require().details
    if is_measured(run_dir, iteration):
        return f"best on held-out prompts: policy {details['best']}"
    return f"policy {details['best']} ({details['why']})"


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


def rate_text(found: dict[str, Any] | None) -> str:
    """A win rate and its interval in whole percent, as every table has it."""
    if found is None:
        return ""
    return f"{100 * found['rate']:.0f} % [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _words(details: dict[str, Any], policy: int) -> str:
    lengths = details.get("lengths", {}).get(str(policy)) or {}
    return f"{lengths['mean_words']:.1f}" if lengths else ""
