"""HTTP/1.1 on asyncio: as much of it as JSON over keep-alive connections needs, and ways to break it."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import parse_qsl

_MAX_HEAD_BYTES = 64 * 1024
_MAX_BODY_BYTES = 256 * 2**20
_TRICKLE_SECONDS = 0.02
_PHRASES = {status.value: status.phrase for status in HTTPStatus}

Ending = Literal["whole", "truncated", "close", "reset", "hang", "trickle"]


@dataclass(frozen=True)
class Request:
    """A request that has arrived whole; header names are in lower case; `last` on its connection if it says so."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""
    last: bool = False


@dataclass(frozen=True)
class Answer:
    """What is sent back.

    Attributes:
        delay: seconds to wait first.
        ending: how it ends; anything but "whole" ends the connection too, "hang" and "trickle" when the client does.
        done: called when the answer is about to be sent, or the client has gone.
    """

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    ending: Ending = "whole"
    done: Callable[[], None] | None = None


def json_answer(status: int, content: Any, **fields: Any) -> Answer:
    return Answer(status, json.dumps(content).encode(), **fields)


class Connection(asyncio.Protocol):
    """One client's connection: a request at a time, answered in order.

    Args:
        handle: answers a request; what it raises goes to `errors`, and a 500 to the client.
        members: the open connections, of which this is one while it lasts.
        errors: what went wrong here.
    """

    def __init__(self, handle: Callable[[Request], Answer], *, members: set[Connection], errors: list[BaseException]):
        self._handle = handle
        self._members = members
        self._errors = errors
        self._buffer = bytearray()
        self._head: tuple[Request, int] | None = None  # a request without its body, and the body's length
        self._busy = False
        self._last = False
        self._answer: Answer | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._members.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._members.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._release()

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._busy:
            self._advance()

    def _advance(self) -> None:
        """Take the next whole request out of the buffer and answer it."""
        try:
            request = self._take()
        except ValueError as error:
            self._send(json_answer(400, {"error": {"message": str(error)}}))
            self._transport.close()
            return
        if request is None:
            return
        self._busy, self._last = True, request.last
        try:
            self._answer = self._handle(request)
        except Exception as error:  # of the server's user, whose scorer runs here: told when the server ends
            self._errors.append(error)
            self._answer = json_answer(500, {"error": {"message": "the fake judge itself failed"}})
        if self._answer.delay > 0.0:
            self._timer = asyncio.get_running_loop().call_later(self._answer.delay, self._finish)
        else:
            self._finish()

    def _take(self) -> Request | None:
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > _MAX_HEAD_BYTES:
                    raise ValueError("the head of the request is too long")
                return None
            self._head = _read_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            if self._head[0].headers.get("expect", "").lower() == "100-continue":
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request, length = self._head
        if len(self._buffer) < length:
            return None
        self._head = None
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return replace(request, body=body)

    def _finish(self) -> None:
        answer = self._answer
        assert answer is not None
        self._timer = None
        if answer.ending == "hang":
            return  # `done` when the client has had enough
        if answer.ending == "trickle":
            self._transport.write(_head(answer, length=100_000))
            self._trickle()
            return
        self._release()  # first: who has the answer may look at the counts
        self._send(answer)
        self._busy = False
        if self._last:
            self._transport.close()
        elif self._buffer and not self._transport.is_closing():
            asyncio.get_running_loop().call_soon(self._advance)

    def _send(self, answer: Answer) -> None:
        if answer.ending == "close":
            self._transport.close()
        elif answer.ending == "reset":
            # Without lingering, what is closed is reset.
            connection: socket.socket = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
        elif answer.ending == "truncated":
            self._transport.write(_head(answer) + answer.body[: len(answer.body) // 2])
            self._transport.close()
        else:
            self._transport.write(_head(answer) + answer.body)

    def _trickle(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(b" ")
            self._timer = asyncio.get_running_loop().call_later(_TRICKLE_SECONDS, self._trickle)

    def _release(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and answer.done is not None:
            answer.done()


def _read_head(head: bytes) -> tuple[Request, int]:
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise ValueError("no HTTP/1.1 request")
    path, _, query = parts[1].partition("?")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "transfer-encoding" in headers:
        raise ValueError("a body without Content-Length")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > _MAX_BODY_BYTES:
        raise ValueError(f"Content-Length {length[:20]!r}")
    last = parts[2] == "HTTP/1.0" or headers.get("connection", "").lower() == "close"
    return Request(parts[0], path, dict(parse_qsl(query)), headers, last=last), int(length)


def _head(answer: Answer, *, length: int | None = None) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status} {_PHRASES.get(answer.status, '')}",
        f"content-type: {answer.content_type}",
        f"content-length: {len(answer.body) if length is None else length}",
        *(f"{name}: {value}" for name, value in answer.headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
