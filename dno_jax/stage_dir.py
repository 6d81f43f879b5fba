"""One stage's folder: closed shards and, in the end, a manifest; so that restarting is the normal case.

What a stage is made from is noted twice: STARTED.json, when it begins, holds the configuration that it reads, so that
shards of two configurations never mix; MANIFEST.json, written last, holds that configuration's digest and the digests
of every input and shard. What has a manifest is done; what has shards resumes after them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from etils import epath
from pydantic import Field

from dno_jax.config import RunConfig, Section, changes, deciding, stage_digest
from dno_jax.errors import DnoError
from dno_jax.files import digest_of, write_atomically
from dno_jax.records import Record, parse_lines

RecordT = TypeVar("RecordT", bound=Record)

# Stage name -> folder under iterations/<t>/, in the order in which an iteration runs them.
STAGES = {
    "teach": "gold",
    "sample": "rollouts",
    "annotate": "judgements",
    "pair": "pairs",
    "score_auxiliary": "auxiliary/reference",
    "train_auxiliary": "auxiliary/train",
    "score": "reference",
    "train": "train",
    "evaluate": "evaluation",
}
MANIFEST, STARTED = "MANIFEST.json", "STARTED.json"
_SHARDS = (".jsonl", ".parquet")  # one record per line, or a table
_RECORDED_PACKAGES = (
    "dno_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "openai",
    "numpy",
)


def stage_names(config: RunConfig, iteration: int) -> tuple[str, ...]:
    """The stages that an iteration of this configuration runs, in order."""
    scheme = config.outer.scheme
    left_out = {"score_auxiliary", "train_auxiliary"} if scheme != "optimistic" else set()
    if config.annotation.teacher is None:
        left_out.add("teach")
    if is_lookahead(config, iteration):
        left_out |= {"teach", "sample", "annotate"}
    return tuple(name for name in STAGES if name not in left_out)


def is_lookahead(config: RunConfig, iteration: int) -> bool:
    """Whether this iteration restarts from policy 0 on the pairs of all others (DNO-Lookahead)."""
    return config.outer.scheme == "lookahead" and iteration == config.iterations - 1


class Manifest(Record):
    """What a finished stage says of itself; its presence means that the stage is done.

    Attributes:
        config_digest: of what the stage reads of the configuration.
        inputs: path (relative to the run directory) -> sha256 of every manifest or file the stage read.
        outputs: shard name -> sha256.
        rows: records written.
        dropped: reason -> count of what went in and did not come out.
        seconds: wall time of the call that finished the stage.
        details: figures of the stage's own.
    """

    stage: str
    iteration: int = Field(ge=0)
    config_digest: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: int
    dropped: dict[str, int] = {}
    seconds: float = 0.0
    details: dict[str, Any] = {}
    versions: dict[str, str] = {}
    git: str = ""


class Started(Record):
    """What a stage reads of the configuration: dotted name -> value."""

    config: dict[str, Any]


class StageDir:
    """The folder of one stage of one iteration."""

    def __init__(self, root: epath.Path, stage: str, iteration: int, *, folder: str | None = None):
        self.root = root
        self.stage = stage
        self.iteration = iteration
        self.path = root / "iterations" / f"{iteration:03d}" / (folder or STAGES[stage])

    @property
    def manifest_path(self) -> epath.Path:
        return self.path / MANIFEST

    @property
    def reads(self) -> Any:
        """The stage whose fields this one reads: an auxiliary one reads as its like does."""
        return self.stage.removesuffix("_auxiliary")

    def sub(self, name: str) -> StageDir:
        """A folder of shards inside this one, for a stage that writes more than one kind of row."""
        return StageDir(self.root, self.stage, self.iteration, folder=f"{STAGES[self.stage]}/{name}")

    def write_shard(self, name: str, records: Iterable[Record]) -> None:
        """Close one shard: all rows or, after a crash, none."""
        write_atomically(self.path / f"{name}.jsonl", "".join(record.model_dump_json() + "\n" for record in records))

    def shard_names(self) -> list[str]:
        """Names of the closed shards, sorted."""
        return sorted(self._shards())

    def _shards(self) -> dict[str, epath.Path]:
        if not self.path.exists():
            return {}
        found = (path for path in self.path.iterdir() if path.suffix in _SHARDS and not path.name.startswith("."))
        return {path.stem: path for path in found}

    def read_shard(self, kind: type[RecordT], name: str) -> list[RecordT]:
        path = self.path / f"{name}.jsonl"
        # Not splitlines(), which also parts at U+2028 and its like: JSON has them raw inside of strings.
        return list(parse_lines(kind, path.read_text().split("\n"), place=str(path)))

    def read(self, kind: type[RecordT]) -> Iterator[RecordT]:
        """Every row of every closed shard, in order of shard name."""
        for name in self.shard_names():
            yield from self.read_shard(kind, name)

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the stage is unfinished."""
        if not self.manifest_path.exists():
            return None
        text = self.manifest_path.read_text().replace("\n", " ")
        return next(parse_lines(Manifest, [text], place=str(self.manifest_path)))

    def require(self) -> Manifest:
        manifest = self.manifest()
        if manifest is None:
            raise DnoError(
                f"{self.path}: stage {self.stage!r} of iteration {self.iteration} is not finished; "
                f"run `dno {self.stage.replace('_', '-')}` (or `dno run`) first"
            )
        return manifest

    def input_digest(self, path: epath.Path) -> dict[str, str]:
        """{path relative to the run directory: sha256}, an entry of a manifest's `inputs`."""
        return {os.path.relpath(os.fspath(path), os.fspath(self.root)): digest_of(path)}

    def changed(self, config: Section) -> list[str]:
        """Fields of the configuration that this stage reads and was begun with other values of; one line per field."""
        path = self.path / STARTED
        if not path.exists():
            return []
        text = path.read_text().replace("\n", " ")
        started = next(parse_lines(Started, [text], place=str(path)))
        return changes(started.config, deciding(config, self.reads))

    def finished(self, config: Section, inputs: Mapping[str, str]) -> Manifest | None:
        """The manifest of an earlier call, if it was made from this configuration and these very inputs.

        Raises:
            DnoError: an input or the configuration has changed since: the stage's files are stale.
        """
        if changed := self.changed(config):
            raise DnoError(stale_message(self, changed))
        manifest = self.manifest()
        if manifest is None:
            return None
        stale = [name for name in {**manifest.inputs, **inputs} if manifest.inputs.get(name) != inputs.get(name)]
        if manifest.config_digest != stage_digest(config, self.reads):
            stale.append("the configuration")
        if stale:
            raise DnoError(
                f"{self.path}: made from other inputs than those now there ({', '.join(sorted(stale))}); restore them, "
                f"or redo it: dno run CONFIG --from {self.stage}:{self.iteration}"
            )
        return manifest

    def start(self, config: Section) -> None:
        """Note what this stage reads of the configuration, before its first shard; once."""
        path = self.path / STARTED
        if not path.exists():
            started = Started(config=deciding(config, self.reads))
            write_atomically(path, started.model_dump_json(indent=2) + "\n")

    def finish(
        self,
        config: Section,
        *,
        inputs: Mapping[str, str],
        rows: int,
        seconds: float,
        dropped: Mapping[str, int] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest over the shards that lie here, last."""
        self.start(config)
        manifest = Manifest(
            stage=self.stage,
            iteration=self.iteration,
            config_digest=stage_digest(config, self.reads),
            inputs=dict(inputs),
            outputs={name: digest_of(path) for name, path in sorted(self._shards().items())},
            rows=rows,
            dropped=dict(dropped or {}),
            seconds=round(seconds, 3),
            details=dict(details or {}),
            versions=_versions(),
            git=_git_revision(),
        )
        write_atomically(self.manifest_path, manifest.model_dump_json(indent=2) + "\n")
        return manifest


def stale_message(stage: StageDir, changed: list[str]) -> str:
    """Say which fields a stage was begun with other values of, and what can be done."""
    lines = "\n  ".join(changed)
    return (
        f"{stage.path}: {stage.stage} of iteration {stage.iteration} was made by another configuration:\n  {lines}\n"
        f"Set these fields back; or redo it and all that follows from it, with what is there kept aside: "
        f"dno run CONFIG --from {stage.stage}:{stage.iteration}; or give another run_dir"
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> str:
    """The revision of the checkout this package runs from; empty for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
