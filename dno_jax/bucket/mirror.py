"""A run directory in a bucket and the folder in which it is worked on, kept the same.

What the bucket holds is what its index names, with sizes and digests; the index is written last. So a reader sees one
state of the run, an upload that was cut changes nothing, and nothing is sent that is there already. A folder that is
behind fetches what it lacks; one that is ahead, since a run was killed in it, is uploaded; one that is neither, because
the run has gone on elsewhere meanwhile, is moved aside whole.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from etils import epath

from dno_jax.bucket import local
from dno_jax.bucket.local import Known, Record
from dno_jax.bucket.lock import Lock
from dno_jax.bucket.place import Place
from dno_jax.bucket.store import Store
from dno_jax.console import say
from dno_jax.errors import DnoError
from dno_jax.files import explained

INDEX = ".dno/index.json"
FORMAT = 1
_AT_ONCE = 8  # objects on their way
_ROUNDS = 5  # of an upload beside a run that removes files
_FETCH = ".fetch"  # is locked by who fetches

Wanted = Callable[[str, int], bool]  # name and size of a file -> whether it is to be here


class Mirror:
    """One run directory in a bucket."""

    def __init__(self, place: Place):
        self.place = place
        self.folder = place.folder
        self._uploading = threading.Lock()

    @functools.cached_property
    def store(self) -> Store:
        return Store(self.place)

    @functools.cached_property
    def lock(self) -> Lock:
        return Lock(self.store)

    def fetch(self, wanted: Wanted, *, works: bool = False) -> None:
        """Bring the folder to what the bucket holds.

        Where a run works in this very folder now, it is ahead of the bucket, and nothing is done.

        Args:
            works: whether it is this process that works in it.

        Raises:
            DnoError: the bucket cannot be read, or what it holds is not as it was written.
        """
        with self._uploading, explained(epath.Path(self.folder)), _alone(self.folder):
            if not works and _is_worked_in(self.folder):
                return
            commit, there = self._index()
            record = Record.read(self.folder, self.place.url)
            if commit and commit == record.pending:  # this folder's own, of a process that was killed then
                record = Record(self.place.url, commit, record.files | record.sent)
            if record.commit and not commit:
                say(f"warning: {self.place.url} has lost its index; what this machine has of it is uploaded anew")
                record = Record(self.place.url)
            elif record.commit != commit:
                record = self._advanced(record, commit, there)
            here = local.signs(self.folder)  # what somebody has removed by hand comes back: `--from` redoes stages
            record.files = {name: known for name, known in record.files.items() if name in here}
            record.elsewhere = {name: known for name, known in there.items() if name not in record.files}
            self._take(record, [name for name, known in record.elsewhere.items() if wanted(name, known.size)])

    def bring(self, below: str, *, works: bool = False) -> None:
        """Fetch what the bucket holds below a path of the directory and was left there, weights too; as `fetch`."""

        def lacking(record: Record) -> list[str]:
            return [name for name in record.elsewhere if f"{name}/".startswith(f"{below}/")]

        if not lacking(Record.read(self.folder, self.place.url)):
            return  # who works on the accelerators waits for no upload
        with self._uploading, explained(epath.Path(self.folder)), _alone(self.folder):
            if works or not _is_worked_in(self.folder):
                record = Record.read(self.folder, self.place.url)
                self._take(record, lacking(record))

    def commit(self) -> None:
        """Upload what is new or changed, the index last, and delete what is gone.

        Raises:
            DnoError: the bucket refuses it, does not answer, or another process has taken the run over.
        """
        with self._uploading, explained(epath.Path(self.folder)):
            record = Record.read(self.folder, self.place.url)
            here = self._uploaded(record)
            known = record.files | record.sent
            files = {name: known[name] for name in here if name in known}
            elsewhere = {name: own for name, own in record.elsewhere.items() if name not in files}
            gone = sorted(({*known, *record.doomed} - files.keys()) - elsewhere.keys())
            if not record.commit or _contents(files) != _contents(record.files):
                self.lock.check()
                record.pending = uuid.uuid4().hex
                record.save(self.folder)
                record.commit = record.pending
                text = json.dumps({"format": FORMAT, "commit": record.commit, "files": _contents(files | elsewhere)})
                self.store.write(INDEX, text.encode())
            Record(self.place.url, record.commit, files, elsewhere, doomed=gone).save(self.folder)
            if gone:
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    list(pool.map(self.store.remove, gone))
                Record(self.place.url, record.commit, files, elsewhere).save(self.folder)

    def _index(self) -> tuple[str, dict[str, Known]]:
        """The commit that the bucket holds, and its files; "" and what is listed where no index is there.

        Raises:
            DnoError: the index is damaged, or another version's.
        """
        text = self.store.read(INDEX)
        if text is None:  # nothing, or a directory that was copied there
            listed = {name: size for name, size in self.store.sizes().items() if not name.startswith(".")}
            return "", {name: Known("", size, "") for name, size in listed.items()}
        try:
            tree = json.loads(text)
            if tree["format"] == FORMAT:
                named = {_inside(name): said for name, said in tree["files"].items()}
                files = {name: Known("", int(size), str(sha256)) for name, (size, sha256) in named.items()}
                return str(tree["commit"]), files
            what = f"format {tree['format']}, where this version reads {FORMAT}"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"[:80]
        raise DnoError(
            f"{self.place.url}/{INDEX}: damaged, or of another version ({what}); remove that object, and what lies in "
            "the bucket is taken as it is listed"
        )

    def _advanced(self, record: Record, commit: str, there: dict[str, Known]) -> Record:
        """Let go of what the bucket has no more, or in another form; a folder with changes of its own goes aside."""
        here = local.signs(self.folder)
        if any(self._is_own_work(name, sign, record) for name, sign in here.items()):
            self._set_aside()
            record, here = Record(self.place.url), {}
        files = {
            name: known
            for name, known in record.files.items()
            if here.get(name) == known.sign and name in there and there[name].sha256 == known.sha256
        }
        for name in here.keys() - files.keys():
            self._forget(self.folder / name)
        record = Record(self.place.url, commit, files)
        record.save(self.folder)  # what is fetched from here on is known by its digest, if this is cut
        return record

    def _forget(self, path: Path) -> None:
        """Remove a file, and folders that are empty then: some stand for a policy, or an iteration."""
        path.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty
            for folder in path.parents:
                if folder == self.folder:
                    break
                folder.rmdir()

    def _is_own_work(self, name: str, sign: str, record: Record) -> bool:
        """Whether a file holds what was computed here and never uploaded. Who only reads may write a report."""
        known = record.files.get(name)
        if name.split("/")[0] in ("report.html", "report") or (known is not None and known.sign == sign):
            return False
        with local.whole(self.folder, name) as (_, found):
            return known is None or found.sha256 != known.sha256

    def _set_aside(self) -> None:
        place = next(place for n in range(10_000) if not (place := Path(f"{self.folder}.aside-{n}")).exists())
        place.mkdir()
        for path in self.folder.iterdir():
            if path.name not in (_FETCH, ".lock"):  # they are held
                path.rename(place / path.name)
        say(
            f"warning: {self.place.url} has gone on elsewhere since this machine worked on it, and this machine has "
            f"files that were never uploaded; they are kept in {place}, and what the bucket holds is taken"
        )

    def _take(self, record: Record, names: list[str]) -> None:
        """Fetch files that are elsewhere; those that speak of others last, so that half of it is no finished stage."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for part in _ranked(names):
                wanted = [record.elsewhere[name] for name in part]
                for name, known in zip(part, pool.map(self._downloaded, part, wanted), strict=True):
                    del record.elsewhere[name]
                    if known is not None:
                        record.files[name] = known
        record.save(self.folder)

    def _downloaded(self, name: str, known: Known) -> Known | None:
        """Fetch a file, and hold it to its digest; None where it is here in a newer form, or is gone."""
        path = self.folder / name
        if path.exists():  # of a fetch that was cut, or changed here since
            with local.whole(self.folder, name) as (_, found):
                same = found.size == known.size and known.sha256 in ("", found.sha256)
                return found if same else None
        path.parent.mkdir(parents=True, exist_ok=True)
        part, size, sha256 = path.parent / f".{path.name}.{os.getpid()}.tmp", 0, ""
        try:
            for _ in range(2):  # bits may change on their way
                self.store.download(name, part)
                size, sha256 = part.stat().st_size, local.digest_of(part)
                # What changes in place may have been overwritten by an upload that was cut before its index.
                if local.changes_in_place(name) or (size == known.size and known.sha256 in ("", sha256)):
                    part.replace(path)
                    return Known(local.sign_of(path) or "", size, sha256)
        except FileNotFoundError:
            if local.changes_in_place(name):
                return None
            raise DnoError(
                f"{self.place.url}/{name}: gone, and the bucket's index names it; put it back from a copy or an older "
                f"version of the object, or remove {INDEX} there: then what is listed is taken"
            ) from None
        finally:
            part.unlink(missing_ok=True)
        raise DnoError(
            f"{self.place.url}/{name}: not as it was uploaded: the bucket's index says {known.size:,} bytes of sha256 "
            f"{known.sha256[:12]}, the object has {size:,} of {sha256[:12]}. Somebody has replaced it; restore it from "
            f"a copy or an older version of the object, or remove {INDEX} there: then what is listed is taken"
        )

    def _uploaded(self, record: Record) -> set[str]:
        """Send what the bucket has not; return the names of all that is to be in the index.

        What is sent is noted in the record, whatever happens.
        """
        here: dict[str, str] = {}
        try:
            for _ in range(_ROUNDS):  # until nothing was removed meanwhile, such as half of an old state
                before = local.signs(self.folder)  # all that its marks speak of is there when the next look begins
                here = {n: sign for n, sign in local.signs(self.folder).items() if _is_settled(n, sign, before)}
                known = record.files | record.sent
                new = {name for name, sign in here.items() if name not in known or known[name].sign != sign}
                # What is overwritten now is no source of copies.
                there = {own.sha256: name for name, own in known.items() if name not in new and _stays(name)}
                for part in _ranked(new):
                    self._send(part, record, there)
                if here.keys() <= local.signs(self.folder).keys():
                    break
            return set(here)
        finally:
            record.save(self.folder)

    def _send(self, names: list[str], record: Record, there: dict[str, str]) -> None:
        failure: DnoError | None = None
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for name, future in [(name, pool.submit(self._sent, name, record, there)) for name in names]:
                try:
                    if (known := future.result()) is not None:
                        record.sent[name] = known
                except CancelledError:
                    pass
                except DnoError as error:
                    failure = failure or error
                    pool.shutdown(wait=False, cancel_futures=True)  # each would wait as long for a store that is gone
        if failure is not None:
            raise failure

    def _sent(self, name: str, record: Record, there: dict[str, str]) -> Known | None:
        try:
            with local.whole(self.folder, name) as (path, known):
                before = record.sent.get(name) or record.files.get(name)
                touched = before is not None and before.sha256 == known.sha256
                if not touched and not self._copied(there.get(known.sha256), name):
                    self.store.upload(name, path)
                return known
        except FileNotFoundError:
            return None  # removed meanwhile

    def _copied(self, twin: str | None, name: str) -> bool:
        """Copy an object of the same contents inside of the bucket: a file was moved here, or copied."""
        try:
            if twin is not None:
                self.store.copy(twin, name)
            return twin is not None
        except FileNotFoundError:
            return False


def _stays(name: str) -> bool:
    return not local.changes_in_place(name)


def _is_settled(name: str, sign: str, before: dict[str, str]) -> bool:
    return not local.is_mark(name) or before.get(name) == sign


def _contents(files: dict[str, Known]) -> dict[str, tuple[int, str]]:
    return {name: (known.size, known.sha256) for name, known in sorted(files.items())}


def _ranked(names: Iterable[str]) -> list[list[str]]:
    """Names in the order in which they are sent: what is written once, what changes, and marks of what is whole."""
    parts: list[list[str]] = [[], [], []]
    for name in sorted(names):
        parts[2 if local.is_mark(name) else local.changes_in_place(name)].append(name)
    return parts


def _inside(name: str) -> str:
    """
    Raises:
        ValueError: it would lie outside of the folder.
    """
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"names {name[:40]!r}")
    return name


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time bring a folder to what the bucket holds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _FETCH).open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_worked_in(folder: Path) -> bool:
    """Whether a process, of any machine that sees the folder, has it locked."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
