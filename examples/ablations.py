"""DNO's ablations at the scale of a laptop: one table of what each change costs and gains (docs/results.md).

    python examples/ablations.py                                   # the demo's policy, 5 seeds
    python examples/ablations.py --model CHECKPOINT --prompts PROMPTS.jsonl --seeds 3     # configs/stories.yaml

Each run is what `dno run BASE --with configs/ablations/laptop/METHOD.yaml` does, with one judge for all; per seed the
same judge sets the returned policies against each other, as `dno compare --judge` does. A run that is finished is not
run again, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t as student

from dno_jax import iteration
from dno_jax.config import RunConfig, load_config
from dno_jax.config.loading import lay_over
from dno_jax.preferences import win_matrix
from dno_jax.records import Judgement, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stage_dir import stage_names
from dno_jax.stages import annotate, compare, sample
from dno_jax.stages.preflight import prepared

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# As tables name them; the file of the same name has what it changes.
METHODS = {
    "dno_prct": "DNO-Prct",
    "soft": "soft target",
    "offline_dpo": "offline DPO",
    "spin": "SPIN",
    "sft_on_positives": "SFT on positives",
    "restrictive": "Restrictive",
    "no_margin": "no margin filter",
    "proximal": "proximal",
    "forward_kl": "forward KL",
}
WANT_GOLD = 8  # samples of policy 0 of which the best is the teacher's, where the prompts have no teacher


@dataclass(frozen=True)
class Plan:
    """What is run: a recipe, and where all of it goes."""

    recipe: Path
    seeds: int
    out: Path

    @classmethod
    def of(cls, recipe: Path, settings: Sequence[str], *, seeds: int, out: Path) -> Plan:
        """Write the recipe that all methods start from: settings lie below what a method changes, not above it."""
        tree: dict[str, Any] = {"base": str(recipe)}
        for setting in settings:
            lay_over(tree, setting, kind=RunConfig)
        out.mkdir(parents=True, exist_ok=True)
        path = out / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return cls(path, seeds, out)

    def config(self, method: str, seed: int, *more: str) -> RunConfig:
        """A method's configuration; the judge of held-out responses is the recipe's own in all of them."""
        judge = load_config(RunConfig, self.recipe).annotation.model_dump(mode="json", exclude_defaults=True)
        variant = CONFIGS / "ablations" / "laptop" / f"{method}.yaml"
        own = [f"seed={seed}", f"run_dir={self.folder(seed) / method}", f"evaluation.annotation={json.dumps(judge)}"]
        laid = [variant] if variant.exists() else []
        return load_config(RunConfig, self.recipe, [*own, *more], variants=laid)

    def folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"


def run_method(plan: Plan, method: str, seed: int) -> None:
    """Run a method, or what is left of it, and note beside it the CPU time of all tries."""
    place = plan.folder(seed) / f"{method}.json"
    noted = json.loads(place.read_text()) if place.exists() else {"cpu_seconds": 0.0, "finished": False}
    if noted["finished"]:
        return
    start = time.process_time()
    try:
        iteration.run(plan.config(method, seed))
        noted["finished"] = True
    finally:
        noted["cpu_seconds"] += time.process_time() - start
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(noted))
    print(f"seed {seed}: {METHODS[method]}, {noted['cpu_seconds']:.0f} s of CPU", flush=True)


def compare_seed(plan: Plan, seed: int) -> None:
    """Have the recipe's judge set the policies that the methods returned against each other."""
    folder = plan.folder(seed)
    done = folder / "compared.json"
    if not done.exists():
        judge = plan.config("dno_prct", seed, f"run_dir={folder / 'compared'}")
        found = compare.run([str(folder / method) for method in METHODS], judge)
        done.write_text(json.dumps(found.as_dict()))


def write_teacher(plan: Plan) -> Path:
    """Give prompts without a teacher one: the best of several samples of policy 0, by the judge that all methods have.

    Returns:
        The file of prompts with `gold`.
    """
    path = plan.out / "prompts.jsonl"
    if path.exists():
        return path
    more = ["prompts.held_out=0", "iterations=1", f"sampling.num_samples={WANT_GOLD}"]
    more += [f"run_dir={plan.out / 'teacher'}", "seed=1000"]
    runtime = Runtime.start(plan.config("dno_prct", 0, *more))
    run_dir = runtime.run_dir
    with prepared(runtime):
        sample.run(runtime, 0)
        annotate.run(runtime.config, run_dir, 0)
    texts = {row.rollout_id: row.text for row in run_dir.stage("sample", 0).read(Rollout)}
    best: dict[str, str] = {}
    for pool in run_dir.stage("annotate", 0).read(Judgement):
        best[pool.prompt_id] = texts[pool.candidate_ids[int(np.argmax(mean_wins(pool)))]]
    rows = [json.loads(line) for line in run_dir.prompts_path(0).read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"gold": best[row["prompt_id"]]}) + "\n" for row in rows))
    return path


