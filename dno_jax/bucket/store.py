"""Objects of a bucket, through fsspec: what fails for a while is tried again, and errors name the URL and the fix."""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from dno_jax.bucket.place import EXTRAS, Place
from dno_jax.display import hide_keys
from dno_jax.errors import DnoError
from dno_jax.files import refused_by_disk
from dno_jax.keys import Secrets

T = TypeVar("T")
PATIENCE_SECONDS = 60.0  # beyond the libraries' own tries
_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_DENIED = re.compile(
    r"(?i)forbidden|denied|unauthori[sz]ed|credential|permission|anonymous|\b40[13]\b|InvalidAccessKeyId|"
    r"SignatureDoesNotMatch|expired.?token|RefreshError|not authenticated"
)
_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "s3fs", "gcsfs", "google", "requests", "urllib3", "fsspec")
_MAKE = {"gs": "gcloud storage buckets create gs://{}", "s3": "aws s3 mb s3://{}"}
_GRANT = {
    "gs": "a role such as roles/storage.objectUser on the bucket, and credentials that Google's libraries find (the "
    "machine's service account, GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`)",
    "s3": "s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket, and credentials that AWS's libraries find "
    "(the machine's role, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
}


class Unreachable(DnoError):
    """The bucket does not answer now; it may do so later."""


class Store:
    """The objects below one URL, by names relative to it; every method is safe in threads.

    Attributes:
        sent_bytes, sent_objects: of files, uploaded so far.
    """

    def __init__(self, place: Place):
        """
        Raises:
            DnoError: the extra of its scheme is not installed.
        """
        self.place = place
        self.sent_bytes, self.sent_objects = 0, 0
        self._counting = threading.Lock()
        self._fs = _file_system(place)
        self._secrets = Secrets()
        for value in filter(None, map(os.environ.get, _SECRET_VARIABLES)):
            self._secrets.add(value)

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None where there is none."""
        try:
            return self._tried(f"read {name}", lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, patience: float = PATIENCE_SECONDS) -> None:
        """Put an object there whole, in place of one of that name."""
        self._written(name, lambda: self._fs.pipe_file(self._path(name), data), patience=patience)

    def create(self, name: str, data: bytes) -> bool:
        """Put an object there if there is none of that name; say whether it was done."""
        try:
            self._written(name, lambda: self._fs.pipe_file(self._path(name), data, mode="create"))
        except FileExistsError:
            return False
        return True

    def upload(self, name: str, path: Path) -> None:
        """Put a file there whole.

        Raises:
            FileNotFoundError: the file is gone.
        """
        size = path.stat().st_size
        self._written(name, lambda: self._fs.put_file(str(path), self._path(name)), source=path)
        with self._counting:
            self.sent_bytes += size
            self.sent_objects += 1

    def download(self, name: str, path: Path) -> None:
        """Fetch an object into a file.

        Raises:
            FileNotFoundError: there is no such object.
        """
        self._tried(f"read {name}", lambda: self._fs.get_file(self._path(name), str(path)))

    def copy(self, name: str, to: str) -> None:
        """Copy an object inside of the bucket; nothing is sent.

        Raises:
            FileNotFoundError: there is no such object.
        """
        self._tried(f"write {to}", lambda: self._fs.cp_file(self._path(name), self._path(to)))

    def remove(self, name: str) -> None:
        """Delete an object, if there is one of that name."""
        try:
            self._tried(f"delete {name}", lambda: self._fs.rm_file(self._path(name)))
        except FileNotFoundError:
            return

    def sizes(self) -> dict[str, int]:
        """Names of all objects, and their sizes."""
        try:
            found = self._tried("list", lambda: self._fs.find(self._path(""), detail=True))
        except FileNotFoundError:
            return {}
        start = len(self._path(""))
        return {path.lstrip("/")[start:]: int(info["size"]) for path, info in found.items()}

    def _path(self, name: str) -> str:
        return f"{self.place.root}/{name}"

    def _written(
        self, name: str, call: Callable[[], T], *, source: Path | None = None, patience: float = PATIENCE_SECONDS
    ) -> T:
        try:
            return self._tried(f"write {name}", call, patience=patience)
        except FileNotFoundError:
            if source is not None and not source.exists():
                raise
            make = _MAKE.get(self.place.scheme, "make {}").format(self.place.bucket)
            raise DnoError(
                f"run_dir {self.place.url}: there is no bucket {self.place.bucket}; make it ({make}), or give another "
                "run_dir"
            ) from None

    def _tried(self, doing: str, call: Callable[[], T], *, patience: float = PATIENCE_SECONDS) -> T:
        """Call, again and again for a while where that may help.

        Raises:
            FileNotFoundError, FileExistsError: as they are meant.
            DnoError: it is refused; Unreachable: it has not answered in time.
        """
        deadline, pause = time.monotonic() + patience, 0.5
        while True:
            try:
                return call()
            except Exception as error:
                kind = _kind_of(error)
                if kind == "answer":
                    raise
                if kind == "disk":
                    raise DnoError(f"{refused_by_disk(error)}") from None
                if kind == "denied":
                    raise DnoError(
                        f"run_dir {self.place.url}: may not {doing} ({self._said(error)}); it takes "
                        f"{_GRANT.get(self.place.scheme, 'permission')}"
                    ) from None
                if time.monotonic() + pause > deadline:
                    raise Unreachable(
                        f"run_dir {self.place.url}: cannot be reached to {doing} ({self._said(error)}); see to the "
                        f"network and the store. Nothing computed is lost: it lies in {self.place.folder}, and the "
                        "same command goes on and uploads it"
                    ) from None
            time.sleep(pause * random.uniform(0.7, 1.0))
            pause = min(2 * pause, 15.0)

    def _said(self, error: BaseException) -> str:
        """What a library says, in a line without keys and signatures."""
        text = re.sub(r"\?\S+", "?...", " ".join(str(error).split()))
        return hide_keys(self._secrets.without(f"{type(error).__name__}: {text}"))[:200]


def _kind_of(error: Exception) -> Literal["answer", "denied", "disk", "later"]:
    if isinstance(error, FileNotFoundError | FileExistsError):
        return "answer"
    if refused_by_disk(error) is not None:
        return "disk"
    theirs = type(error).__module__.split(".")[0] in _LIBRARIES
    if not (theirs or isinstance(error, OSError | TimeoutError)):
        return "answer"  # a defect keeps its traceback
    refused = isinstance(error, PermissionError) or _DENIED.search(f"{type(error).__name__} {error}")
    return "denied" if refused else "later"


def _file_system(place: Place) -> Any:
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks what kind every bucket is, and warns
    extra = EXTRAS.get(place.scheme)
    missing = DnoError(f"run_dir {place.url}: needs an extra that is not installed: pip install 'dno_jax[{extra}]'")
    try:
        import fsspec

        for name in ("gcsfs", "s3fs", "aiobotocore"):  # warn of what is tried again
            logging.getLogger(name).setLevel(logging.ERROR if name != "gcsfs" else logging.CRITICAL)
        return fsspec.filesystem(place.scheme, use_listings_cache=False)
    except ImportError:
        raise missing from None
    except Exception as error:  # credentials are looked for when it is made
        if _kind_of(error) == "answer":
            raise
        said = hide_keys(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
        raise DnoError(
            f"run_dir {place.url}: no credentials that can be used ({said}); it takes {_GRANT.get(place.scheme)}"
        ) from None
