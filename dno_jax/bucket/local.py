"""What lies in the folder of a run directory in a bucket, and what of it is known to lie in the bucket."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from dno_jax.errors import DnoError
from dno_jax.files import digest_of, write_atomically

RECORD = ".bucket.json"
# Written when all that they speak of is there: uploaded last.
_MARKS = ("MANIFEST.json", "FINGERPRINT", "_CHECKPOINT_METADATA", "exported.json", "mixture.json", "results.json")
_WRITTEN_ONCE = ("iterations", "policies", "export", "export_average", "aside", "profile", "states", "suites")
_HEAVY = re.compile(r"(policies/[^/]+/|iterations/[^/]+/train/states/|export(_average)?/|aside/|profile/|states/)\S")
_LIGHT_BYTES = 1 << 18
# What starts with a dot is somebody's own (locks, files being written), but for what arrays are described by.
_OWN = re.compile(
    r"\.(?!z(array|group|attrs|metadata)$)|.*\.sqlite-(wal|shm|journal)$|.*\.orbax-checkpoint-tmp|.*\.tmp$"
)


@dataclass(frozen=True)
class Known:
    """A file that is the same here and there.

    Attributes:
        sign: of the file here (see `signs`).
        size, sha256: of the object there; sha256 is empty where nobody has noted it.
    """

    sign: str
    size: int
    sha256: str


_PARTS = ("files", "elsewhere", "sent")


@dataclass
class Record:
    """What this folder knows of the bucket.

    Attributes:
        commit: of the index that `files` were in.
        files: by name, those of that index that are here.
        elsewhere: those of that index that are not: weights that nobody has asked for here, and what lies aside.
        sent: uploaded since, and in no index yet.
        doomed: names that no index has any more, to be deleted.
        pending: the commit of an index that is being written, over all that is here.
    """

    url: str
    commit: str = ""
    files: dict[str, Known] = field(default_factory=dict)
    elsewhere: dict[str, Known] = field(default_factory=dict)
    sent: dict[str, Known] = field(default_factory=dict)
    doomed: list[str] = field(default_factory=list)
    pending: str = ""

    @classmethod
    def read(cls, folder: Path, url: str) -> Record:
        """The record of a folder; a new one where there is none that can be read, or it is of another URL."""
        try:
            found = json.loads((folder / RECORD).read_text())
            parts = ({name: Known(*known) for name, known in found[part].items()} for part in _PARTS)
            if found["url"] == url:
                return cls(url, found["commit"], *parts, doomed=found["doomed"], pending=found["pending"])
        except (OSError, ValueError, LookupError, TypeError):
            pass
        return cls(url)

    def save(self, folder: Path) -> None:
        tree = {part: {name: astuple(known) for name, known in getattr(self, part).items()} for part in _PARTS}
        head = {"url": self.url, "commit": self.commit, "doomed": self.doomed, "pending": self.pending}
        write_atomically(folder / RECORD, json.dumps(head | tree))


def is_mark(name: str) -> bool:
    """Whether a file says that others are whole."""
    return name.rsplit("/", 1)[-1] in _MARKS


def changes_in_place(name: str) -> bool:
    """Whether a file is written again and again: figures, verdicts, reports; all others are written once."""
    return name.split("/")[0] not in _WRITTEN_ONCE


def is_weights(name: str, size: int) -> bool:
    """Whether a file is a part of arrays, which only who computes with them needs here."""
    return size > _LIGHT_BYTES and bool(_HEAVY.match(name))


def no_run_reads(name: str) -> bool:
    """Whether a file is of what was set aside, an export or a trace."""
    return name.split("/")[0] in ("aside", "export", "export_average", "profile")


def signs(folder: Path) -> dict[str, str]:
    """Names of all files to be kept in a bucket, and what tells whether one has changed: size and time."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _OWN.match(name)]
        for name in files:
            path = Path(root, name)
            if not _OWN.match(name) and not path.is_symlink() and (sign := sign_of(path)) is not None:
                found[path.relative_to(folder).as_posix()] = sign
    return found


def sign_of(path: Path) -> str | None:
    """Tell a file, as it is now, from what it was; None where there is none. A database's journal is a part of it."""
    try:
        found = path.stat()
        sign = f"{found.st_size}-{found.st_mtime_ns}"
        if path.suffix == ".sqlite":
            journal = path.with_name(f"{path.name}-wal")
            if journal.exists() and journal.stat().st_size:
                sign += f"-{journal.stat().st_size}-{journal.stat().st_mtime_ns}"
        return sign
    except FileNotFoundError:
        return None


@contextmanager
def whole(folder: Path, name: str) -> Iterator[tuple[Path, Known]]:
    """A file that does not change meanwhile, with the contents of this one as they are now, and what they are.

    Raises:
        FileNotFoundError: it is gone.
    """
    path = folder / name
    sign = sign_of(path)
    if sign is None:
        raise FileNotFoundError(path)
    if not changes_in_place(name):
        yield path, Known(sign, path.stat().st_size, digest_of(path))
        return
    with TemporaryDirectory(prefix=".upload-", dir=folder) as beside:
        still = Path(beside) / path.name
        if path.suffix == ".sqlite":
            _back_up(path, still)
        else:
            shutil.copyfile(path, still)
        yield still, Known(sign, still.stat().st_size, digest_of(still))


def _back_up(path: Path, to: Path) -> None:
    """Copy a database that others may be writing, with all that is committed.

    Raises:
        DnoError: it is damaged.
    """
    uri = f"{path.as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as source, closing(sqlite3.connect(to)) as copy:
            source.backup(copy)
    except sqlite3.Error as error:
        raise DnoError(
            f"{path}: {error}; it cannot be uploaded (docs/annotation.md, The store, says how a damaged one is "
            "recovered), and lies there as it is"
        ) from None