def mean_wins(pool: Judgement) -> np.ndarray:
    """Each candidate's mean win rate over the pool."""
    wins = win_matrix(wins=pool.wins, scores=pool.scores)
    return np.asarray(np.nanmean(wins, axis=1))


@dataclass(frozen=True)
class Found:
    """What a run came to: of the policy that it returns, and what it took.

    Attributes:
        low, high: of the win rate over policy 0, over this run's own held-out prompts.
    """

    win_rate: float
    low: float
    high: float
    last_win_rate: float
    words: float
    words_before: float
    pairs: int
    verdicts: int
    judge_tokens: int
    cpu_seconds: float


def read_run(plan: Plan, method: str, seed: int) -> Found:
    """Read a finished run's manifests.

    An oracle is asked nothing; what is counted is what a judge of pairs in one order would be asked and would read.
    """
    config = plan.config(method, seed)
    run_dir = RunDir(config.run_dir)
    last = config.iterations - 1
    evaluated = run_dir.stage("evaluate", last).require().details
    best, matrix = int(evaluated["best"]), np.asarray(evaluated["matrix"])
    lengths = evaluated["lengths"]
    own = [one for one in evaluated["comparison"]["pairs"] if (one["player"], one["opponent"]) == (str(best), "0")]
    rate, low, high = (own[0]["value"], own[0]["low"], own[0]["high"]) if own else (0.5, 0.5, 0.5)
    pairs = verdicts = tokens = 0
    for number in range(config.iterations):
        manifests = {name: run_dir.stage(name, number).require() for name in stage_names(config, number)}
        pairs += manifests["train"].rows
        if config.annotation.kind != "gold":
            asked, read = pool_costs(run_dir, number)
            verdicts, tokens = verdicts + asked, tokens + read
    cost = json.loads((plan.folder(seed) / f"{method}.json").read_text())
    return Found(
        win_rate=float(rate),
        low=float(low),
        high=float(high),
        last_win_rate=float(matrix[-1, 0]),
        words=float(lengths[str(best)]["mean_words"]),
        words_before=float(lengths["0"]["mean_words"]),
        pairs=pairs,
        verdicts=verdicts,
        judge_tokens=tokens,
        cpu_seconds=float(cost["cpu_seconds"]),
    )


def pool_costs(run_dir: RunDir, iteration: int) -> tuple[int, int]:
    """Pairs of an iteration's pools, and the tokens of their responses in them."""
    tokens = {row.rollout_id: len(row.token_ids) for row in run_dir.stage("sample", iteration).read(Rollout)}
    verdicts = read = 0
    for pool in run_dir.stage("annotate", iteration).read(Judgement):
        others = len(pool.candidate_ids) - 1
        verdicts += others * (others + 1) // 2
        read += others * sum(tokens[name] for name in pool.candidate_ids)
    return verdicts, read


