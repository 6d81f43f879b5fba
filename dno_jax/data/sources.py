"""Rows out of the files that people have, one at a time: JSON lines, JSON arrays, Parquet, compressed; Hub datasets."""

from __future__ import annotations

import glob
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from dno_jax.config.base import hub_parts
from dno_jax.data.formats import COLUMNS
from dno_jax.errors import DnoError

MAX_ROW = 8 << 20  # characters of one row: several times the longest context that any model reads
_MAX_BLANK = 1 << 16  # characters between two lines with something in them
_CHUNK = 1 << 16
_BATCH_BYTES = 16 << 20  # of a Parquet file, uncompressed, that are held at once
_DEEPEST = 20  # levels of a row: the forms that are read need six
_HALF = re.compile(r"[\ud800-\udfff]")  # half of a character, as JSON's \ud800 may spell one
_UNDECODED = re.compile(r"[\udc80-\udcff]")  # a byte that was no UTF-8
_BETWEEN = re.compile(r"[\s,]*")  # two rows
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
_NOT_READ = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack it",
    b"\xfd7zXZ": "xz-compressed: unpack it (xz -d)",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"ARROW1": "an Arrow file: save it as Parquet or JSON lines",
    b"\xff\xff\xff\xff": "an Arrow stream: save it as Parquet or JSON lines",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it (git lfs pull)",
    b"SQLite format 3": "an SQLite database: save it as JSON lines",
    b"<!DOCTYPE": "a web page, not the data: download the raw file",
    b"<html": "a web page, not the data: download the raw file",
}
_EXPECTED = "expected UTF-8 JSON lines, a JSON array or Parquet"


def named(paths: str | Sequence[str]) -> str:
    """One path or several, for messages."""
    return paths if isinstance(paths, str) else ", ".join(paths)


