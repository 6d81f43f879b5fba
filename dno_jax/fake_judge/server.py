"""The fake judge as a server in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.fake_judge.behaviour import Behaviour
from dno_jax.fake_judge.http import Connection
from dno_jax.fake_judge.preference import Scorer
from dno_jax.fake_judge.service import Service


class FakeJudge(Service):
    """The service on a port, as a context manager.

        with FakeJudge(delay=0.1, first_bias=0.2) as server:
            section = OpenAISection(base_url=server.url, api_key_env=None)

    What becomes of a request is a function of the seed, its body and how often that came: not of what else arrives, and
    when. Rate limits and `schedule` are what they are: functions of arrival.

    Args:
        behaviour: the judge's and the endpoint's.
        scorer, schedule, record: of the service.
        host, port: where; port 0 takes a free one.
        changes: fields of the behaviour.

    Attributes:
        url: for `base_url`.

    Raises:
        DnoError: on entering, if the address is taken. On leaving, the first error of the service itself is raised.
    """

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        *,
        scorer: Scorer | None = None,
        schedule: Sequence[str | None] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        record: bool = True,
        **changes: Any,
    ):
        told = (behaviour or Behaviour()).model_dump() | changes
        super().__init__(Behaviour.model_validate(told), scorer=scorer, schedule=schedule, record=record)
        self.url = ""
        self._host = host
        self._port = port
        self._connections: set[Connection] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake-judge")

    def __enter__(self) -> FakeJudge:
        self._thread.start()
        self._ready.wait()
        if not self.url:
            self._thread.join()
            raise self.errors[0]
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self.errors:
            raise self.errors[0]

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # raised again in the thread of the context
            self.errors.append(error)
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            server = await self._loop.create_server(
                lambda: Connection(self.handle, members=self._connections, errors=self.errors),
                self._host,
                self._port,
                backlog=1024,
            )
        except OSError as error:
            raise DnoError(
                f"{self._host}:{self._port}: {error.strerror}; choose another port, or 0 for a free one"
            ) from None
        host, port = server.sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}/v1"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for connection in list(self._connections):
            connection.abort()
        await server.wait_closed()
        await asyncio.sleep(0)  # connections say goodbye on the next turn