def interval(values: Sequence[float], *, family: int = 1) -> tuple[float, float, float]:
    """Return the mean over seeds and its 95 % interval by Student's t.

    Args:
        family: how many such intervals are to hold at once (Bonferroni).
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    error = float(np.std(values, ddof=1)) / np.sqrt(len(values))
    half = float(student.ppf(1 - 0.025 / family, len(values) - 1)) * error
    return mean, mean - half, mean + half


def percent(values: Sequence[float], ends: tuple[float, float] | None = None) -> str:
    """The mean and its interval; the value alone, or with ends that are known otherwise, where there is but one."""
    mean, *over_seeds = interval(values)
    low, high = over_seeds if ends is None else ends
    # Student's interval of few seeds does not know that a rate ends at 0 and 1.
    told = "" if np.isnan(low) else f" [{100 * max(low, 0.0):.1f}, {100 * min(high, 1.0):.1f}]"
    return f"{100 * mean:.1f} %{told}"


def mean_of(values: Sequence[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.1f}" if np.isnan(low) else f"{mean:.1f} [{max(low, 0.0):.1f}, {high:.1f}]"


def method_table(plan: Plan) -> list[str]:
    """One row per method: means over the seeds with intervals; of one seed the intervals are over its prompts."""
    found = {method: [read_run(plan, method, seed) for seed in range(plan.seeds)] for method in METHODS}
    before = [run.words_before for run in found["dno_prct"]]
    lines = [
        f"{plan.seeds} seed{'s'[: plan.seeds > 1]}; policy 0 has {mean_of(before)} words",
        "",
        "| method | beats policy 0 | each seed | last policy | words | pairs | verdicts | judge reads | CPU |",
        "|---" * 9 + "|",
    ]
    for method, runs in found.items():
        rates = [run.win_rate for run in runs]
        cells = [
            METHODS[method],
            percent(rates) if len(runs) > 1 else percent([runs[0].win_rate], (runs[0].low, runs[0].high)),
            " ".join(f"{100 * rate:.0f}" for rate in rates),
            percent([run.last_win_rate for run in runs]),
            mean_of([run.words for run in runs]),
            f"{np.mean([run.pairs for run in runs]):,.0f}",
            f"{np.mean([run.verdicts for run in runs]):,.0f}",
            f"{np.mean([run.judge_tokens for run in runs]):,.0f}",
            f"{np.median([run.cpu_seconds for run in runs]):.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def against_table(plan: Plan) -> list[str]:
    """How often a row's policy beats a column's, the mean over seeds; * where that is told, over all pairs at once."""
    seeds: list[dict[str, Any]] = [
        json.loads((plan.folder(seed) / "compared.json").read_text())["judged"]["comparison"]
        for seed in range(plan.seeds)
    ]
    family = len(METHODS) * (len(METHODS) - 1) // 2
    lines = [f"| beats | {' | '.join(METHODS.values())} | mean |", "|---" * (len(METHODS) + 2) + "|"]
    for one in METHODS:
        cells, means = [], []
        for other in METHODS:
            if one == other:
                cells.append("")
                continue
            rates = [own["rates"][own["players"].index(one)][own["players"].index(other)] for own in seeds]
            mean, low, high = interval(rates, family=family)
            means.append(mean)
            cells.append(f"{100 * mean:.0f}{'*' if low > 0.5 or high < 0.5 else ''}")
        lines.append(f"| {METHODS[one]} | {' | '.join(cells)} | {100 * float(np.mean(means)):.1f} |")
    return lines


def write_tables(plan: Plan, page: Path | None) -> None:
    """Print the tables, keep them beside the runs, and put them into a page between its two marks, if there is one.

    Raises:
        SystemExit: the page has no such marks.
    """
    tables = "\n".join([*method_table(plan), "", *against_table(plan)])
    (plan.out / "tables.md").write_text(tables + "\n")
    print(tables)
    if page is not None:
        begin, end = (f"<!-- {word} of {plan.out.name} -->" for word in ("tables", "end"))
        text = page.read_text()
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{page}: expected the lines {begin} and {end}, between which the tables go")
        before, rest = text.split(begin)
        page.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or the path of a small base model")
    parser.add_argument("--prompts", type=Path, help="of a base model: beginnings of texts, rows of {prompt}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--page", type=Path, help="such as docs/results.md: where the tables are put, between marks")
    parser.add_argument("settings", nargs="*", help="fields to set in all runs, such as iterations=2")
    options = parser.parse_args()
    name = Path(options.model).name
    recipe, out = CONFIGS / ("demo.yaml" if name == "demo" else "stories.yaml"), options.out.absolute() / name
    settings = [*options.settings]
    if name != "demo":
        if options.prompts is None:
            parser.error("--model PATH wants --prompts")
        settings.append(f"model.path={Path(options.model).absolute()}")
        untaught = [*settings, f"prompts.path={options.prompts.absolute()}"]
        taught = write_teacher(Plan.of(recipe, untaught, seeds=options.seeds, out=out))
        settings.append(f"prompts.path={taught}")
    plan = Plan.of(recipe, settings, seeds=options.seeds, out=out)
    for seed in range(plan.seeds):
        for method in METHODS:
            run_method(plan, method, seed)
        compare_seed(plan, seed)
        write_tables(dataclasses.replace(plan, seeds=seed + 1), options.page)


if __name__ == "__main__":
    main()
