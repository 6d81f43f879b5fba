"""The run directory: shards, manifests and digests, so that restarting is the normal case.

    <run_dir>/config.yaml  metrics.jsonl  annotations.sqlite  tensorboard/  policies/000/ ...  .lock
    <run_dir>/iterations/000/ prompts.jsonl rollouts/ judgements/ pairs/ reference/ train/ evaluation/

A stage writes closed shards (temporary file, then rename) and, last, MANIFEST.json. What has a manifest is done; what
has shards goes on after them. Paths are etils.epath, so a run directory may lie in an object store. Nothing here
imports jax.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml
from etils import epath
from pydantic import Field

from dno_jax.config import RunConfig, Section, changed_fields, dump_config, parse_config
from dno_jax.errors import DnoError
from dno_jax.files import digest_of, explained, write_atomically
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
MANIFEST = "MANIFEST.json"
_SHARDS = (".jsonl", ".parquet")  # one record per line, or a table


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


class Manifest(Record):
    """What a finished stage says of itself; its presence means that the stage is done.

    Attributes:
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


class StageDir:
    """One stage's folder: closed shards and, in the end, the manifest."""

    def __init__(self, root: epath.Path, stage: str, iteration: int, *, folder: str | None = None):
        self.root = root
        self.stage = stage
        self.iteration = iteration
        self.path = root / "iterations" / f"{iteration:03d}" / (folder or STAGES[stage])

    @property
    def manifest_path(self) -> epath.Path:
        return self.path / MANIFEST

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
        return read_manifest(self.manifest_path)

    def require(self) -> Manifest:
        manifest = self.manifest()
        if manifest is None:
            raise DnoError(
                f"{self.path}: stage {self.stage!r} of iteration {self.iteration} is not finished; "
                f"run `dno {self.stage.replace('_', '-')}` (or `dno run`) first"
            )
        return manifest

    def reference_of(self, path: epath.Path) -> dict[str, str]:
        """{path relative to the run directory: sha256}, an entry of a manifest's `inputs`."""
        return {os.path.relpath(os.fspath(path), os.fspath(self.root)): digest_of(path)}

    def finished(self, inputs: Mapping[str, str], *, config_digest: str) -> Manifest | None:
        """The manifest of an earlier call, if it was made from these very inputs.

        Raises:
            DnoError: an input or the configuration has changed since: the stage's files are stale.
        """
        manifest = self.manifest()
        if manifest is None:
            return None
        stale = [name for name in {**manifest.inputs, **inputs} if manifest.inputs.get(name) != inputs.get(name)]
        if manifest.config_digest != config_digest:
            stale.append("config.yaml")
        if stale:
            raise DnoError(
                f"{self.path}: made from other inputs than those now there ({', '.join(sorted(stale))}); "
                "remove the folder to make it anew"
            )
        return manifest

    def finish(
        self,
        *,
        config_digest: str,
        inputs: Mapping[str, str],
        rows: int,
        seconds: float,
        dropped: Mapping[str, int] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest over the shards that lie here, last."""
        manifest = Manifest(
            stage=self.stage,
            iteration=self.iteration,
            config_digest=config_digest,
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


class RunDir:
    """The root folder and where everything lies in it."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = epath.Path(path)
        self.config_path = self.path / "config.yaml"
        self.lock_path = self.path / ".lock"
        self.metrics_path = self.path / "metrics.jsonl"
        self.annotations_path = self.path / "annotations.sqlite"
        self.receipts_path = self.path / "receipts.json"
        self.report_path = self.path / "report.html"
        self.tensorboard_path = self.path / "tensorboard"
        self.template_path = self.path / "template.txt"
        self.export_path = self.path / "export"
        self.export_average_path = self.path / "export_average"

    def policy(self, policy: int) -> epath.Path:
        """Orbax checkpoint of pi_t; 0 is the imported checkpoint."""
        return self.path / "policies" / f"{policy:03d}"

    def auxiliary(self, policy: int) -> epath.Path:
        """Orbax checkpoint of pi'_t of the optimistic scheme; the first is policy 0 itself."""
        return self.path / "policies" / f"{policy:03d}-auxiliary" if policy else self.policy(0)

    def stage(self, stage: str, iteration: int) -> StageDir:
        return StageDir(self.path, stage, iteration)

    def prompts_path(self, iteration: int) -> epath.Path:
        return self.path / "iterations" / f"{iteration:03d}" / "prompts.jsonl"

    def open(self, config: Section) -> None:
        """Create the directory with its config.yaml, or check that it was made by this configuration.

        Raises:
            DnoError: the directory cannot be written, or was made by another configuration (naming the fields).
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise DnoError(
                f"run_dir {self.path}: cannot be written ({error.strerror or error}); give a directory that can"
            ) from None
        if self.config_path.exists():
            changed = changed_fields(self.load_config(type(config)), config)
            if changed:
                raise DnoError(
                    f"run_dir {self.path} was made by another configuration:\n  "
                    + "\n  ".join(changed)
                    + "\nset these fields back, or give another run_dir"
                )
        write_atomically(self.config_path, dump_config(config))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the directory to this process; what writes shards or policies does so inside. A kill lets go of it too.

        An object store has no locks, and neither have some file systems: nothing is held there.

        Raises:
            DnoError: another process holds it.
        """
        if "://" in os.fspath(self.path):
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # open() says what is wrong with the directory
            yield
            return
        try:
            with suppress(OSError):
                self._lock(file)
            yield
        finally:
            os.close(file)

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 1024, 0).decode(errors="replace").strip() or "another process"
            raise DnoError(
                f"run_dir {self.path}: in use by {holder}; wait until it ends, stop it, or give another run_dir (where "
                f"its machine has died and the file system has not noticed, remove {self.lock_path})"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def load_config(self, kind: type[Any] = RunConfig) -> Any:
        """The configuration the directory was made by."""
        if not self.config_path.exists():
            raise DnoError(f"{self.path}: no run directory (it has no config.yaml)")
        return parse_config(kind, yaml.safe_load(self.config_path.read_text()), place=str(self.config_path))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with explained(self.metrics_path), self.metrics_path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # the line that a crash cut short: its step is logged again
                continue
        return rows

    def forget_metrics(self, *, iteration: int, stage: str, from_step: int) -> None:
        """Drop the rows of steps that are about to be taken again after a restart."""
        rows = self.read_metrics()
        kept = [
            row
            for row in rows
            if (row.get("iteration"), row.get("stage")) != (iteration, stage) or row.get("step", -1) < from_step
        ]
        if len(kept) != len(rows):
            write_atomically(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))


def read_manifest(path: epath.Path) -> Manifest | None:
    if not path.exists():
        return None
    return next(parse_lines(Manifest, [path.read_text().replace("\n", " ")], place=str(path)))


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
