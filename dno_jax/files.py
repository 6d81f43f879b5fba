"""Files that are there whole or not at all, and the digests that name their contents."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from etils import epath

from dno_jax.errors import DnoError


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a file that is there whole or not at all.

    Raises:
        DnoError: it cannot be written (a full disk, no permission); what was there before is kept.
    """
    _write_atomically(path, [text])


def write_lines_atomically(path: str | os.PathLike[str], lines: Iterable[str]) -> int:
    """Write a file line by line, there whole or not at all, and return how many lines it has."""
    return _write_atomically(path, (f"{line}\n" for line in lines))


def _write_atomically(path: str | os.PathLike[str], texts: Iterable[str]) -> int:
    count = 0
    with written_atomically(path) as file:
        for text in texts:
            file.write(text.encode())
            count += 1
    return count


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file to write bytes into; it is there whole when the block ends, and not at all when it raises.

    Raises:
        DnoError: it cannot be written (a full disk, no permission); what was there before is kept.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield cast(BinaryIO, file)
                file.flush()
                if "://" not in os.fspath(temporary):  # a local file system: the rename must not overtake the bytes
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # it takes space that may be needed
                temporary.unlink()
            raise


@contextmanager
def explained(path: epath.Path) -> Iterator[None]:
    """Raise an OSError of the work inside as a DnoError that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        raise DnoError(
            f"{path}: cannot be written ({error.strerror or error}); see to the disk (full, or failing), then start "
            "again: what is finished is kept"
        ) from None


def refused_by_disk(error: BaseException) -> str | None:
    """Say what a disk that is full, or may not be written, refuses; None for an error of another kind.

    Libraries wrap such errors in their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            said = os.strerror(number)
            if said in str(seen) or (isinstance(seen, OSError) and seen.errno == number):
                place = re.search(r"(?:local )?file \"([^\"]+)\"", str(seen))
                file = place[1] if place else getattr(seen, "filename", None)
                return (
                    f"{f'{file}: ' if file else ''}cannot be written ({said}); see to the disk, then start again: what "
                    "is finished is kept"
                )
        seen = seen.__cause__ or seen.__context__
    return None


def read_note(path: epath.Path) -> Any:
    """Read a small JSON file that this program wrote and can write again.

    Raises:
        DnoError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        found = "empty" if not path.stat().length else str(error)[:200]
        raise DnoError(f"{path}: damaged ({found}); remove it and start again: it is written anew") from None


def read_lines(path: str | os.PathLike[str], *, longest: int = 8 << 20) -> Iterator[str]:
    """Yield the lines of a text in UTF-8; other line breaks than "\\n" are part of them.

    Raises:
        DnoError: a line has more bytes than any real one.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    with epath.Path(path).open("rb") as file:
        number = 1
        while line := file.readline(longest + 1):
            if len(line) > longest:
                raise DnoError(f"{path}:{number}: a line of more than {longest:,} bytes; remove it")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            number += 1


def cache_folder() -> Path:
    """Where what can be computed again is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dno_jax"


def digest_of(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
