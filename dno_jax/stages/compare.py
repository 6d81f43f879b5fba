"""Runs side by side: where their configurations differ, what came of each, and their best policies against each other.

Nothing in the runs is changed, and figures of different judges are shown apart, never averaged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dno_jax.config import RunConfig
from dno_jax.data.pools import shown_text
from dno_jax.data.prompts import split_prompts
from dno_jax.errors import DnoError
from dno_jax.evaluation.audit import audit
from dno_jax.evaluation.matrix import win_rate_matrix
from dno_jax.records import Prompt
from dno_jax.run_dir import RunDir
from dno_jax.stages.evaluate import read_responses
from dno_jax.stages.held_out import Asked, Players, compare
from dno_jax.stages.suites import results_of


@dataclass(frozen=True)
class Run:
    """One run as far as it is.

    Attributes:
        name: the directory's, made different from the others'.
        settings: dotted field -> value.
        iterations: what each finished evaluation said: the manifest's details.
        missing: what is not there yet, in a sentence; empty of a run that is done.
    """

    name: str
    path: str
    config: RunConfig
    settings: dict[str, Any]
    iterations: dict[int, dict[str, Any]]
    suites: list[dict[str, Any]]
    missing: str

    @property
    def judge(self) -> str:
        """Who judged its held-out responses last; empty where nobody did."""
        return next((str(found["judge"]) for found in reversed(self.iterations.values()) if found.get("judge")), "")

    @property
    def best(self) -> int | None:
        return int(self.iterations[max(self.iterations)]["best"]) if self.iterations else None


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        differences: dotted field -> value by run, of fields that are not the same in all; None where a run has none.
        judged: the matrix of the best policies, where they were judged against each other, and what it warns of.
        notes: what a reader has to know before comparing numbers.
    """

    runs: list[Run]
    differences: dict[str, dict[str, Any]]
    judged: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "runs": [
                {
                    "name": run.name,
                    "path": run.path,
                    "judge": run.judge,
                    "best": run.best,
                    "missing": run.missing,
                    "iterations": {str(t): _kept(details) for t, details in run.iterations.items()},
                    "suites": run.suites,
                }
                for run in self.runs
            ],
            "differences": self.differences,
            "judged": self.judged,
            "notes": self.notes,
        }