def read_rows(paths: str | Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield rows with their places ("file:line"), holding one at a time (of Parquet a few).

    Args:
        paths: a file, a pattern (`data/*.jsonl`), a dataset's id (`owner/name@revision:split`), or several of them.

    Raises:
        DnoError: no such file, one that cannot be read or is no file of rows, or a row that is no JSON object of whole
            characters, or longer than any real one.
    """
    for path in [paths] if isinstance(paths, str) else paths:
        if parts := hub_parts(path):
            rows = _dataset_rows(path, parts)
        else:
            rows = (row for file in _files(path) for row in _file_rows(file))
        for row, place in rows:
            _check_texts(row, place=place)
            yield row, place


def _files(path: str) -> list[str]:
    """The files of a path: itself, or, in order of name, those that fit it as a pattern."""
    if not set(path) & set("*?[") or epath.Path(path).exists():
        return [path]
    if "://" in path:
        whole = epath.Path(path)
        depth = next(index for index, part in enumerate(whole.parts) if set(part) & set("*?["))
        base = epath.Path(*whole.parts[:depth])
        found = sorted(map(os.fspath, base.glob("/".join(whole.parts[depth:]))))
    else:
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise DnoError(f"{path}: no file fits this pattern")
    return found


def _file_rows(path: str) -> Iterator[tuple[dict[str, Any], str]]:
    file = epath.Path(path)
    with ExitStack() as stack:
        try:
            if not file.exists():
                raise DnoError(f"{path}: no such file")
            opened = cast(BinaryIO, stack.enter_context(file.open("rb")))
            head = opened.read(64)
            opened.seek(0)
            for start, what in _NOT_READ.items():
                if head.lstrip().startswith(start):
                    raise DnoError(f"{path}: {what}; {_EXPECTED}")
            if head.startswith(b"PAR1"):
                yield from _parquet_rows(opened, path)
                return
            for start, kind in _COMPRESSED.items():
                if head.startswith(start):
                    stream = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(opened), kind))
                    opened = io.BufferedReader(cast(Any, stream))
                    head = opened.peek(64)
            text = _Text(opened, path, encoding=json.detect_encoding(head[:4]))
            stack.callback(text.close)
            yield from _json_rows(text)
        except (OSError, UnicodeError, pa.ArrowException) as error:
            why = (getattr(error, "strerror", None) or str(error)).splitlines()[0][:200]
            raise DnoError(f"{path}: cannot be read ({why}); expected UTF-8 JSON lines, or Parquet") from None


class _Text:
    """Characters of a file, of which no more are held than a row may have. CR, LF and both end lines, U+2028 does not.

    Attributes:
        line: number of the line that the next character belongs to, from 1.
    """

    def __init__(self, stream: BinaryIO, path: str, *, encoding: str):
        self.path = path
        self.line = 1
        self._file = io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline=None)

    def close(self) -> None:
        self._file.close()

    def readline(self) -> str:
        """The next line with its end; "" at the end of the file. Of an array that is one line, its beginning."""
        text = self._file.readline(_CHUNK)
        if len(text) == _CHUNK and not text.endswith("\n") and not text.lstrip().startswith("["):
            text += self._file.readline(MAX_ROW)
            if len(text) > MAX_ROW:
                raise _too_long(f"{self.path}:{self.line}")
        text = self._checked(text)
        self.line += text.endswith("\n")
        return text

    def read(self, count: int) -> str:
        text = self._checked(self._file.read(count))
        self.line += text.count("\n")
        return text

    def _checked(self, text: str) -> str:
        if not text.isascii() and (found := _UNDECODED.search(text)):
            line = self.line + text.count("\n", 0, found.start())
            column = found.start() - text.rfind("\n", 0, found.start())
            raise DnoError(
                f"{self.path}: cannot be read (line {line}, character {column}: can't decode byte "
                f"{ord(found[0]) - 0xDC00:#x}); expected UTF-8 JSON lines: convert it, such as with "
                "iconv -f LATIN1 -t UTF-8"
            )
        return text


def _json_rows(text: _Text) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of JSON lines, or, where the first line is no whole object, of an array or of objects in a row."""
    blank, first = 0, True
    while True:
        number, line = text.line, text.readline()
        place, stripped = f"{text.path}:{number}", line.strip()
        if not line:
            return
        if not stripped:
            blank += len(line)
            if blank > _MAX_BLANK:
                raise DnoError(f"{place}: {blank:,} blank characters and no row; {_EXPECTED}")
        elif first and (stripped[0] == "[" or _is_begun(stripped)):
            yield from _spread_rows(text, line, number)
            return
        else:
            yield _object(stripped, place=place, cut=not line.endswith("\n")), place
            blank, first = 0, False


def _is_begun(line: str) -> bool:
    """Whether a line is the beginning of an object that others go on with."""
    if not line.startswith("{"):
        return False
    try:
        json.loads(line.removesuffix(","))
    except json.JSONDecodeError as error:
        return error.pos >= len(line.removesuffix(",")) and not error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):
        return False
    return False


def _object(text: str, *, place: str, cut: bool) -> dict[str, Any]:
    try:
        row = json.loads(text.removesuffix(","))
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a ValueError
        hint = "; it is the last line: the file may be cut short" if cut else ""
        raise DnoError(f"{place}: not valid JSON: {error}, in {_shown(text)}{hint}; {_EXPECTED}") from None
    return _checked_object(row, place=place)


