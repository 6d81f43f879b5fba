"""A client without a network, for what the judges' client and the budget do with replies and failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dno_jax.annotation.question import Question, Reply, Unparsable
from dno_jax.annotation.transport.client import EndpointClient
from dno_jax.annotation.transport.probe import Pay
from dno_jax.config import OpenAISection
from dno_jax.endpoint import Trouble
from dno_jax.errors import DnoError

SECTION = OpenAISection(model="m", api_key_env=None, max_tokens=100, max_tries=3)


@dataclass
class Used:
    tokens_in: int = 0
    tokens_out: int = 0


class FakeClient(EndpointClient):
    """Answers by a script, then by `default`; counts what it was asked and how much of it at once."""

    def __init__(
        self,
        script: Sequence[Reply | Trouble | BaseException] = (),
        *,
        default: Callable[[], Reply | Trouble] = lambda: said("1"),
        probe: Used | BaseException | None = None,
        delay: float = 0.0,
    ):
        self.script = list(script)
        self.default = default
        self.found = probe or Used()
        self.delay = delay
        self.bodies: list[Mapping[str, Any]] = []
        self.probes = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.closed = False
        self.stopped: DnoError | None = None

    who = "the judge 'm'"
    answered = 0
    offers = None

    async def is_there(self, body: Mapping[str, Any], *, pay: Pay) -> bool:
        return True

    async def probe(self, body: Mapping[str, Any], *, pay: Pay, **_: Any) -> None:
        async def send() -> Reply:
            self.probes += 1
            await asyncio.sleep(0)
            if isinstance(self.found, BaseException):
                raise self.found
            return said("ready", tokens_in=self.found.tokens_in, tokens_out=self.found.tokens_out)

        await pay({**body, "messages": []}, send)

    async def send(
        self, body: Mapping[str, Any], *, schema: Mapping[str, Any] | None = None, tokens: int = 0, pay: Pay
    ) -> Reply | Trouble:
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.in_flight -= 1
        result = self.script.pop(0) if self.script else self.default()
        if isinstance(result, BaseException):
            raise result
        return result

    def scrub(self, text: str) -> str:
        return text.replace("the key", "[key]")

    def words(self, text: str) -> str:
        return " ".join(self.scrub(text).split())

    def stop(self, error: DnoError) -> None:
        self.stopped = error

    async def drain(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True


def said(text: str, *, tokens_in: int = 40, tokens_out: int = 10, **fields: Any) -> Reply:
    """A reply that cost $0.0006 at $10 a million tokens in and $20 a million out."""
    return Reply(text, tokens_in=tokens_in, tokens_out=tokens_out, **fields)


def question(text: str, *, asked: OpenAISection = SECTION, **fields: Any) -> Question:
    """A question whose reply is one number."""

    def read(reply: Reply) -> tuple[float, ...]:
        try:
            return (float(reply.text or ""), 0.5)
        except ValueError:
            raise Unparsable(f"no number: {reply.text}") from None

    body = {"model": asked.model, "messages": [{"role": "user", "content": text}], "max_tokens": asked.max_tokens}
    judge = f"judge {asked.model}"
    return Question(asked=asked, judge=judge, prompt_id="p", order=(0, 1), body=body, read=read, **fields)
