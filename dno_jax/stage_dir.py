"""One stage's folder: closed shards and, in the end, a manifest; so that restarting is the normal case.

What a stage is made from is noted twice: STARTED.json, when it begins, holds the configuration that it reads, so that
shards of two configurations never mix; MANIFEST.json, written last, holds that configuration's digest and the digests
of every input and shard. What has a manifest is done; what has shards resumes after them.

What lies on disk is not taken on trust: a manifest is held to its own seal, and each shard to the manifest's digest,
over the very bytes that are then parsed, so that nothing is read twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from etils import epath
from pydantic import Field

from dno_jax.bucket.work import changed
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
    left_out: set[str] = set()
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
        outputs: shard name -> sha256; a folder's shards by "folder/name".
        rows: records written.
        dropped: reason -> count of what went in and did not come out.
        seconds: wall time of the call that finished the stage.
        details: figures of the stage's own.
        seal: sha256 of all the rest, so that an edit by hand is noticed; empty in those of earlier versions.
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
    seal: str = ""


class Started(Record):
    """What a stage reads of the configuration: dotted name -> value."""

    config: dict[str, Any]


class StageDir:
    """The folder of one stage of one iteration."""

    def __init__(self, root: epath.Path, stage: str, iteration: int, *, inside: tuple[StageDir, str] | None = None):
        self.root = root
        self.stage = stage
        self.iteration = iteration
        self._inside = inside  # the stage's own folder, and the name of this one in it
        home, name = inside or (None, STAGES[stage])
        self.path = (root / "iterations" / f"{iteration:03d}" if home is None else home.path) / name
        self._manifest: tuple[str, Manifest] | None = None  # its text, and what was read of it

    @property
    def manifest_path(self) -> epath.Path:
        return self.path / MANIFEST

    @property
    def redo(self) -> str:
        """How the stage is run again, with what is there kept aside."""
        return f"dno run CONFIG --from {self.stage.replace('_', '-')}:{self.iteration}"

    def sub(self, name: str) -> StageDir:
        """A folder of shards inside this one, for a stage that writes more than one kind of row."""
        return StageDir(self.root, self.stage, self.iteration, inside=(self, name))

    def write_shard(self, name: str, records: Iterable[Record]) -> None:
        """Close one shard: all rows or, after a crash, none."""
        write_atomically(self.path / f"{name}.jsonl", "".join(record.model_dump_json() + "\n" for record in records))

    def shard_names(self) -> list[str]:
        """Names of the closed shards, sorted.

        Raises:
            DnoError: the stage is finished, and these are not the shards that it wrote.
        """
        noted = self._noted()  # asked first: a stage that finishes meanwhile has written its shards before
        found = self.shard_paths()
        if noted is None:
            return sorted(found)
        missing, strange = sorted(set(noted) - set(found)), sorted(set(found) - set(noted))
        if missing or strange:
            what = f"{_some(missing)} of {len(noted)} shards missing" if missing else f"{_some(strange)} not its own"
            raise DnoError(f"{self.path}: {what}, by the stage's manifest; {self._remedy(missing=bool(missing))}")
        return sorted(found)

    def shard_paths(self) -> dict[str, epath.Path]:
        """Closed shards that lie here, by name, whatever a manifest says."""
        if not self.path.exists():
            return {}
        found = (path for path in self.path.iterdir() if path.suffix in _SHARDS and not path.name.startswith("."))
        return {path.stem: path for path in found}

    def read_shard(self, kind: type[RecordT], name: str) -> list[RecordT]:
        """Parse one closed shard.

        Raises:
            DnoError: it is missing, malformed, or, where the stage is finished, not as it was written.
        """
        path, noted = self.path / f"{name}.jsonl", self._noted()
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DnoError(f"{path}: cannot be read (it is missing); {self._remedy(missing=True)}") from None
        if noted is not None:
            self._check(path, noted.get(name), hashlib.sha256(content).hexdigest())
        try:
            # Not splitlines(), which also parts at U+2028 and its like: JSON has them raw inside of strings.
            return list(parse_lines(kind, content.decode().split("\n"), place=str(path)))
        except (DnoError, UnicodeDecodeError) as error:
            place = "" if isinstance(error, DnoError) else f"{path}: "
            remedy = "remove the file, and the stage writes it again" if noted is None else self._remedy()
            raise DnoError(f"{place}{error}; {remedy}") from None

    def read(self, kind: type[RecordT]) -> Iterator[RecordT]:
        """Every row of every closed shard, in order of shard name; raises as `shard_names` and `read_shard`."""
        for name in self.shard_names():
            yield from self.read_shard(kind, name)

    def table_path(self, name: str) -> epath.Path:
        """Where a closed table lies, for readers that open it themselves; read through once, to hold it to its digest.

        Raises:
            DnoError: it is missing, or not as it was written.
        """
        path, noted = self.path / f"{name}.parquet", self._noted()
        if not path.exists():
            raise DnoError(f"{path}: cannot be read (it is missing); {self._remedy(missing=True)}")
        if noted is not None:
            self._check(path, noted.get(name), digest_of(path))
        return path

    def _noted(self) -> dict[str, str] | None:
        """The digests of this folder's shards by the stage's manifest; None where it has none, or none of them."""
        home, name = self._inside or (self, "")
        manifest = home.manifest()
        if manifest is None:
            return None
        if not name:
            return {shard: digest for shard, digest in manifest.outputs.items() if "/" not in shard}
        own = {shard: digest for shard, digest in manifest.outputs.items() if shard.startswith(f"{name}/")}
        return {shard.removeprefix(f"{name}/"): digest for shard, digest in own.items()} or None

    def _check(self, path: epath.Path, noted: str | None, found: str) -> None:
        if noted != found:
            said = "does not name it" if noted is None else f"has sha256 {noted[:12]}, the file {found[:12]}"
            raise DnoError(
                f"{path}: not as the stage wrote it: its manifest {said}. Bits have changed on disk, or somebody has "
                f"edited it; {self._remedy()}"
            )

    def _remedy(self, *, missing: bool = False) -> str:
        # Redoing an evaluation keeps its folders of responses: a bad file would be taken for a good one.
        removed = "remove it and " if self._inside and not missing else ""
        return (
            f"{'put it back' if missing else 'restore it'} from a copy, or {removed}redo the stage and what follows: "
            f"{self.redo}; `dno status {os.fspath(self.root)} --verify` checks everything else"
        )

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the stage is unfinished.

        Raises:
            DnoError: it is damaged, or was edited.
        """
        if not self.manifest_path.exists():
            return None
        text = self.manifest_path.read_text()
        if self._manifest is None or self._manifest[0] != text:
            found = self._parse(Manifest, text, self.manifest_path)
            if found.seal and found.seal != _seal(text):
                raise DnoError(
                    f"{self.manifest_path}: edited since the stage wrote it (its seal is of other contents; it says "
                    f"{found.rows} rows); {self._remedy()}"
                )
            self._manifest = text, found
        return self._manifest[1]

    def _parse(self, kind: type[RecordT], text: str, path: epath.Path) -> RecordT:
        if not text.strip():
            raise DnoError(f"{path}: empty, as a full disk or a crash of the machine leaves a file; {self._remedy()}")
        try:
            return next(parse_lines(kind, [text.replace("\n", " ")], place=str(path)))
        except DnoError as error:
            raise DnoError(f"{error}; {self._remedy()}") from None

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
        started = self._parse(Started, path.read_text(), path)
        return changes(started.config, deciding(config, self.stage))

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
        if manifest.config_digest != stage_digest(config, self.stage):
            stale.append("the configuration")
        if stale:
            raise DnoError(
                f"{self.path}: made from other inputs than those now there ({', '.join(sorted(stale))}); restore them, "
                f"or redo it: {self.redo}"
            )
        return manifest

    def start(self, config: Section) -> None:
        """Note what this stage reads of the configuration, before its first shard; once."""
        path = self.path / STARTED
        if not path.exists():
            started = Started(config=deciding(config, self.stage))
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
            config_digest=stage_digest(config, self.stage),
            inputs=dict(inputs),
            outputs={name: digest_of(path) for name, path in sorted(self.all_shards().items())},
            rows=rows,
            dropped=dict(dropped or {}),
            seconds=round(seconds, 3),
            details=dict(details or {}),
            versions=versions(),
            git=_git_revision(),
        )
        manifest = manifest.model_copy(update={"seal": _seal(manifest.model_dump_json())})
        write_atomically(self.manifest_path, manifest.model_dump_json(indent=2) + "\n")
        changed(self.root)
        return manifest

    def all_shards(self) -> dict[str, epath.Path]:
        """Closed shards of the stage, those of its folders too, by the names that a manifest gives them."""
        found = self.shard_paths()
        for folder in self.path.iterdir() if self.path.exists() else ():
            if folder.is_dir():
                found |= {f"{folder.name}/{n}": path for n, path in self.sub(folder.name).shard_paths().items()}
        return found


def _seal(text: str) -> str:
    """sha256 of what a manifest says, but for its seal; how it is laid out does not matter."""
    said = {name: value for name, value in json.loads(text).items() if name != "seal"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def stale_message(stage: StageDir, changed: list[str]) -> str:
    """Say which fields a stage was begun with other values of, and what can be done."""
    lines = "\n  ".join(changed)
    return (
        f"{stage.path}: {stage.stage} of iteration {stage.iteration} was made by another configuration:\n  {lines}\n"
        f"Set these fields back; or redo it and all that follows from it, with what is there kept aside: "
        f"{stage.redo}; or give another run_dir"
    )


def versions() -> dict[str, str]:
    """Of the packages that results may depend on."""
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