def _checked_object(row: Any, *, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DnoError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row


def _spread_rows(text: _Text, buffer: str, line: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects of an array, or one after the other, that are spread over lines or share one.

    Args:
        buffer: what has been read already.
        line: where it begins.
    """
    decode = json.JSONDecoder().raw_decode
    number, at = 0, 0
    in_array = closed = ended = False

    def more(size: int) -> bool:
        nonlocal buffer, at, ended
        read = text.read(size)
        buffer, at, ended = buffer[at:] + read, 0, not read
        return not ended

    while True:
        skipped = at + len(_BETWEEN.match(buffer, at)[0])  # pyright: ignore[reportOptionalSubscript]
        line += buffer.count("\n", at, skipped)
        at = skipped
        if at == len(buffer):
            if more(_CHUNK):
                continue
            if in_array and not closed:
                raise DnoError(
                    f"{text.path}:{line}: the array that the file begins with is not closed: it is cut short"
                )
            return
        place = f"{text.path}:{line} (item {number + 1})"
        if closed:
            raise DnoError(f"{text.path}:{line}: text after the array's end: {_shown(buffer[at : at + 80])}")
        if buffer[at] == "[" and not in_array and not number:
            in_array, at = True, at + 1
            continue
        if buffer[at] == "]" and in_array:
            closed, at = True, at + 1
            continue
        try:
            row, end = decode(buffer, at)
        except json.JSONDecodeError as error:
            may_go_on = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
            if may_go_on and not ended:
                if len(buffer) - at > MAX_ROW:
                    raise _too_long(place) from None
                more(max(_CHUNK, len(buffer) - at))
                continue
            at_line = line + buffer.count("\n", at, error.pos)
            hint = "; the file may be cut short" if ended else ""
            raise DnoError(
                f"{text.path}:{at_line}: not valid JSON (item {number + 1}, which begins in line {line}): {error.msg}"
                f"{hint}; {_EXPECTED}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DnoError(f"{place}: not valid JSON: {error}") from None
        if end - at > MAX_ROW:
            raise _too_long(place)
        yield _checked_object(row, place=place), place
        line += buffer.count("\n", at, end)
        number, at = number + 1, end


def _too_long(place: str) -> DnoError:
    return DnoError(
        f"{place}: a row of more than {MAX_ROW:,} characters, longer than any chat that a model reads; split it, or "
        "remove it"
    )


def _parquet_rows(opened: BinaryIO, path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of the columns that are understood; others have no value."""
    file = pq.ParquetFile(opened, buffer_size=_CHUNK, pre_buffer=False)
    names = file.schema_arrow.names
    known = [name for name in names if name in COLUMNS]
    number = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        if not metadata.num_rows:
            continue
        mean = metadata.total_byte_size // metadata.num_rows
        chunks = [metadata.column(index) for index in range(metadata.num_columns)]
        if mean > 4 * MAX_ROW or any(map(_unpacks_to_much, chunks)):  # UTF-8 takes up to four bytes a character
            raise _too_long(f"{path}, row {number + 1} or later")
        size = max(1, min(64, _BATCH_BYTES // max(mean, 1)))
        for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=known):
            if batch.nbytes > 4 * MAX_ROW + 2 * _BATCH_BYTES:
                raise _too_long(f"{path}, row {number + 1} or later")
            for row in batch.to_pylist() if known else [{}] * batch.num_rows:
                number += 1
                yield dict.fromkeys(names) | row, f"{path}, row {number}"


def _unpacks_to_much(chunk: Any) -> bool:
    """Whether a column becomes far larger than texts do, packed as it is."""
    return chunk.total_uncompressed_size > max(256 << 20, 400 * chunk.total_compressed_size)


def _dataset_rows(path: str, parts: dict[str, str | None]) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a dataset of the Hub, which `datasets` fetches once and keeps in its cache."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DnoError(
            f"{path}: no such file; to read the dataset of this name from the Hub, pip install 'dno_jax[data]'"
        ) from None
    name, revision, subset, split = parts["name"], parts["revision"], parts["subset"], parts["split"]
    try:
        found = datasets.load_dataset(name, subset, revision=revision, split=split)
    except Exception as error:  # the Hub, the network, the cache, the dataset's own files
        why = " ".join(str(error).split())[:300]
        raise DnoError(f"{path}: the dataset cannot be loaded: {type(error).__name__}: {why}") from None
    if isinstance(found, dict):
        if len(found) > 1:
            raise DnoError(f"{path}: has the splits {', '.join(found)}; name one, such as {path}:{min(found)}")
        (found,) = found.values()
    names: Iterable[str] = found.column_names
    known = [name for name in names if name in COLUMNS]
    for number, row in enumerate(found.select_columns(known), start=1):
        yield dict.fromkeys(names) | row, f"{path}, row {number}"


def _check_texts(value: Any, *, place: str, field: str = "", depth: int = 0) -> None:
    """Refuse halves of characters, which no tokenizer takes, and nesting that is too deep to be shown."""
    if isinstance(value, str):
        if not value.isascii() and (half := _HALF.search(value)):
            shown = value[max(0, half.start() - 20) : half.end() + 20]
            raise DnoError(
                f"{place}: {field}: {shown!r} holds {half[0]!r}, half of a surrogate pair; expected whole characters: "
                "write both halves, or remove this one"
            )
        return
    if depth > _DEEPEST:
        raise DnoError(f"{place}: {field}: nested more than {_DEEPEST} deep; expected a prompt or an example")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_texts(name, place=place, field="a name")
            _check_texts(item, place=place, field=field or name, depth=depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, place=place, field=field, depth=depth + 1)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
