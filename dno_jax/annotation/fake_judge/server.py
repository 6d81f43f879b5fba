"""The fake judge as a server: chat completions, models, the Batch API, and a count of everything."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from dno_jax.annotation.fake_judge.batches import Batches
from dno_jax.annotation.fake_judge.behaviour import BROKEN, Behaviour, check_outcome, draw_delay, uniform
from dno_jax.annotation.fake_judge.checks import refuse
from dno_jax.annotation.fake_judge.completion import (
    complete,
    count_prompt_tokens,
    error_body,
    settle,
    token_limit,
)
from dno_jax.annotation.fake_judge.counts import Counts, Entry
from dno_jax.annotation.fake_judge.http import Answer, Connection, Request, json_answer
from dno_jax.annotation.fake_judge.limits import Limits
from dno_jax.annotation.fake_judge.preference import Scorer
from dno_jax.annotation.fake_judge.reading import Asked, read_body
from dno_jax.errors import DnoError

_PROBE = Asked("probe", "")


class FakeJudge:
    """The server as a context manager; it runs in a thread of its own.

        with FakeJudge(delay=0.1, first_bias=0.2) as server:
            section = OpenAISection(base_url=server.url, api_key_env=None)

    What becomes of a request is a function of the seed, its body and how often that came: not of what else arrives, and
    when. Rate limits and `schedule` are what they are: functions of arrival.

    Args:
        behaviour: the judge's and the endpoint's.
        scorer: points in place of what `behaviour.prefers` names.
        schedule: what becomes of the first requests to arrive (None or "ok" is an answer; probes are left out).
        host, port: where; port 0 takes a free one.
        record: keeps every request in `log` and `bodies`.
        changes: fields of the behaviour.

    Attributes:
        behaviour, schedule, api_key: may be set while it runs (the limits of rates are read at the start).
        counts: totals.
        log, bodies: requests in the order of their arrival.
        errors: what the server itself failed at; leaving the context raises the first.

    Raises:
        DnoError: on entering, if the address is taken.
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
        told = (behaviour or Behaviour()).model_dump()
        self.behaviour = Behaviour.model_validate({**told, **changes})
        self.schedule = [check_outcome(outcome or "ok") for outcome in schedule]
        self.api_key = self.behaviour.api_key
        self.counts = Counts()
        self.log: list[Entry] = []
        self.bodies: list[dict[str, Any]] = []
        self.errors: list[BaseException] = []
        self.url = ""
        self._scorer = scorer
        self._host = host
        self._port = port
        self._record = record
        self._limits = Limits(self.behaviour, now=time.monotonic())
        self._batches = Batches(self._batch_line, expires=self._expires, delay=self.behaviour.batch_delay)
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

    @property
    def requests(self) -> int:
        """Requests for a verdict, whatever became of them (probes and refused keys left out)."""
        return self.counts.requests

    @property
    def duplicates(self) -> int:
        """Good verdicts and answers given to a request that had been given one before."""
        return self.counts.duplicates

    @property
    def max_in_flight(self) -> int:
        return self.counts.max_in_flight

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
                lambda: Connection(self._handle, members=self._connections, errors=self.errors),
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

    def _handle(self, request: Request) -> Answer:
        route = (request.method, request.path)
        if route == ("GET", "/counts"):
            return json_answer(200, self.counts.as_json())
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        refused = self.api_key is not None and given != self.api_key
        if route == ("POST", "/v1/chat/completions"):
            return self._chat(request, given=given, refused=refused)
        if refused:
            return json_answer(401, _wrong_key(given))
        if route == ("GET", "/v1/models"):
            listed = self.behaviour.models or ("planted-judge",)
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "dno"} for name in listed]
            return json_answer(200, {"object": "list", "data": models})
        answer = self._batches.handle(request) if self.behaviour.batches else None
        self.counts.batches = self._batches.started
        return answer or json_answer(404, error_body(f"Invalid URL ({request.method} {request.path})"))

    def _chat(self, request: Request, *, given: str, refused: bool) -> Answer:
        try:
            body: Any = json.loads(request.body)
        except (ValueError, RecursionError):
            body = None
        if refused:
            self._note(body, None, "401")
            return json_answer(401, _wrong_key(given))
        if (problem := refuse(body, behaviour=self.behaviour)) is not None:
            self._note(body, None, str(problem.status))
            return json_answer(problem.status, error_body(problem.message, code=problem.code, param=problem.param))
        return self._judge(body, given=given)

    def _judge(self, body: dict[str, Any], *, given: str) -> Answer:
        turn = self._limits.admit(tokens=_charged_tokens(body), now=time.monotonic())
        asked = read_body(body)
        if turn.wait is not None:
            self._note(body, asked, "limited")
            message = f"Rate limit reached for {body['model']}. Please try again in {turn.wait:.3f}s."
            return json_answer(429, error_body(message, code="rate_limit_exceeded"), headers=turn.headers)
        outcome, attempt, digest = self._settle(body, asked)
        self.counts.in_flight += 1
        self.counts.max_in_flight = max(self.counts.max_in_flight, self.counts.in_flight)
        self._note(body, asked, outcome, digest=digest)
        delay = draw_delay(self.behaviour, digest, attempt)
        headers = {"x-request-id": f"req_{digest[:16]}_{attempt}", **turn.headers}
        common: dict[str, Any] = {"delay": delay, "done": self._done}
        if outcome.isdigit():
            if outcome == "429":
                headers["retry-after"] = self.behaviour.retry_after
            said = "slow down" if outcome == "429" else f"planted fault {outcome}"
            message = f"{said} (a request with the key {given})"
            code = "rate_limit_exceeded" if outcome == "429" else None
            return json_answer(int(outcome), error_body(message, code=code), headers=headers, **common)
        if outcome == "html":
            return Answer(200, b"<html>a proxy's front page</html>", "text/html", headers, **common)
        if outcome in ("hang", "trickle", "close", "reset"):
            return Answer(ending=outcome, headers=headers, **common)
        text = json.dumps(self._complete(body, asked, outcome, digest=digest, attempt=attempt)).encode()
        if outcome == "cut_json":
            text = text[: len(text) // 2]
        return Answer(body=text, headers=headers, ending="truncated" if outcome == "truncated" else "whole", **common)

    def _settle(self, body: dict[str, Any], asked: Asked) -> tuple[str, int, str]:
        """What becomes of a request, how often it has come, and its digest."""
        digest = _digest(body)
        if asked.form == "probe":
            return "probe", 1, digest
        self.counts.tries[digest] += 1
        attempt = self.counts.tries[digest]
        if self.schedule:
            outcome = self.schedule.pop(0) or "ok"
        else:
            outcome = settle(asked, body, digest=digest, attempt=attempt, behaviour=self.behaviour)
        if outcome == "ok":
            self.counts.answered[digest] += 1
        return outcome, attempt, digest

    def _complete(
        self, body: dict[str, Any], asked: Asked, outcome: str, *, digest: str, attempt: int
    ) -> dict[str, Any]:
        taken = {name: value for name, value in body.items() if name not in self.behaviour.ignored_fields}
        completion = complete(
            taken,
            asked,
            outcome=outcome,
            behaviour=self.behaviour,
            scorer=self._scorer,
            completion_id=f"chatcmpl-{digest[:16]}-{attempt}",
        )
        self.counts.prompt_tokens += completion["usage"]["prompt_tokens"]
        self.counts.completion_tokens += completion["usage"]["completion_tokens"]
        return completion

    def _batch_line(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.counts.batch_lines += 1
        if (problem := refuse(body, behaviour=self.behaviour)) is not None:
            self._note(body, None, str(problem.status))
            return problem.status, error_body(problem.message, code=problem.code, param=problem.param)
        asked = read_body(body)
        outcome, attempt, digest = self._settle(body, asked)
        self._note(body, asked, outcome, digest=digest)
        if outcome.isdigit() or outcome in BROKEN:
            return int(outcome) if outcome.isdigit() else 500, error_body(f"planted fault {outcome}")
        return 200, self._complete(body, asked, outcome, digest=digest, attempt=attempt)

    def _expires(self, body: dict[str, Any]) -> bool:
        return uniform(self.behaviour.seed, "expires", _digest(body)) < self.behaviour.batch_expired

    def _note(self, body: Any, asked: Asked | None, outcome: str, *, digest: str | None = None) -> None:
        self.counts.outcomes[outcome] += 1
        if asked is not None:
            self.counts.forms[asked.form] += 1
        if self._record:
            form = asked.form if asked else None
            self.log.append(Entry(digest or _digest(body), form, outcome, self.counts.in_flight))
            self.bodies.append(body)

    def _done(self) -> None:
        self.counts.in_flight -= 1


def _wrong_key(given: str) -> dict[str, Any]:
    return error_body(f"Incorrect API key provided: {given}.", code="invalid_api_key")


def _charged_tokens(body: dict[str, Any]) -> int:
    """What a request counts against the limit: the API takes the larger of what it is and what it may make."""
    return max(count_prompt_tokens(body), token_limit(body) or 0)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
