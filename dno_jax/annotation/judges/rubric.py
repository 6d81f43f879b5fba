"""Rubrics that grade by points, and the loading of rubrics of every form.

The reply has exactly the expected shape, or is no answer: one JSON object (list-wise), or words that end with one score
(point-wise).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import model_validator

from dno_jax.annotation.judges.pair_rubric import PairRubric, TokenRubric
from dno_jax.annotation.judges.replies import few, object_schema, read_object, read_whole
from dno_jax.annotation.judges.rubric_file import JudgeRubric, RubricFile, RubricT, read_rubric
from dno_jax.annotation.question import Reply, Unparsable
from dno_jax.errors import DnoError
from dno_jax.records import Message

_SCORE = re.compile(r"\bScore:[ \t*]*([^\s*]*)")  # judges write it bold, too


class _Scale(RubricFile):
    """Integer scores.

    Attributes:
        min_score, max_score: the inclusive range.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"min_score", "max_score"})

    min_score: int
    max_score: int

    @model_validator(mode="after")
    def _is_a_range(self) -> _Scale:
        if self.min_score >= self.max_score:
            raise ValueError(f"min_score {self.min_score} is not below max_score {self.max_score}")
        return self

    def _in_range(self, score: int) -> int:
        if not self.min_score <= score <= self.max_score:
            raise Unparsable(f"score {score} is outside {self.min_score}..{self.max_score}")
        return score


class Rubric(_Scale, JudgeRubric):
    """A list-wise rubric: all candidates of a prompt are graded in one reply."""

    form = "list-wise"
    builtin = "listwise_6point"
    optional = _Scale.optional | {"count"}

    def parse(self, reply: str, *, count: int) -> tuple[int, ...]:
        """Read the scores of `count` candidates, in the order of presentation.

        Accepts one JSON object {"1": {"justification": str, "score": int}, ...} with exactly these keys, whitespace
        around it, and one ```json fence around the whole. Nothing is searched for inside other text: what a candidate
        wrote and the judge quoted can never be taken for a verdict.

        Raises:
            Unparsable: anything else.
        """
        answer = read_object(reply)
        expected = self._names(count)
        if set(answer) != set(expected):
            raise Unparsable(f"expected the candidates {few(expected)}, got {few(sorted(answer))}")
        return tuple(self._score(number, answer[number]) for number in expected)

    def read(self, reply: Reply, *, shown: Sequence[str]) -> tuple[float, ...]:
        return read_whole(reply, lambda text: self.parse(text, count=len(shown)), shown=shown)

    def schema(self, count: int) -> Mapping[str, Any]:
        score = {"type": "integer", "enum": list(range(self.min_score, self.max_score + 1))}
        # The justification comes first: a score that is written before its reasons does not follow from them.
        entry = object_schema({"justification": {"type": "string"}, "score": score})
        return object_schema(dict.fromkeys(self._names(count), entry))

    def _names(self, count: int) -> list[str]:
        return [str(number) for number in range(1, count + 1)]

    def _fields(self, count: int) -> dict[str, Any]:
        return {"count": count, "min_score": self.min_score, "max_score": self.max_score}

    def _reply_shape(self, count: int) -> str:
        entry = f'{{"justification": "...", "score": <integer from {self.min_score} to {self.max_score}>}}'
        return "{" + ", ".join(f'"{number}": {entry}' for number in self._names(count)) + "}"

    def _score(self, number: str, entry: Any) -> int:
        if not isinstance(entry, dict) or set(entry) != {"justification", "score"}:
            raise Unparsable(f"candidate {number}: expected an object of justification and score")
        score = entry["score"]
        if not isinstance(entry["justification"], str):
            raise Unparsable(f"candidate {number}: the justification is no string")
        if type(score) is not int:  # bool is a subclass of int
            raise Unparsable(f"candidate {number}: the score is of type {type(score).__name__}, not an integer")
        try:
            return self._in_range(score)
        except Unparsable as error:
            raise Unparsable(f"candidate {number}: {error}") from None


class PointRubric(_Scale):
    """A point-wise rubric: one response a request, one score a reply."""

    form = "point-wise"
    builtin = "additive_5point"
    shown = "response"

    def messages(self, conversation: Sequence[Message], response: str) -> list[dict[str, str]]:
        """Render the request: a system message, unless the rubric's is empty, and a user message."""
        scale = {"min_score": self.min_score, "max_score": self.max_score}
        return self._render(conversation, {"RESPONSE": response}, reply_shape="Score: <points>", **scale)

    def parse(self, reply: str) -> int:
        """Read the score that a reply ends with.

        A judge may repeat its score, and may quote the response: every "Score:" in the reply must give the same one,
        and the last must be the end of it, full stop and asterisks aside.

        Raises:
            Unparsable: anything else; a score out of range is none, never the nearest one within.
        """
        found = list(_SCORE.finditer(reply))
        if not found:
            raise Unparsable("no 'Score: <points>'")
        given = [match[1].removesuffix(".") for match in found]
        for text in given:
            if not re.fullmatch("-?[0-9]{1,9}", text):
                raise Unparsable(f"'Score: {few([text])}' is no whole number")
        scores = sorted({int(text) for text in given})
        if len(scores) > 1:
            raise Unparsable(f"scores that differ: {few([str(score) for score in scores])}")
        if reply[found[-1].end() :].strip(" \t\r\n*"):
            raise Unparsable("the reply goes on after its score")
        return self._in_range(scores[0])

    def _example(self) -> tuple[list[dict[str, str]], int]:
        return self.messages([Message(role="user", content="q")], "response"), 2


_KINDS: tuple[type[RubricFile], ...] = (Rubric, PointRubric, PairRubric, TokenRubric)


def load_rubric(name: str, *, place: str = "annotation.openai.rubric") -> Rubric:
    """Read a builtin list-wise rubric by name, or a file by path (a name that ends in .yaml or .yml).

    Args:
        place: the field of the configuration that names it.

    Raises:
        DnoError: there is none, it is of another form, or it cannot be used; naming the file, the field and what was
            expected.
    """
    return _load(Rubric, name, place=place)


def load_point_rubric(name: str, *, place: str = "annotation.self_judge.rubric") -> PointRubric:
    """Read a point-wise rubric, as `load_rubric` does."""
    return _load(PointRubric, name, place=place)


def load_pair_rubric(name: str, *, place: str = "annotation.openai.rubric") -> PairRubric:
    """Read a pairwise rubric, as `load_rubric` does."""
    return _load(PairRubric, name, place=place)


def load_token_rubric(name: str, *, place: str = "annotation.openai.rubric") -> TokenRubric:
    """Read a rubric of one-token verdicts, as `load_rubric` does."""
    return _load(TokenRubric, name, place=place)


def _load(kind: type[RubricT], name: str, *, place: str) -> RubricT:
    try:
        return read_rubric(kind, name, place=place)
    except DnoError as error:
        found = next((other for other in _KINDS if other is not kind and _is(other, name)), None)
        if found is None:
            raise
        raise DnoError(
            f"{error}. It is a {found.form} rubric; needed here is a {kind.form} one (builtin: {kind.builtin})"
        ) from None


def _is(kind: type[RubricFile], name: str) -> bool:
    try:
        read_rubric(kind, name, place="")
    except DnoError:
        return False
    return True
