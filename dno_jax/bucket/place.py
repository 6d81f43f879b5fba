"""URLs of object stores that a run directory may have, and the local folder in which its files are worked on."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dno_jax.errors import DnoError

EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme -> the extra that reads and writes it
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]+")
_CUT = re.compile(r"(?:^|/)(gs|gcs|s3|hf|file|https?):/")
_PART = re.compile(r"[\w.=+ -]+")  # without what fsspec, or a shell, reads as more than a name


@dataclass(frozen=True)
class Place:
    """A run directory in a bucket."""

    scheme: str
    root: str  # BUCKET/PATH

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.root}"

    @property
    def bucket(self) -> str:
        return self.root.split("/")[0]

    @property
    def folder(self) -> Path:
        """Where on this machine its files are worked on: the same folder for the same URL, so that a run goes on."""
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dno_jax", "runs")
        base = Path(os.environ.get("DNO_SCRATCH") or cache).absolute()
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        return base / f"{self.scheme}-{self.bucket}-{digest}" / self.root.rsplit("/", 1)[1]


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a run directory is named by a URL.

    Raises:
        DnoError: one of its two slashes is missing: libraries would take it for a URL in one place and not in another.
    """
    text = os.fspath(path)
    if "://" not in text and (found := _CUT.search(text)) is not None:
        raise DnoError(
            f"run_dir: {found[1]}:/ with one slash; expected {found[1]}://BUCKET/PATH, or a directory without "
            f"{found[1]}:/ in its name"
        )
    return "://" in text


def read_url(url: str) -> Place:
    """
    Raises:
        DnoError: it is no place that a run can be kept in; what may be a password is not shown.
    """
    scheme, _, rest = url.partition("://")
    known = " or ".join(f"{name}://BUCKET/PATH" for name in EXTRAS)
    if "@" in rest.split("/")[0] or "?" in rest or "#" in rest:
        raise DnoError(
            f"run_dir: a URL of {scheme[:16]}:// with a user, a query or a fragment, which may hold a key (so it is "
            f"not shown); give {known}. Keys come from the environment, as the provider's own tools read them; one "
            "that has been in a file or a command is to be replaced"
        )
    bucket, *parts = rest.rstrip("/").split("/")
    if scheme not in EXTRAS:
        raise DnoError(f"run_dir {url}: expected a directory of a file system, {known}")
    if not _BUCKET.fullmatch(bucket) or not parts:
        raise DnoError(f"run_dir {url}: expected a bucket's name and a path inside of it, {known}")
    for part in parts:
        if not _PART.fullmatch(part) or part in (".", ".."):
            raise DnoError(
                f"run_dir {url}: {part!r} is no name of a folder in it; expected letters, digits and any of - _ . = +"
            )
    return Place(scheme, "/".join([bucket, *parts]))
