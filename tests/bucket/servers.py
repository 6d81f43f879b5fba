"""Object stores on this machine's loopback, which keep their objects while they are stopped."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

BUCKET = "pail"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class S3:
    """Moto's server; what it holds is this process's."""

    scheme = "s3"

    def __init__(self):
        pytest.importorskip("s3fs")
        pytest.importorskip("moto.server")
        self.port = free_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "AKIAEXAMPLEEXAMPLE00",
            "AWS_SECRET_ACCESS_KEY": "notAkeyButAsLongAsOne0123456789abcdefghi",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self):
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self):
        with suppress(Exception):
            self._server.stop()


class Gcs:
    """gcp-storage-emulator, which makes objects whatever is there already."""

    scheme = "gs"

    def __init__(self):
        pytest.importorskip("gcsfs")
        pytest.importorskip("gcp_storage_emulator")
        from gcp_storage_emulator.server import create_server

        self.port = free_port()
        self.environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.port}"}
        self._server = create_server("127.0.0.1", self.port, in_memory=True, default_bucket=BUCKET)

    def start(self):
        from gcp_storage_emulator.server import APIThread

        self._server._api = APIThread("127.0.0.1", self.port, self._server._storage)  # a thread starts once
        self._server.start()

    def stop(self):
        with suppress(Exception):
            self._server.stop()


@contextmanager
def serving(kind: type, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3 | Gcs]:
    """Serve an empty bucket, which this process and those that it starts are told of by their environment."""
    server = kind()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    try:
        import fsspec

        files = fsspec.filesystem(server.scheme, use_listings_cache=False, skip_instance_cache=True)
        if server.scheme == "s3":
            if files.exists(BUCKET):
                files.rm(BUCKET, recursive=True)
            files.mkdir(BUCKET)
        yield server
    finally:
        server.stop()
