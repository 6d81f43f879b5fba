"""Bodies of HTTP responses, read to a limit that holds after decompression: a server may send what it likes."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

import httpx2

ENCODINGS = "gzip, deflate"  # that are asked for, and read
_MAX_MEMBERS = 16  # of a gzip body; each costs time, however little is in it


class BadBody(Exception):
    """A body that is not read to its end; the text says why."""


class BoundedBody(httpx2.AsyncByteStream):
    """The decoded bytes of a response.

    Args:
        stream: its raw bytes.
        encoding: of its Content-Encoding header.
        limit: bytes, decoded, beyond which `BadBody` is raised.
    """

    def __init__(self, stream: httpx2.AsyncByteStream, *, encoding: str, limit: int):
        self._stream = stream
        self._encoding = encoding.strip().lower()
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise BadBody(f"a body in an encoding that was not asked for ({self._encoding[:40]!r})")
        plain = self._encoding in ("", "identity")
        inflate = None if plain else _Inflate()
        read = 0
        async for chunk in self._stream:
            for part in (chunk,) if inflate is None else inflate.parts(chunk, most=self._limit + 1):
                read += len(part)
                if read > self._limit:
                    raise BadBody(f"a body of more than {self._limit:,} bytes, which is not read on")
                yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Inflate:
    """Decompresses gzip and deflate, a bounded piece at a time."""

    def __init__(self) -> None:
        self._members = 0
        self._zlib = zlib.decompressobj(47)  # gzip's header, or zlib's
        self._begun = False

    def parts(self, data: bytes, *, most: int):
        while data:
            yield self._part(data, most)
            data = self._zlib.unconsumed_tail
            if self._zlib.eof and (data := self._zlib.unused_data):
                self._members += 1
                if self._members > _MAX_MEMBERS:
                    raise BadBody("a compressed body of too many parts")
                self._zlib = zlib.decompressobj(47)

    def _part(self, data: bytes, most: int) -> bytes:
        try:
            found = self._zlib.decompress(data, most)
        except zlib.error:
            if self._begun:
                raise BadBody("a body that is not compressed as its header says") from None
            self._zlib = zlib.decompressobj(-15)  # deflate without a header, as some send it
            try:
                found = self._zlib.decompress(data, most)
            except zlib.error:
                raise BadBody("a body that is not compressed as its header says") from None
        self._begun = True
        return found
