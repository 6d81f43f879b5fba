"""The fake endpoint: a request in, an answer out, and a count of everything."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dno_jax.fake_judge.batches import Batches
from dno_jax.fake_judge.behaviour import BROKEN, Behaviour, check_outcome, draw_delay, uniform
from dno_jax.fake_judge.checks import refuse
from dno_jax.fake_judge.completion import (
    complete,
    count_prompt_tokens,
    error_body,
    is_possible,
    settle,
    token_limit,
)
from dno_jax.fake_judge.counts import Counts, Entry
from dno_jax.fake_judge.http import Answer, Request, json_answer
from dno_jax.fake_judge.limits import Limits
from dno_jax.fake_judge.preference import Scorer
from dno_jax.fake_judge.reading import Asked, read_body


class Service:
    """Chat completions, models and the Batch API, as `behaviour` says.

    Args:
        behaviour: the judge's and the endpoint's.
        scorer: points in place of what `behaviour.prefers` names.
        schedule: what becomes of the first requests to arrive (None or "ok" is an answer; probes are left out).
        record: keeps every request in `log` and `bodies`.

    Attributes:
        behaviour, schedule, api_key: may be set at any time (limits and `batch_delay` are read at the start).
        counts: totals.
        log, bodies: requests in the order of their arrival.
        errors: what failed here that was not to fail.
    """

    def __init__(
        self,
        behaviour: Behaviour,
        *,
        scorer: Scorer | None = None,
        schedule: Sequence[str | None] = (),
        record: bool = True,
    ):
        self.behaviour = behaviour
        self.schedule = [check_outcome(outcome or "ok") for outcome in schedule]
        self.api_key = behaviour.api_key
        self.counts = Counts()
        self.log: list[Entry] = []
        self.bodies: list[dict[str, Any]] = []
        self.errors: list[BaseException] = []
        self._scorer = scorer
        self._record = record
        self._limits = Limits(behaviour, now=time.monotonic())
        self._batches = Batches(
            self._batch_line, expires=self._expires, delay=behaviour.batch_delay, errors=self.errors
        )
        self._batch_calls: Counter[str] = Counter()

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

    def handle(self, request: Request) -> Answer:
        """Answer a request; nothing here waits."""
        if (request.method, request.path) == ("GET", "/counts"):
            return json_answer(200, self.counts.as_json())
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        answer = self._answer(request, given=given)
        return _with_key(answer, given) if self.behaviour.echoes_key else answer

    def _answer(self, request: Request, *, given: str) -> Answer:
        route = (request.method, request.path)
        refused = self.api_key is not None and given != self.api_key
        if route == ("POST", "/v1/chat/completions"):
            return self._chat(request, given=given, refused=refused)
        if refused:
            return json_answer(401, _wrong_key(given))
        if route == ("GET", "/v1/models"):
            listed = self.behaviour.models or ("planted-judge",)
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "dno"} for name in listed]
            return json_answer(200, {"object": "list", "data": models})
        if request.path.startswith(("/v1/files", "/v1/batches")) and self.behaviour.batches:
            return self._batch_call(request)
        return json_answer(404, error_body(f"Invalid URL ({request.method} {request.path})"))

    def _batch_call(self, request: Request) -> Answer:
        """Answer, or fail: half of the failures before anything was done, half when only the reply is left to send."""
        call = f"{request.method} {request.path}"
        self._batch_calls[call] += 1
        drawn = uniform(self.behaviour.seed, "call", call, self._batch_calls[call])
        if drawn < self.behaviour.batch_fraction / 2:
            return json_answer(500, error_body("planted fault 500"))
        answer = self._batches.handle(request) or json_answer(404, error_body(f"Invalid URL ({call})"))
        self.counts.batches = self._batches.started
        return replace(answer, ending="close") if drawn < self.behaviour.batch_fraction else answer

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
            if turn.wait == math.inf:
                message = f"Request too large for {body['model']}: {_charged_tokens(body)} tokens."
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
        if not is_possible(outcome, asked):
            outcome = "ok"
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


def _with_key(answer: Answer, key: str) -> Answer:
    """Have an answer tell a key wherever an endpoint may: in a header, an error, the model's name, what it says."""
    answer = replace(answer, headers={**answer.headers, "x-key": key})
    try:
        content = json.loads(answer.body)
    except ValueError:
        return replace(answer, body=answer.body + key.encode())
    if "error" in content:
        content["error"]["message"] += f" (a request with the key {key})"
    if "model" in content:
        content["model"] += f"-{key}"
    for choice in content.get("choices", ()):
        for name, text in choice["message"].items():
            if text and " " in text:  # a sentence, or a verdict with its reasons
                told = text.replace("as planted", f"as planted by {key}")
                choice["message"][name] = told if told != text else f"{text} ({key})"
    return replace(answer, body=json.dumps(content).encode())


def _wrong_key(given: str) -> dict[str, Any]:
    return error_body(f"Incorrect API key provided: {given}.", code="invalid_api_key")


def _charged_tokens(body: dict[str, Any]) -> int:
    """What a request counts against the limit: the API takes the larger of what it is and what it may make."""
    return max(count_prompt_tokens(body), token_limit(body) or 0)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
