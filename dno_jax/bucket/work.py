"""Who works on a run directory in a bucket, and who reads one: fetching, and uploading beside the work."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dno_jax.bucket import local
from dno_jax.bucket.lock import BEAT_SECONDS, Lost
from dno_jax.bucket.mirror import Mirror
from dno_jax.bucket.place import read_url
from dno_jax.console import say
from dno_jax.errors import DnoError

INTERVAL_SECONDS = 300.0  # between uploads where no stage ends: what was paid for, and shards
_folders: dict[Path, Bucket] = {}


class Bucket:
    """A run directory in a bucket, as this process uses it."""

    def __init__(self, url: str):
        """
        Raises:
            DnoError: the URL is no place for one.
        """
        self._mirror = Mirror(read_url(url))
        self._works = False
        self._asked = threading.Event()  # to upload
        self._lost: Lost | None = None
        self._told = ""

    @classmethod
    def of(cls, url: str) -> Bucket:
        """The bucket at a URL: one for a process."""
        folder = read_url(url).folder
        if folder not in _folders:
            _folders[folder] = cls(url)
        return _folders[folder]

    @property
    def url(self) -> str:
        return self._mirror.place.url

    @property
    def folder(self) -> Path:
        """Where its files are worked on."""
        return self._mirror.folder

    def fetch(self, *, weights: bool = False) -> None:
        """Bring the folder to what the bucket holds; who works in it is ahead already.

        Args:
            weights: of policies and of trainings under way too, which are large.
        """
        if not self._works:
            self._mirror.fetch(_texts_and_weights if weights else _texts)

    def holder(self) -> str | None:
        """Who works on it now, on whatever machine; None where nobody does."""
        return self._mirror.lock.holder()

    def bring(self, path: str | os.PathLike[str]) -> None:
        """Bring what the bucket holds below a path of the folder, weights too."""
        self._mirror.bring(Path(os.path.abspath(path)).relative_to(self.folder).as_posix(), works=self._works)

    @contextmanager
    def working(self, *, weights: bool) -> Iterator[None]:
        """Keep the bucket's path to this process; upload what it makes, beside the work and at the end.

        Raises:
            DnoError: another process has it, it may not be written or read, or not all could be uploaded.
        """
        mirror = self._mirror
        mirror.lock.acquire()
        try:
            mirror.fetch(_texts_and_weights if weights else _texts, works=True)
            self._works = True
            with self._uploading():
                yield
        finally:
            self._works = False
            with suppress(DnoError):  # it grows stale
                mirror.lock.release()

    def changed(self) -> None:
        """Have what is new uploaded, by a thread: a stage is done.

        Raises:
            DnoError: another process has taken the run over.
        """
        if self._lost is not None:
            raise self._lost
        self._asked.set()

    @contextmanager
    def _uploading(self) -> Iterator[None]:
        self._asked, self._lost = threading.Event(), None
        ended, failed = threading.Event(), True
        for name, run in (("beat", self._beat), ("upload", self._upload)):
            threading.Thread(target=run, args=(ended, self._asked), name=f"bucket {name}", daemon=True).start()
        try:
            yield
            failed = False
        finally:
            ended.set()
            self._asked.set()
            try:
                if self._lost is not None:
                    raise self._lost
                self._mirror.commit()
                store = self._mirror.store
                if store.sent_objects:
                    say(f"{self.url}: {store.sent_bytes / 1e6:,.1f} MB in {store.sent_objects:,} objects uploaded")
            except DnoError as error:
                if not failed:
                    raise
                say(f"warning: {error}")  # what stopped the work stands

    def _beat(self, ended: threading.Event, asked: threading.Event) -> None:
        del asked
        while not ended.wait(BEAT_SECONDS):
            try:
                self._mirror.lock.renew()
            except Lost as error:
                self._lose(error)
                return
            except DnoError as error:
                self._tell(error)

    def _upload(self, ended: threading.Event, asked: threading.Event) -> None:
        while not ended.is_set():
            asked.wait(INTERVAL_SECONDS)
            asked.clear()
            if ended.is_set() or self._lost is not None:
                return
            try:
                self._mirror.commit()
                self._told = ""
            except Lost as error:
                self._lose(error)
                return
            except DnoError as error:
                self._tell(error)

    def _lose(self, error: Lost) -> None:
        self._lost = error
        say(f"warning: {error}; this process ends with its stage")

    def _tell(self, error: DnoError) -> None:
        if self._told != type(error).__name__:
            self._told = type(error).__name__
            say(f"warning: {error}; the work goes on, and uploading is tried again")


def of_path(path: str | os.PathLike[str]) -> Bucket | None:
    """The bucket in whose folder a path lies; None where it is an ordinary path."""
    if not _folders:
        return None
    place = Path(os.path.abspath(path))
    return next((_folders[folder] for folder in (place, *place.parents) if folder in _folders), None)


def bring(path: str | os.PathLike[str]) -> None:
    """See that weights below a path are here, where it is of a run directory in a bucket."""
    if (bucket := of_path(path)) is not None:
        bucket.bring(path)


def changed(path: str | os.PathLike[str]) -> None:
    """Have what is new in a run directory uploaded, where it is in a bucket; raises as `Bucket.changed`."""
    if (bucket := of_path(path)) is not None:
        bucket.changed()


def _texts(name: str, size: int) -> bool:
    return not local.is_weights(name, size)


def _texts_and_weights(name: str, size: int) -> bool:
    return _texts(name, size) or not local.no_run_reads(name)
