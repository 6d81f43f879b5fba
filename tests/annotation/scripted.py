"""An HTTP server on loopback that does as a test says, request by request; real sockets, real faults."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request as it came: `body` parsed where it is JSON, headers by lower-case name, `at` of time.monotonic."""

    method: str
    path: str
    body: Any
    headers: dict[str, str]
    at: float


@dataclass(frozen=True)
class Answer:
    """What to say. `fault`: "reset" sends nothing and resets, "truncated" stops amid the body, "hang" never answers,
    "trickle" sends a byte of the body now and then, "drip" one of the headers."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    delay: float = 0.0


Script = Callable[[Asked], Answer]


def completion(text: str | None = "ready", **fields: Any) -> Answer:
    """A chat completion; `fields` go into its one choice."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **fields}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return Answer(body={"object": "chat.completion", "model": "served-1", "choices": [choice], "usage": usage})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def fault(status: int, message: str = "planted", *, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    return Answer(status=status, body={"error": {"message": message, **fields}}, headers=headers or {})


class Scripted:
    """The server as a context manager; `script` may be replaced at any time, and runs in the handlers' threads."""

    def __init__(self, script: Script | None = None, *, port: int = 0):
        self.script: Script = script or (lambda asked: completion())
        self.asked: list[Asked] = []
        self.max_in_flight = self.in_flight = self.connections = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._http = _Server(("127.0.0.1", port), _Handler)
        self._http.scripted = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._thread.join()
        self._http.drop()
        self._http.server_close()
        if self._http.errors:
            raise self._http.errors[0]

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def chats(self) -> list[Asked]:
        """The requests for completions that are no probes."""
        return [asked for asked in self.asked if asked.path == "/v1/chat/completions" and not is_probe(asked)]


def is_probe(asked: Asked) -> bool:
    return isinstance(asked.body, dict) and "one word: ready" in json.dumps(asked.body.get("messages"))


def after_probe(script: Script) -> Script:
    """Answer probes as an endpoint that offers everything, and leave the rest to a script."""
    listed = [{"token": "ready", "logprob": -0.1}]
    offered = completion("ready", logprobs={"content": [{**listed[0], "top_logprobs": listed}]})
    return lambda asked: offered if is_probe(asked) else script(asked)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128
    scripted: Scripted

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.errors: list[BaseException] = []
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        self.scripted.connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def drop(self) -> None:
        """End keep-alive connections, whose handlers would wait for a next request."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        scripted = self.server.scripted
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_json = "json" in (self.headers.get("Content-Type") or "")
        asked = Asked(
            self.command,
            self.path,
            json.loads(data) if is_json and data else data,
            dict(self.headers),
            time.monotonic(),
        )
        with scripted.lock:
            scripted.asked.append(asked)
            scripted.in_flight += 1
            scripted.max_in_flight = max(scripted.max_in_flight, scripted.in_flight)
        try:
            answer = scripted.script(asked)
            scripted.stopping.wait(answer.delay)
        finally:
            with scripted.lock:
                scripted.in_flight -= 1
        if answer.fault == "hang":
            scripted.stopping.wait(30.0)
        if answer.fault in ("hang", "reset"):
            self.close_connection = True
            if answer.fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return
        if answer.fault in ("trickle", "drip"):
            self.close_connection = True
            begun = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n" + b"\r\n" * (answer.fault == "trickle")
            while not scripted.stopping.wait(0.02):
                self.wfile.write(begun or b" ")  # raises when the client has gone
                begun = b"" if answer.fault == "trickle" else b"X-Slow: 1\r\n"
            return
        payload = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if answer.fault == "truncated":
            self.close_connection = True
            payload = payload[: len(payload) // 2]
        self.wfile.write(payload)

    do_GET = do_POST = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: `Scripted.asked` says more."""
