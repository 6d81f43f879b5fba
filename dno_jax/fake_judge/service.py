"""What becomes of each request, and a count of everything."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dno_jax.fake_judge.behaviour import BROKEN, MISJUDGED, Behaviour, check_outcome, draw_delay, uniform
from dno_jax.fake_judge.checks import ApiError, check
from dno_jax.fake_judge.completion import complete, count_prompt_tokens, opinion_name, token_limit
from dno_jax.fake_judge.counts import Counts, Entry
from dno_jax.fake_judge.limits import Limits
from dno_jax.fake_judge.preference import Scorer
from dno_jax.fake_judge.reading import Asked, read_body


@dataclass(frozen=True)
class Case:
    """A request that is answered, or meets its fault.

    Attributes:
        body, digest: of the request.
        asked: what it asks.
        outcome: what becomes of it: a name of OUTCOMES, a status, or "probe".
        attempt: how often it has come, from 1.
        headers: that tell of limits.
    """

    body: dict[str, Any]
    digest: str
    asked: Asked
    outcome: str
    attempt: int
    headers: dict[str, str] = field(default_factory=dict)


class Service:
    """Judges requests as `behaviour` says; how that is sent is no matter of its.

    Args:
        behaviour: the judge's and the endpoint's.
        scorer: points in place of what `behaviour.prefers` names.
        schedule: what becomes of the first requests to arrive (None or "ok" is an answer; probes are left out).
        record: keeps every request in `log` and `bodies`.

    Attributes:
        behaviour, schedule, api_key: may be set at any time (limits and `batch_delay` are read at the start).
        counts: totals.
        log, bodies: requests in the order of their arrival.
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
        self._scorer = scorer
        self._record = record
        self._limits = Limits(behaviour, now=time.monotonic())

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

    def demand_key(self, given: str) -> None:
        if self.api_key is not None and given != self.api_key:
            raise ApiError(401, f"Incorrect API key provided: {given}.", "invalid_api_key")

    def admit(self, body: Any, *, key: str) -> Case:
        """Take a live request in, and count it as in flight, which it is until the caller says that it is not.

        Raises:
            ApiError: for one that gets no further than the door: its key, its fields, the limits.
        """
        try:
            self.demand_key(key)
            check(body, behaviour=self.behaviour)
        except ApiError as error:
            self._note(body, None, str(error.status))
            raise
        asked = read_body(body)
        tokens = max(count_prompt_tokens(body), token_limit(body) or 0)  # the larger of what it is and what it may make
        turn = self._limits.admit(tokens=tokens, now=time.monotonic())
        if turn.wait is not None:
            self._note(body, asked, "limited")
            message = f"Rate limit reached for {body['model']}. Please try again in {turn.wait:.3f}s."
            if turn.wait == math.inf:
                message = f"Request too large for {body['model']}: {tokens} tokens."
            raise ApiError(429, message, "rate_limit_exceeded", headers=turn.headers)
        case = self._settle(body, asked, headers=turn.headers)
        self.counts.in_flight += 1
        self.counts.max_in_flight = max(self.counts.max_in_flight, self.counts.in_flight)
        self._note(body, asked, case.outcome, digest=case.digest)
        return case

    def delay(self, case: Case) -> float:
        """Seconds that the answer takes."""
        return draw_delay(self.behaviour, case.digest, case.attempt)

    def complete(self, case: Case) -> dict[str, Any]:
        """Say what the case's outcome says: a chat completion."""
        taken = {name: value for name, value in case.body.items() if name not in self.behaviour.ignored_fields}
        completion = complete(
            taken,
            case.asked,
            outcome=case.outcome,
            behaviour=self.behaviour,
            scorer=self._scorer,
            completion_id=f"chatcmpl-{case.digest[:16]}-{case.attempt}",
        )
        self.counts.prompt_tokens += completion["usage"]["prompt_tokens"]
        self.counts.completion_tokens += completion["usage"]["completion_tokens"]
        return completion

    def judge_line(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Answer a batch's line: HTTP status and the body of the reply."""
        self.counts.batch_lines += 1
        try:
            check(body, behaviour=self.behaviour)
        except ApiError as error:
            self._note(body, None, str(error.status))
            return error.status, error.body
        case = self._settle(body, read_body(body))
        self._note(body, case.asked, case.outcome, digest=case.digest)
        if case.outcome.isdigit() or case.outcome in BROKEN:
            status = int(case.outcome) if case.outcome.isdigit() else 500
            return status, ApiError(status, f"planted fault {case.outcome}").body
        return 200, self.complete(case)

    def expires(self, body: dict[str, Any]) -> bool:
        """Whether a batch's window closes before this line's turn."""
        return uniform(self.behaviour.seed, "expires", _digest(body)) < self.behaviour.batch_expired

    def _settle(self, body: dict[str, Any], asked: Asked, *, headers: dict[str, str] | None = None) -> Case:
        digest = _digest(body)
        outcome, attempt = "probe", 1
        if asked.form != "probe":
            self.counts.tries[digest] += 1
            attempt = self.counts.tries[digest]
            outcome = self.schedule.pop(0) if self.schedule else self._draw_outcome(body, digest, attempt)
            outcome = outcome if outcome and _is_possible(outcome, asked) else "ok"
            if outcome == "ok":
                self.counts.answered[digest] += 1
        return Case(body, digest, asked, outcome, attempt, headers or {})

    def _draw_outcome(self, body: dict[str, Any], digest: str, attempt: int) -> str:
        behaviour = self.behaviour
        if behaviour.refusals and uniform(behaviour.seed, "refusal", opinion_name(body)) < behaviour.refusals:
            return "refusal"
        if not behaviour.fraction or uniform(behaviour.seed, "fault", digest, attempt) >= behaviour.fraction:
            return "ok"
        return behaviour.faults[int(len(behaviour.faults) * uniform(behaviour.seed, "which", digest, attempt))]

    def _note(self, body: Any, asked: Asked | None, outcome: str, *, digest: str | None = None) -> None:
        self.counts.outcomes[outcome] += 1
        if asked is not None:
            self.counts.forms[asked.form] += 1
        if self._record:
            form = asked.form if asked else None
            self.log.append(Entry(digest or _digest(body), form, outcome, self.counts.in_flight))
            self.bodies.append(body)


def _is_possible(outcome: str, asked: Asked) -> bool:
    """Whether such a thing can become of such a request: a chat has no verdict to spoil, a token cannot be cut."""
    if asked.form == "chat":
        return outcome not in MISJUDGED
    return (outcome, asked.form) != ("length", "token")


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
