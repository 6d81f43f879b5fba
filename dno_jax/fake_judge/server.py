"""The fake judge as a server in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from aiohttp import web

from dno_jax.errors import DnoError
from dno_jax.fake_judge.batches import Batches
from dno_jax.fake_judge.behaviour import Behaviour, uniform
from dno_jax.fake_judge.checks import ApiError
from dno_jax.fake_judge.preference import Scorer
from dno_jax.fake_judge.service import Case, Service
from dno_jax.fake_judge.wire import ENDINGS, Cut, cut_off, tell_key, trickle

_MAX_BODY_BYTES = 256 * 2**20
_SILENT = ("hang", "trickle", "close", "reset")  # of these nobody is told what was said

_LOG = logging.getLogger(__name__)  # what is no HTTP is answered with a 400, and is no news for the terminal
_LOG.addHandler(logging.NullHandler())

_Handler = Callable[[web.Request], Awaitable[Any]]


class FakeJudge(Service):
    """The service on a port, as a context manager: chat completions, models and the Batch API.

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
        errors: what failed here that was not to fail.

    Raises:
        DnoError: on entering, if the address is taken. On leaving, the first of `errors` is raised.
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
        told = Behaviour.model_validate((behaviour or Behaviour()).model_dump() | changes)
        super().__init__(told, scorer=scorer, schedule=schedule, record=record)
        self.url = ""
        self.errors: list[BaseException] = []
        self._host = host
        self._port = port
        self._batches = Batches(self.judge_line, expires=self.expires, delay=told.batch_delay, errors=self.errors)
        self._batch_calls: Counter[str] = Counter()
        self._listening: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, name="fake-judge")

    def __enter__(self) -> FakeJudge:
        self._thread.start()
        try:
            self.url = self._listening.result()
        except BaseException:
            self._thread.join()
            raise
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
            if self._listening.done():
                self.errors.append(error)
            else:
                self._listening.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application(middlewares=[self._guard], client_max_size=_MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/counts", self._show_counts),
                web.get("/v1/models", self._list_models),
                web.post("/v1/chat/completions", self._chat),
                *self._batches.routes(),
            ]
        )
        # A handler is cancelled when its client goes: only so does a hanging answer have an end.
        runner = web.AppRunner(app, access_log=None, logger=_LOG, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port, backlog=1024).start()
            host, port = runner.addresses[0][:2]
            self._listening.set_result(f"http://{host}:{port}/v1")
            await self._stop.wait()
        except OSError as error:
            address = f"{self._host}:{self._port}"
            raise DnoError(f"{address}: {error.strerror}; choose another port, or 0 for a free one") from None
        finally:
            for connection in runner.server.connections if runner.server else ():
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Demand the key, word all errors as the API does, and send the answer, or what is left of it."""
        call, key, ending = f"{request.method} {request.path}", _key(request), ""
        if call == "GET /counts":
            return await handler(request)
        try:
            if call != "POST /v1/chat/completions":  # there it is counted, too
                self.demand_key(key)
            if request.path.startswith(("/v1/files", "/v1/batches")):
                ending = self._draw_batch_ending(call)
            response = await handler(request)
        except Cut as cut:
            response, ending = cut.response, cut.ending
        except ApiError as error:
            response = error.response()
        except web.HTTPException as error:
            no_route = error.status in (404, 405)
            response = (_no_route(call) if no_route else ApiError(error.status, error.reason)).response()
        except ConnectionError:  # the client has gone amid its request
            return web.Response()
        except Exception as error:  # of the server's user, whose scorer runs here: told when the server ends
            self.errors.append(error)
            response = ApiError(500, "the fake judge itself failed").response()
        self.counts.batches = self._batches.started
        if self.behaviour.echoes_key:
            tell_key(response, key)
        if ending:
            await cut_off(request, response, ending)
        return response

    def _draw_batch_ending(self, call: str) -> str:
        """Half of the failures come before anything was done, half when only the reply is left to send."""
        if not self.behaviour.batches:
            raise _no_route(call)
        self._batch_calls[call] += 1
        drawn = uniform(self.behaviour.seed, "call", call, self._batch_calls[call])
        if drawn < self.behaviour.batch_fraction / 2:
            raise ApiError(500, "planted fault 500")
        return "close" if drawn < self.behaviour.batch_fraction else ""

    async def _show_counts(self, request: web.Request) -> web.Response:
        return web.json_response(self.counts.as_json())

    async def _list_models(self, request: web.Request) -> web.Response:
        listed = self.behaviour.models or ("planted-judge",)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "dno"} for name in listed]
        return web.json_response({"object": "list", "data": models})

    async def _chat(self, request: web.Request) -> web.Response:
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError):
            body = None
        case = self.admit(body, key=_key(request))
        try:
            response = self._respond(case, key=_key(request))
            await asyncio.sleep(self.delay(case))
            if case.outcome == "hang":
                await asyncio.Event().wait()
            elif case.outcome == "trickle":
                await trickle(request)
        finally:  # before the answer is sent, since who has it may look at the counts; and when the client has gone
            self.counts.in_flight -= 1
        if case.outcome in ENDINGS:
            raise Cut(response, case.outcome)
        return response

    def _respond(self, case: Case, *, key: str) -> web.Response:
        headers = {"x-request-id": f"req_{case.digest[:16]}_{case.attempt}", **case.headers}
        if case.outcome.isdigit():
            said, code = f"planted fault {case.outcome}", None
            if case.outcome == "429":
                said, code = "slow down", "rate_limit_exceeded"
                headers["retry-after"] = self.behaviour.retry_after
            message = f"{said} (a request with the key {key})"
            return ApiError(int(case.outcome), message, code, headers=headers).response()
        if case.outcome == "html":
            return web.Response(body=b"<html>a proxy's front page</html>", content_type="text/html", headers=headers)
        if case.outcome in _SILENT:
            return web.Response(headers=headers)
        text = json.dumps(self.complete(case)).encode()
        if case.outcome == "cut_json":
            text = text[: len(text) // 2]
        return web.Response(body=text, content_type="application/json", headers=headers)


def _key(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


def _no_route(call: str) -> ApiError:
    return ApiError(404, f"Invalid URL ({call})")
