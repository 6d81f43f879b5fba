"""A whole run directory held to what was written down of it: every byte is read once, and nothing is changed."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax
from etils import epath
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dno_jax.bucket.work import bring
from dno_jax.config import RunConfig
from dno_jax.console import results
from dno_jax.errors import DnoError
from dno_jax.files import digest_of
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import MANIFEST, STAGES, Manifest, StageDir, stage_names
from dno_jax.training.adapted import base_of
from dno_jax.training.checkpoint import (
    check_fingerprint,
    damaged_states,
    is_pruned,
    policy_fingerprint,
    stored_fingerprint,
)

_ORDER = list(STAGES)


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it was written.

    Attributes:
        place: relative to the run directory.
        redo: iteration and stage from which work is redone; None where something else helps, as `text` says.
    """

    place: str
    text: str
    redo: tuple[int, str] | None = None


@dataclass
class Verified:
    """What was found.

    Attributes:
        files, nbytes: that were read.
    """

    faults: list[Fault] = field(default_factory=list)
    files: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def redo(self) -> str | None:
        """The first place to redo from: all that follows is redone too."""
        places = [fault.redo for fault in self.faults if fault.redo is not None]
        if not places:
            return None
        iteration, stage = min(places, key=lambda place: (place[0], _ORDER.index(place[1])))
        return f"{stage.replace('_', '-')}:{iteration}"


def check(run_dir: RunDir, config: RunConfig) -> None:
    """Check a run directory and show what was found; on the processors, for its run may be at work on the accelerator.

    Raises:
        DnoError: something is not as it was written; it says from where to redo.
    """
    jax.config.update("jax_platforms", "cpu")
    found = verify(run_dir, config)
    results.print(render(found))
    if found.faults:
        count = f"{len(found.faults)} fault{'s' if len(found.faults) > 1 else ''}"
        redo = f", or redo from the first stage concerned: dno run CONFIG --from {found.redo}" if found.redo else ""
        raise DnoError(f"{run_dir.path}: {count} found; restore what is named above from a copy{redo}")


def verify(run_dir: RunDir, config: RunConfig) -> Verified:
    """Read everything that a run directory has a digest of, on the host's processors alone."""
    start, found = time.perf_counter(), Verified()
    for name in ("policies", "iterations", run_dir.export_path.name):
        bring(run_dir.path / name)
    for folder in sorted((run_dir.path / "policies").iterdir()) if (run_dir.path / "policies").exists() else ():
        if folder.name == run_dir.base_path.name or folder.name.split("-")[0].isdecimal():
            _policy(found, run_dir, folder)
    for iteration in run_dir.begun():
        for name in stage_names(config, iteration) if iteration < config.iterations else ():
            _stage(found, run_dir, run_dir.stage(name, iteration), config)
    for path in run_dir.metrics_paths():
        _lines(found, run_dir.path, path)
    _database(found, run_dir)
    _json(found, run_dir.path, run_dir.source_path)
    if _json(found, run_dir.path, run_dir.exported_path):
        _export(found, run_dir)
    found.seconds = time.perf_counter() - start
    return found


def _policy(found: Verified, run_dir: RunDir, folder: epath.Path) -> None:
    """Hold a policy's weights to the fingerprint beside them, and that to what its training noted."""
    trained = int(folder.name) - 1 if folder.name.isdecimal() else -1  # the base of all others is imported
    with _caught(found, run_dir, folder, redo=(trained, "train") if trained >= 0 else None):
        noted = policy_fingerprint(folder)
        manifest = run_dir.stage("train", trained).manifest() if trained >= 0 else None
        if noted is None:
            if manifest is not None:
                raise DnoError(f"{folder}: has lost its FINGERPRINT, which marks it whole")
            return  # being written, or left by a crash: the run writes it again
        _count(found, *_files_below(folder))
        if not is_pruned(folder):
            check_fingerprint(folder, noted, stored_fingerprint(folder))
        base_of(folder)
        if manifest is not None:
            check_fingerprint(folder, manifest.details["fingerprint"], noted)


def _stage(found: Verified, run_dir: RunDir, stage: StageDir, config: RunConfig) -> None:
    redo = (stage.iteration, stage.stage)
    manifest: Manifest | None = None
    with _caught(found, run_dir, stage.path, redo=redo):
        stage.changed(config)
        manifest = stage.manifest()
    shards = stage.all_shards()
    if manifest is None:
        if (stage.path / "states").exists():
            _states(found, run_dir, stage.path / "states")
        if not stage.manifest_path.exists():
            for path in shards.values():
                if path.suffix == ".jsonl":
                    _lines(found, run_dir.path, path, remedy="remove it, and the stage writes it again")
        return
    if stage.stage == "train" and not run_dir.policy(stage.iteration + 1).exists():
        place = _relative(run_dir.path, run_dir.policy(stage.iteration + 1))
        found.faults.append(Fault(place, "missing; train wrote it", redo))
    folders = {name.rpartition("/")[0] for name in manifest.outputs} | {""}
    for name in sorted({*shards, *manifest.outputs}):
        noted, path = manifest.outputs.get(name), shards.get(name)
        if path is None:
            file = stage.path / f"{name}{'.parquet' if stage.stage == 'pair' else '.jsonl'}"
            found.faults.append(Fault(_relative(run_dir.path, file), "missing", redo))
        elif noted is not None:
            _count(found, path)
            if digest_of(path) != noted:
                found.faults.append(Fault(_relative(run_dir.path, path), f"not as {stage.stage} wrote it", redo))
        elif name.rpartition("/")[0] in folders:
            found.faults.append(Fault(_relative(run_dir.path, path), f"not in {MANIFEST}", redo))
    _inputs(found, run_dir, stage, manifest)


