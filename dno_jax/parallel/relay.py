"""A line to the coordinator that does not break: jax aborts its process, with a C++ stack, as soon as its own does.

jax's client offers a callback for that, which no Python can be (jaxlib 0.10 to 0.12: std::bad_cast). So a process talks
to a thread of its own, which talks to the coordinator, notes when that is gone, and keeps jax's side open: the one
sentence and the exit status are then ours (heartbeat.py).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_RETRY_SECONDS = 0.2
_BYTES = 1 << 16


class Relay:
    """Passes what jax's client and the coordinator say to each other.

    Attributes:
        address: for jax, in place of the coordinator's.
        gone: set when a line to the coordinator has broken at its end.
    """

    def __init__(self, coordinator: str):
        host, port = coordinator.rsplit(":", 1)
        self._coordinator = host.strip("[]"), int(port)
        self.gone = threading.Event()
        self._kept: list[socket.socket] = []  # jax's sides, which nobody is to close
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        _know_no_proxy()
        _begin(self._accept)

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            _begin(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        """Connect one of jax's lines; process 0 may come later."""
        while not self.gone.is_set():
            try:
                far = socket.create_connection(self._coordinator, timeout=10.0)
            except OSError:
                time.sleep(_RETRY_SECONDS)
                continue
            far.settimeout(None)
            for line in (near, far):
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            left = threading.Event()  # jax itself has closed this line
            _begin(self._send, near, far, left)
            _begin(self._receive, far, near, left)
            return
        self._kept.append(near)

    def _send(self, near: socket.socket, far: socket.socket, left: threading.Event) -> None:
        while said := _received(near):
            try:
                far.sendall(said)
            except OSError:  # what is received ends too
                return
        left.set()
        near.close()
        with suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)

    def _receive(self, far: socket.socket, near: socket.socket, left: threading.Event) -> None:
        self._kept.append(near)
        while said := _received(far):
            try:
                near.sendall(said)
            except OSError:
                left.set()
                break
        far.close()
        if left.is_set():
            self._kept.remove(near)
        else:
            self.gone.set()


def _begin(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, name="relay", daemon=True).start()


def _received(line: socket.socket) -> bytes:
    try:
        return line.recv(_BYTES)
    except OSError:
        return b""


def _know_no_proxy() -> None:
    """Let gRPC ask no proxy, where there is one, for this address."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return
    for name in ("no_proxy", "NO_PROXY"):
        known = os.environ.get(name, "")
        if "127.0.0.1" not in known.split(","):
            os.environ[name] = ",".join(filter(None, [known, "127.0.0.1"]))
