"""The run directory: where everything lies, who may write in it, and by which configuration it was made.

    <run_dir>/config.yaml FORMAT metrics.jsonl annotations.sqlite receipts.json report.html report/ tensorboard/ .lock
    <run_dir>/metrics/000001.jsonl ...    of a run in a bucket: what metrics.jsonl goes on with
    <run_dir>/policies/000/ ...  export/  aside/0/ ...
    <run_dir>/iterations/000/ prompts.jsonl rollouts/ judgements/ pairs/ reference/ train/ evaluation/

It lies in a file system. One in an object store is worked on in a folder of this machine, and mirrored (bucket/).
Nothing imports jax here.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from etils import epath

from dno_jax.bucket.place import is_url
from dno_jax.bucket.work import Bucket
from dno_jax.config import AnyConfig, RewardConfig, RunConfig, Section, SftConfig, dump_config, parse_config, read_yaml
from dno_jax.errors import DnoError
from dno_jax.files import explained, write_atomically
from dno_jax.stage_dir import StageDir

FORMAT = 2  # of what stages write; 1 had pairs without rows, and one digest over the whole configuration
_METRICS_BYTES = 1 << 16  # of a file of metrics that grows, in a bucket: its objects are written whole


class RunDir:
    """The root folder and where everything lies in it."""

    def __init__(self, path: str | os.PathLike[str]):
        """
        Raises:
            DnoError: it is a URL, and of no place in an object store.
        """
        self.bucket = Bucket.of(os.fspath(path)) if is_url(path) else None
        # Orbax takes absolute paths only.
        self.path = epath.Path(os.path.abspath(path) if self.bucket is None else os.fspath(self.bucket.folder))
        self.config_path = self.path / "config.yaml"
        self.format_path = self.path / "FORMAT"
        self.lock_path = self.path / ".lock"
        self.metrics_path = self.path / "metrics.jsonl"
        self.annotations_path = self.path / "annotations.sqlite"
        self.receipts_path = self.path / "receipts.json"
        self.report_path = self.path / "report.html"
        self.report_files_path = self.path / "report"
        self.tensorboard_path = self.path / "tensorboard"
        self.template_path = self.path / "template.txt"
        self.source_path = self.path / "policies" / "SOURCE.json"
        self.export_path = self.path / "export"
        self.exported_path = self.path / "exported.json"
        self.export_average_path = self.path / "export_average"
        self.aside_path = self.path / "aside"

    def policy(self, policy: int) -> epath.Path:
        """Orbax checkpoint of pi_t; 0 is the imported checkpoint."""
        return self.path / "policies" / f"{policy:03d}"

    @property
    def base_path(self) -> epath.Path:
        """Orbax checkpoint of the weights that every policy stands beside, where policy 0 is an adapter too."""
        return self.path / "policies" / "base"

    def iteration_path(self, iteration: int) -> epath.Path:
        return self.path / "iterations" / f"{iteration:03d}"

    def stage(self, stage: str, iteration: int) -> StageDir:
        return StageDir(self.path, stage, iteration)

    def prompts_path(self, iteration: int) -> epath.Path:
        return self.iteration_path(iteration) / "prompts.jsonl"

    def begun(self) -> list[int]:
        """Iterations that have a folder, in order."""
        root = self.path / "iterations"
        return sorted(int(p.name) for p in root.iterdir() if p.name.isdecimal()) if root.exists() else []

    def create(self, config: Section) -> None:
        """Make the directory, or check that this version of the program can resume in it, and note the configuration.

        What changed in the configuration is for the stages to judge: each compares what it reads.

        Raises:
            DnoError: the directory cannot be written, or was made by another version of the program.
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
        self._check_format()
        if not self.format_path.exists():
            write_atomically(self.format_path, f"{FORMAT}\n")
        write_atomically(self.config_path, dump_config(config))

    def _check_format(self) -> None:
        if not self.config_path.exists():
            return
        if not self.format_path.exists():
            self._tree()  # what has no configuration in it was made by no version
        noted = self.format_path.read_bytes() if self.format_path.exists() else b"1"
        found = noted.decode(errors="replace").strip()
        if found != str(FORMAT):
            raise DnoError(
                f"run_dir {self.path}: made by another version of dno_jax (format {found[:20] or 'unknown'}; this "
                f"one writes and reads {FORMAT}), whose pairs and manifests are laid out differently. Finish it with "
                "the version that made it, or give another run_dir; annotation.store can be its annotations.sqlite, "
                "so that no verdict is bought twice"
            )

    def fetch(self, *, weights: bool = False) -> None:
        """Bring what a bucket holds to this machine; nothing where the directory lies in a file system.

        Args:
            weights: policies and states of training too; without them those that are read are brought when they are.

        Raises:
            DnoError: it cannot be read.
        """
        if self.bucket is not None:
            self.bucket.fetch(weights=weights)

    def shown(self, path: epath.Path) -> str:
        """Where a person finds what lies at a path of the directory: in the bucket, if it is kept in one."""
        if self.bucket is None:
            return os.fspath(path)
        return f"{self.bucket.url}/{path.relative_to(self.path)}"

    @contextmanager
    def held(self, *, weights: bool = True) -> Iterator[None]:
        """Keep the directory to this process; what writes shards or policies does so inside. A kill lets go of it too.

        Some file systems have no locks: nothing is held there. Where it is kept in a bucket, what is made inside is
        uploaded.

        Args:
            weights: whether policies are read, which are then brought from the bucket first.

        Raises:
            DnoError: another process holds it, or a bucket refuses what is asked of it.
        """
        with self._held_here():
            if self.bucket is None:
                yield
            else:
                with self.bucket.working(weights=weights):
                    yield

    @contextmanager
    def written(self) -> Iterator[None]:
        """Keep a bucket's directory to this process, for what may run beside others in a file system."""
        with nullcontext() if self.bucket is None else self.held(weights=False):
            yield

    @contextmanager
    def _held_here(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # create() says what is wrong with the directory
            yield
            return
        try:
            with suppress(OSError):
                self._lock(file)
            yield
        finally:
            os.close(file)

    def holder(self) -> str | None:
        """Who works in the directory now; None where nobody does, or nobody can tell."""
        if self.bucket is not None:
            return self.bucket.holder()
        try:
            file = os.open(self.lock_path, os.O_RDONLY)
        except OSError:  # nobody has yet
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.pread(file, 1024, 0).decode(errors="replace").strip() or "another process"
        except OSError:
            return None
        finally:
            os.close(file)
        return None

    def paid(self) -> float | None:
        """Dollars that judges and teachers have been paid, where there are receipts."""
        try:
            return float(json.loads(self.receipts_path.read_text())["usd"])
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return None

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
        """The configuration with which the directory was last used.

        Raises:
            DnoError: there is none, it is damaged, or another version's.
        """
        tree = self._tree()
        self._check_format()
        return parse_config(kind, tree, place=str(self.config_path))

    def kind(self) -> type[AnyConfig]:
        """What the directory was made by: a run, a supervised fine-tuning, or the training of a reward model.

        Raises:
            DnoError: there is no configuration in it, or a damaged one.
        """
        tree = self._tree()
        if "prompts" in tree:
            return RunConfig
        return SftConfig if "data" in tree else RewardConfig if "pairs" in tree else RunConfig

    def metrics_paths(self) -> list[epath.Path]:
        """Files of metrics, in the order of their lines: metrics.jsonl, and what it goes on with in a bucket."""
        return [self.metrics_path, *sorted((self.path / "metrics").glob("*.jsonl"))]

    def _tree(self) -> dict[str, Any]:
        """The configuration as it stands in its file."""
        self.fetch()
        if not self.config_path.exists():
            known = " or its bucket is not there" if self.bucket is not None else ""
            place = os.fspath(self.path) if self.bucket is None else self.bucket.url
            raise DnoError(f"{place}: no run directory (it has no config.yaml{known})")
        try:
            tree = read_yaml(self.config_path.read_text(), place="it")
        except (DnoError, OSError, UnicodeDecodeError) as error:
            tree = str(error).split("\n")[0]
        if isinstance(tree, dict):
            return tree
        raise DnoError(
            f"{self.config_path}: damaged ({str(tree)[:80] if tree else 'empty'}); restore it from a copy, or remove "
            "it and start the same `dno run CONFIG` again: each stage has noted what it read of it"
        )

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to the metrics; what is no number (NaN, infinity) is null there, as in JSON."""
        path = self.metrics_paths()[-1]
        with explained(path):
            if self.bucket is not None and path.exists() and path.stat().length >= _METRICS_BYTES:
                number = int(path.stem) if path != self.metrics_path else 0
                path = self.path / "metrics" / f"{number + 1:06d}.jsonl"
                path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(_line(row))

    def read_metrics(self) -> list[dict[str, Any]]:
        return [row for path in self.metrics_paths() if path.exists() for row in _rows(path.read_text())]

    def forget_metrics(self, *, iteration: int, stage: str, from_step: int) -> None:
        """Drop the rows of steps that are about to be taken again after a restart, and lines that a crash cut short."""
        for path in self.metrics_paths():
            text = path.read_text() if path.exists() else ""
            kept = "".join(
                _line(row)
                for row in _rows(text)
                if (row.get("iteration"), row.get("stage")) != (iteration, stage) or row.get("step", -1) < from_step
            )
            if not kept and path != self.metrics_path:
                path.unlink()  # the next line belongs to the file before it
            elif kept != text:
                write_atomically(path, kept)


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):  # the line that a crash cut short: its step is logged again
            yield json.loads(line)


def _line(row: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
