"""Rubrics that compare two candidates: a verdict with its reasons, or the probabilities of a verdict of one token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from dno_jax.annotation.judges.replies import few, object_schema, read_object, read_whole
from dno_jax.annotation.judges.rubric_file import JudgeRubric
from dno_jax.annotation.question import Reply, Unparsable

_PREFERENCES = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5)}
_TOKEN = r"^[^\s<>]{1,16}$"
# Of all that AlpacaEval recorded of its judge (4,814 verdicts) the least is 0.026, the next 0.57.
_LEAST_MASS = 0.01


class PairRubric(JudgeRubric):
    """A pairwise rubric: the reply says which of two candidates is better, or that they are equally good."""

    form = "pairwise"
    builtin = "pairwise_verdict"

    def parse(self, reply: str) -> tuple[float, float]:
        """Read a verdict as (p, 1 - p), p the preference for the candidate shown first: 1, 0, or 1/2 for a tie.

        Accepts one JSON object {"justification": str, "verdict": "first" | "second" | "tie"}, whitespace around it, and
        one ```json fence around the whole.

        Raises:
            Unparsable: anything else.
        """
        answer = read_object(reply)
        if set(answer) != {"justification", "verdict"}:
            raise Unparsable(f"expected justification and verdict, got {few(sorted(answer))}")
        if not isinstance(answer["justification"], str):
            raise Unparsable("the justification is no string")
        verdict = answer["verdict"]
        if not isinstance(verdict, str) or verdict not in _PREFERENCES:
            raise Unparsable(f"the verdict is {few([repr(verdict)])}, none of {', '.join(_PREFERENCES)}")
        return _PREFERENCES[verdict]

    def read(self, reply: Reply, *, shown: Sequence[str]) -> tuple[float, ...]:
        return read_whole(reply, self.parse, shown=shown)

    def schema(self, count: int) -> Mapping[str, Any]:
        verdict = {"type": "string", "enum": list(_PREFERENCES)}
        return object_schema({"justification": {"type": "string"}, "verdict": verdict})

    def _names(self, count: int) -> list[str]:
        return ["1", "2"]

    def _reply_shape(self, count: int) -> str:
        return '{"justification": "...", "verdict": <"first", "second" or "tie">}'


class TokenRubric(JudgeRubric):
    """A rubric of one-token verdicts, read from the token's probabilities: AlpacaEval 2.0's weighted form.

    Attributes:
        first_token, second_token: what the candidates are called, by their places; one token each to the judge.
    """

    form = "one-token"
    builtin = "pairwise_token"
    optional = frozenset({"first_token", "second_token"})

    first_token: str = Field(pattern=_TOKEN)
    second_token: str = Field(pattern=_TOKEN)

    @model_validator(mode="after")
    def _are_two(self) -> TokenRubric:
        if self.first_token == self.second_token:
            raise ValueError(f"first_token and second_token are both {self.first_token!r}")
        return self

    def parse(self, first_logprobs: Mapping[str, float] | None) -> tuple[float, float]:
        """Read (p, 1 - p), p = P(first_token) / (P(first_token) + P(second_token)).

        Args:
            first_logprobs: token -> log-probability (nats) of the likeliest first tokens; one that is not among them
                has probability 0.

        Raises:
            Unparsable: there are none, the two have less than 1 % of the probability together, or one's is no
                log-probability. A judge that begins its reply with other words says nothing of the two: what little it
                leaves to their names is no verdict.
        """
        if first_logprobs is None:
            raise Unparsable("no log-probabilities came with the reply; form=logprob needs an endpoint that gives them")
        first, second = (first_logprobs.get(token, -math.inf) for token in (self.first_token, self.second_token))
        if math.isnan(first) or math.isnan(second) or max(first, second) == math.inf:
            raise Unparsable(f"log-probabilities {first} and {second}")
        if max(first, second) == -math.inf:
            found = few([repr(token) for token in first_logprobs])
            raise Unparsable(f"neither {self.first_token!r} nor {self.second_token!r} among the first tokens {found}")
        likelier = max(first, second)
        odds = [math.exp(logprob - likelier) for logprob in (first, second)]
        mass = math.exp(min(likelier, 0.0)) * sum(odds)
        if mass < _LEAST_MASS:
            raise Unparsable(
                f"{self.first_token!r} and {self.second_token!r} have a probability of {mass:.2g} together; a verdict "
                f"needs {_LEAST_MASS:g}"
            )
        preference = odds[0] / sum(odds)
        return preference, 1.0 - preference

    def read(self, reply: Reply, *, shown: Sequence[str]) -> tuple[float, ...]:
        return self.parse(reply.first_logprobs)

    def schema(self, count: int) -> None:
        return None

    def _names(self, count: int) -> list[str]:
        return [self.first_token, self.second_token]

    def _fields(self, count: int) -> dict[str, Any]:
        return {"first_token": self.first_token, "second_token": self.second_token}

    def _reply_shape(self, count: int) -> str:
        return f"{self.first_token} or {self.second_token}"