def _states(found: Verified, run_dir: RunDir, folder: epath.Path) -> None:
    """See whether the train states of a training under way are whole; a damaged one is passed over by itself."""
    _count(found, *_files_below(folder))
    for step, damage in damaged_states(folder).items():
        text = f"{damage}; training goes on from the state before it by itself"
        found.faults.append(Fault(_relative(run_dir.path, folder / str(step)), text))


def _inputs(found: Verified, run_dir: RunDir, stage: StageDir, manifest: Manifest) -> None:
    """See that what a stage was made from is still what lies there; what names no file is checked when it runs."""
    for name, noted in manifest.inputs.items():
        path = run_dir.path / name
        if name.startswith("policies/"):
            try:
                now = policy_fingerprint(path)
            except DnoError:
                continue  # said of the policy
        elif name.startswith("iterations/"):
            now = digest_of(path) if path.exists() else None
        else:
            continue
        if now is not None and now != noted:
            found.faults.append(Fault(name, f"{stage.stage} was made from another one", (stage.iteration, stage.stage)))
        elif now is None and not any(fault.place == name for fault in found.faults):
            redo = _writer(name)
            again = "" if redo else "; `dno import` and `dno run` bring it again from model.path"
            found.faults.append(Fault(name, f"missing; {stage.stage} was made from it{again}", redo))


def _writer(name: str) -> tuple[int, str] | None:
    """Which stage writes a file that another one was made from; None of what is imported."""
    _, number, *parts = name.split("/")
    if not parts:  # a policy's folder
        return (int(number) - 1, "train") if number.isdecimal() and int(number) else None
    folders = {folder: stage for stage, folder in STAGES.items()}
    return int(number), folders.get(parts[0], "sample")  # prompts.jsonl is the sampler's


def _lines(found: Verified, root: epath.Path, path: epath.Path, *, remedy: str = "that line is skipped") -> None:
    """See that every line of a file is JSON, but for the last, which a crash may have cut short."""
    if not path.exists():
        return
    _count(found, path)
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip() and not _is_json(line):
            found.faults.append(Fault(_relative(root, path), f"line {number} is no JSON; {remedy}"))
            return


def _json(found: Verified, root: epath.Path, path: epath.Path) -> bool:
    """Whether a note is there and whole."""
    if not path.exists():
        return False
    _count(found, path)
    whole = _is_json(path.read_bytes())
    if not whole:
        found.faults.append(Fault(_relative(root, path), "no JSON; remove it: it is written again"))
    return whole


def _export(found: Verified, run_dir: RunDir) -> None:
    if not run_dir.export_path.exists():
        found.faults.append(Fault(_relative(run_dir.path, run_dir.export_path), "missing; `dno run` exports it again"))
        return
    for name, noted in json.loads(run_dir.exported_path.read_text()).get("files", {}).items():
        path = run_dir.export_path / name
        if path.exists():
            _count(found, path)
        if not path.exists() or digest_of(path) != noted:
            what = "not as it was exported" if path.exists() else "missing"
            text = f"{what}; remove the folder, and `dno run` exports the policy again"
            found.faults.append(Fault(_relative(run_dir.path, path), text))


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _database(found: Verified, run_dir: RunDir) -> None:
    path = run_dir.annotations_path
    if "://" in os.fspath(path) or not path.exists():
        return
    _count(found, path)
    try:
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            said = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        finally:
            database.close()
    except sqlite3.Error as error:
        said = str(error)
    if said not in ("ok", "database is locked"):
        text = f"{said.splitlines()[0]}; restore it, or move it away: judgements stay, what is asked anew is paid anew"
        found.faults.append(Fault(_relative(run_dir.path, path), text))


@contextmanager
def _caught(found: Verified, run_dir: RunDir, path: epath.Path, *, redo: tuple[int, str] | None) -> Iterator[None]:
    """Take a DnoError of the work inside as a fault."""
    try:
        yield
    except DnoError as error:
        said = str(error).replace(f"{os.fspath(run_dir.path)}/", "").split("; `dno status")[0]
        found.faults.append(Fault(_relative(run_dir.path, path), " ".join(said.split()), redo))


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _count(found: Verified, *paths: epath.Path) -> None:
    found.files += len(paths)
    found.nbytes += sum(path.stat().length for path in paths)


def _relative(root: epath.Path, path: epath.Path) -> str:
    return os.path.relpath(os.fspath(path), os.fspath(root))


def render(found: Verified) -> RenderableType:
    """The faults as a table, and what the check took."""
    took = f"read {found.files} files, {found.nbytes / 1e9:.3g} GB, in {found.seconds:.1f} s"
    if not found.faults:
        return Text(f"verified: everything is as it was written ({took})")
    table = Table(title=f"not as it was written ({took})", box=SIMPLE_HEAD)
    for column in ("place", "what", "redo from"):
        table.add_column(column, overflow="fold")
    for fault in found.faults:
        redo = "" if fault.redo is None else f"{fault.redo[1].replace('_', '-')}:{fault.redo[0]}"
        table.add_row(Text(fault.place), Text(fault.text), redo)
    return table
