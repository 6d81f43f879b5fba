"""What a run has written down of itself, read once for its report; what cannot be read is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dno_jax.config import RunConfig
from dno_jax.errors import DnoError
from dno_jax.report.training import ITERATION
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import Manifest, stage_names

T = TypeVar("T")
_PRUNED = "PRUNED"


@dataclass
class Facts:
    """A run's manifests, metrics and receipts.

    Attributes:
        manifests: of finished stages, by (iteration, stage).
        missing: what the run, or this reader, lacks, in sentences.
    """

    run_dir: RunDir
    config: RunConfig
    manifests: dict[tuple[int, str], Manifest] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    receipts: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def of(self, stage: str) -> Iterator[tuple[int, Manifest]]:
        """Every iteration in which a stage is finished."""
        for iteration in range(self.config.iterations):
            if (manifest := self.manifests.get((iteration, stage))) is not None:
                yield iteration, manifest

    def details(self, stage: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for iteration, manifest in self.of(stage):
            yield iteration, manifest.details

    @property
    def evaluated(self) -> dict[str, Any] | None:
        """The last evaluation that compared policies."""
        found = [details for _, details in self.details("evaluate") if "matrix" in details]
        return found[-1] if found else None

    @property
    def wall_seconds(self) -> float:
        found = (row.get("wall_seconds") or 0.0 for row in self.metrics if row.get("stage") == ITERATION)
        return float(sum(found))

    def tried(self, read: Callable[[], T]) -> T | None:
        """What a reader returns; where something is damaged or gone, that is told and nothing is returned."""
        try:
            return read()
        except DnoError as error:
            self.tell(str(error))
            return None

    def tell(self, sentence: str) -> None:
        if sentence not in self.missing:
            self.missing.append(sentence)


def read_facts(run_dir: RunDir, config: RunConfig) -> Facts:
    """Read what a run has written down, whatever its state."""
    facts = Facts(run_dir, config)
    facts.metrics = facts.tried(run_dir.read_metrics) or []
    facts.receipts = facts.tried(lambda: _receipts(run_dir)) or {}
    for iteration in range(config.iterations):
        for name in stage_names(config, iteration):
            if manifest := facts.tried(run_dir.stage(name, iteration).manifest):
                facts.manifests[iteration, name] = manifest
    _tell_stages(facts)
    _tell_policies(facts)
    if not any("matrix" in details for _, details in facts.details("evaluate")) and list(facts.of("evaluate")):
        facts.tell("Win rates are not measured: the run has no held-out prompts (prompts.held_out or held_out_path).")
    return facts


def _receipts(run_dir: RunDir) -> dict[str, Any]:
    if not run_dir.receipts_path.exists():
        return {}
    try:
        found = json.loads(run_dir.receipts_path.read_text())
        return found if isinstance(found["usd"], int | float) else {}
    except (ValueError, LookupError, TypeError):
        raise DnoError(f"{run_dir.receipts_path}: damaged; `dno annotations list` reads the store itself") from None


def _tell_stages(facts: Facts) -> None:
    """Where the run stands: the first stage that is not finished, and how many come after it."""
    run_dir, config = facts.run_dir, facts.config
    left = [
        (iteration, name)
        for iteration in range(config.iterations)
        for name in stage_names(config, iteration)
        if (iteration, name) not in facts.manifests
    ]
    if left:
        iteration, name = left[0]
        shards = len(run_dir.stage(name, iteration).shard_paths())
        state = f"has {shards} shards so far" if shards else "is not done"
        after = f"; {len(left) - 1} stages come after it" if len(left) > 1 else ""
        facts.tell(f"The run is unfinished: {name} of iteration {iteration} {state}{after}.")
    elif not run_dir.export_path.exists():
        facts.tell("The best policy is not exported: start `dno run` once more, or use `dno export`.")


def _tell_policies(facts: Facts) -> None:
    trained = [0] if facts.manifests else []
    trained += [iteration + 1 for iteration, _ in facts.of("train")]
    for policy in trained:
        path = facts.run_dir.policy(policy)
        if not path.exists():
            facts.tell(f"The weights of policy {policy} are gone ({path.name} is not under policies/).")
        elif (path / _PRUNED).exists():
            facts.tell(f"The weights of policy {policy} were removed (training.keep_policies); its figures stay.")