def run(paths: Sequence[str], judge: RunConfig | None = None) -> Comparison:
    """Read runs and set them side by side.

    Args:
        judge: whose evaluation judge compares the runs' best policies on the held-out prompts that all share; its
            store, prices and limit are used, and its run directory takes verdicts and receipts.

    Raises:
        DnoError: fewer than two runs, one that is no run directory, or, to be judged, runs without held-out prompts in
            common.
    """
    places: dict[str, str] = {}
    for path in paths:
        if (other := places.get(os.path.realpath(path))) is not None:
            raise DnoError(f"dno compare: {path} and {other} are one run directory; name each once")
        places[os.path.realpath(path)] = path
    if len(paths) < 2:
        raise DnoError(f"dno compare takes two or more run directories, got {', '.join(paths) or 'none'}")
    runs = [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    notes = [f"{run.name}: {run.missing}" for run in runs if run.missing]
    judges: dict[str, list[str]] = {}
    for one in runs:
        if one.judge:
            judges.setdefault(one.judge, []).append(one.name)
    if len(judges) > 1:
        told = "; ".join(f"{', '.join(names)} by {identity}" for identity, names in judges.items())
        notes.append(
            f"different judges: {told}. Their win rates are of different scales and are not averaged; give --judge "
            "CONFIG to have one judge compare the policies"
        )
    sizes = {one.name: len(_held_out(one)) for one in runs if one.best is not None}
    shared = set.intersection(*(set(_held_out(one)) for one in runs)) if len(sizes) == len(runs) else set()
    if any(size != len(shared) for size in sizes.values()):
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        notes.append(f"different held-out prompts ({told}; {len(shared)} in common): win rates are not comparable")
    notes += _leaks(runs)
    judged = _judged(runs, judge, shared) if judge is not None else None
    return Comparison(runs, _differences({one.name: one.settings for one in runs}), judged, notes)


def _read(path: str, name: str) -> Run:
    run_dir = RunDir(path)
    if run_dir.kind() is not RunConfig:
        raise DnoError(f"{path}: a directory of one training, which has no held-out evaluation; give run directories")
    config: RunConfig = run_dir.load_config()
    found = {t: run_dir.stage("evaluate", t).manifest() for t in range(config.iterations)}
    iterations = {t: manifest.details for t, manifest in found.items() if manifest is not None}
    missing = ""
    if len(iterations) < config.iterations:
        done = f"{len(iterations)} of {config.iterations} iterations are evaluated"
        missing = f"half-finished: {done}; what is shown is of these"
    if iterations and "comparison" not in iterations[max(iterations)] and "matrix" not in iterations[max(iterations)]:
        why = str(iterations[max(iterations)].get("why", "nothing was judged"))
        missing = f"{missing + '; ' if missing else ''}nothing was compared ({why})"
    settings = dict(_flat(config.model_dump(mode="json")))
    return Run(name, str(run_dir.path), config, settings, iterations, results_of(run_dir), missing)


def _names(paths: Sequence[str]) -> list[str]:
    """The directories' names; where two are alike, as much of their paths as tells them apart."""
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        return [pair for name, value in tree.items() for pair in _flat(value, f"{prefix}{name}.")]
    if isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        return [pair for number, value in enumerate(tree) for pair in _flat(value, f"{prefix}{number}.")]
    return [(prefix.rstrip("."), tree)]


def _differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fields that are not the same in all runs, by run; where a run lies is no difference."""
    names = dict.fromkeys(name for own in settings.values() for name in own)
    found = {name: {run: own.get(name) for run, own in settings.items()} for name in names if name != "run_dir"}
    first = next(iter(settings))
    return {name: values for name, values in found.items() if any(v != values[first] for v in values.values())}


def _kept(details: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of an evaluation."""
    names = ("policy", "best", "win_rates", "lengths", "comparison", "guard", "warnings", "judge")
    return {name: details[name] for name in names if name in details}


def _held_out(run: Run) -> dict[str, dict[int, str]]:
    """Prompt id -> sample -> what a judge reads of the best policy's response."""
    if run.best is None:
        return {}
    section = run.config.evaluation_judge
    found: dict[str, dict[int, str]] = {}
    for row in read_responses(RunDir(run.path), run.best, num_samples=run.config.evaluation.num_samples):
        found.setdefault(row.prompt_id, {})[row.sample] = shown_text(row, reasoning=section.shows_reasoning)
    return found


def _leaks(runs: Sequence[Run]) -> list[str]:
    """Held-out prompts of one run that another one was trained on."""
    notes = []
    for run in runs:
        held_out = set(_held_out(run))
        for other in runs:
            if other is run or not held_out:
                continue
            trained = {
                line_id for t in RunDir(other.path).begun() for line_id in _prompt_ids(RunDir(other.path), t)
            } & held_out
            if trained:
                notes.append(
                    f"{len(trained)} of {run.name}'s held-out prompts are among those {other.name} was trained on: "
                    "it is measured on what it has seen"
                )
    return notes


def _prompt_ids(run_dir: RunDir, iteration: int) -> set[str]:
    path = run_dir.prompts_path(iteration)
    if not path.exists():
        return set()
    return {Prompt.model_validate_json(line).prompt_id for line in path.read_text().split("\n") if line.strip()}


def _judged(runs: Sequence[Run], judge: RunConfig, shared: set[str]) -> dict[str, Any]:
    if missing := [run.name for run in runs if run.best is None]:
        raise DnoError(f"--judge: {', '.join(missing)}: nothing is evaluated there yet, so no policy is the best one")
    if not shared:
        raise DnoError("--judge: the runs have no held-out prompt in common; give runs of one set of held-out prompts")
    if not judge.evaluation_judge.is_judge:
        raise DnoError(
            f"--judge: annotation.kind={judge.evaluation_judge.kind} cannot compare responses: give evaluation."
            "annotation a judge (oracle, openai, ensemble, table, python)"
        )
    prompts = {prompt.prompt_id: prompt for prompt in split_prompts(runs[0].config).held_out}
    texts = {run.name: _held_out(run) for run in runs}
    groups = [
        Players(prompts[prompt_id], sample, {name: own[prompt_id][sample] for name, own in texts.items()})
        for prompt_id in sorted(shared & prompts.keys())
        for sample in sorted(set.intersection(*(set(own[prompt_id]) for own in texts.values())))
    ]
    field_name = "annotation" if judge.evaluation.annotation is None else "evaluation.annotation"
    run_dir = RunDir(judge.run_dir)
    asked = Asked(judge.evaluation_judge, field_name, "dno compare", "compare", judge.seed)
    with run_dir.written():
        run_dir.path.mkdir(parents=True, exist_ok=True)
        found = compare(groups, asked, run_dir)
    if not found.rows:
        raise DnoError("--judge: no verdict on any of the runs' responses")
    matrix = win_rate_matrix(found.rows, policies=[run.name for run in runs])
    return {
        "judge": found.judge,
        "policies": {run.name: run.best for run in runs},
        "prompts": len(matrix.comparisons.prompts),
        "comparison": matrix.as_dict() | {"neighbours": [], "stop": ""},  # runs have no order
        "warnings": audit(matrix, found.quality, judge.evaluation_judge.quality, judge.evaluation),
    }
