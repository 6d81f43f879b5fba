"""How often one question is asked: which tries count, what the next one is, and whether a pause comes before it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dno_jax.addresses import Purpose, integer
from dno_jax.annotation.question import Question, Reply, Verdict
from dno_jax.annotation.transport.completion import BROKEN
from dno_jax.config import ChatSection
from dno_jax.endpoint import Trouble


class Tries:
    """The tries of one question in one call.

    A try that the endpoint turns away for its limits is none: those end with `max_outage`. So do failures of the server
    (5xx) until there is a sign that it is alive, and that the question is to blame. A reply that could not be read is
    asked for with another seed; where the same bytes would bring the same words, it is not asked for again.

    Attributes:
        body: of the next request.
        pauses: whether a pause comes before it; after the last try that counts, the endpoint's client sees to those.
        needs_a_sign: whether a small request should find out, before the last try, if the endpoint is there at all.

    Args:
        most: tries that count.
        takes_seed: whether the endpoint takes seeds.
    """

    def __init__(self, question: Question, section: ChatSection, *, most: int, takes_seed: bool):
        self.body: Mapping[str, Any] = question.body
        self.pauses = self.needs_a_sign = False
        self._is_alive = False
        self._section = section
        self._most = most
        self._used = 0
        self._answered: int | None = None
        self._limited_since: float | None = None
        fixed = question.body.get("temperature") == 0.0
        # The probabilities of a first token depend on no seed.
        self._has_seed = takes_seed and "seed" in question.body and not question.body.get("logprobs")
        self._is_fixed = question.body.get("logprobs", False) or (fixed and not self._has_seed)

    def count(self, result: Reply | Trouble, verdict: Verdict, *, before: int, after: int) -> Trouble:
        """Count a try that brought no answer, and say what follows.

        Args:
            before, after: how many requests the endpoint had answered when it was sent, and when it came back.
        """
        # Whether it has answered anything since this question failed last: else a storm may have begun.
        is_alive = self._is_alive or (self._answered is not None and before > self._answered)
        self._is_alive, self._answered, self.needs_a_sign = False, after, False
        if isinstance(result, Reply):
            return self._count_reply(result, verdict)
        trouble = replace(result, retry_after=None)
        if result.asks_for_a_pause:  # that one is the endpoint's, and its client keeps it
            self.pauses = False
            now = time.monotonic()
            self._limited_since = now if self._limited_since is None else self._limited_since
            is_over = now - self._limited_since >= self._section.max_outage
            return replace(trouble, then="give up") if is_over else trouble
        self._used += 1
        self._limited_since = None
        self.pauses = self._used < self._most
        if self._used >= self._most and (is_alive or not trouble.is_the_servers):
            return replace(trouble, then="give up")
        self.needs_a_sign = trouble.is_the_servers and self._used >= max(1, self._most - 1)
        return trouble

    def signed(self, trouble: Trouble) -> Trouble:
        """Note a sign of life, and say what follows of the failure before it."""
        self._is_alive, self.needs_a_sign = True, False
        return replace(trouble, then="give up") if self._most == 1 else trouble

    def _count_reply(self, reply: Reply, verdict: Verdict) -> Trouble:
        self._used += 1
        self._limited_since = None
        self.pauses = reply.finish == BROKEN  # what does not parse is no reason to wait
        may_differ = reply.finish == BROKEN or not self._is_fixed
        if self._has_seed and reply.finish != BROKEN:
            self.body = {**self.body, "seed": integer(Purpose.ANOTHER_TRY, self.body["seed"], below=2**31)}
        return Trouble(verdict.detail, then="retry" if may_differ and self._used < self._most else "give up")
