"""The four forms of rubrics: what each asks for; and the loading of a rubric from its YAML file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dno_jax.annotation.judges import replies
from dno_jax.annotation.judges.rubric import Rubric, check_templates
from dno_jax.errors import DnoError
from dno_jax.records import explain

_BUILTIN = resources.files("dno_jax.annotation") / "rubrics"
_WORD = r"^[\w.-]+$"
_TOKEN = r"^[^\s<>]{1,16}$"


class RubricFile(BaseModel):
    """What a rubric's file holds; see `Rubric`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=_WORD)
    version: str = Field(pattern=_WORD)
    system: str
    user: str


class PointsFile(RubricFile):
    """Integer points, `min_score` to `max_score`, both included."""

    min_score: int
    max_score: int

    @model_validator(mode="after")
    def _check_range(self) -> PointsFile:
        if self.min_score >= self.max_score:
            raise ValueError(f"min_score {self.min_score} is not below max_score {self.max_score}")
        return self

    @property
    def scale(self) -> range:
        return range(self.min_score, self.max_score + 1)


class TokensFile(RubricFile):
    """What two candidates are called, by their places; one token each to the judge."""

    first_token: str = Field(pattern=_TOKEN)
    second_token: str = Field(pattern=_TOKEN)

    @model_validator(mode="after")
    def _check_tokens(self) -> TokensFile:
        if self.first_token == self.second_token:
            raise ValueError(f"first_token and second_token are both {self.first_token!r}")
        return self


@dataclass(frozen=True)
class Form:
    """One way to ask.

    Attributes:
        name: for people.
        builtin: name of the form's own rubric.
        file: the fields of a rubric's file.
        make: (file, digest of its bytes) -> the rubric.
        texts: an example of what a request shows.
    """

    name: str
    builtin: str
    file: type[RubricFile]
    make: Callable[[Any, str], Rubric]
    texts: tuple[str, ...] = ("one", "another")


def load_rubric(form: Form, name: str | None = None, *, place: str = "annotation.openai.rubric") -> Rubric:
    """Read a builtin rubric by name, or a file by path (a name that ends in .yaml or .yml).

    Args:
        name: None stands for the form's own.
        place: the field of the configuration that names it.

    Raises:
        DnoError: there is none, it is of another form, or it cannot be used; naming the file, the field and what was
            expected.
    """
    name = name or form.builtin
    try:
        return _read(form, name, place=place)
    except DnoError as error:
        found = next((other for other in _FORMS if other is not form and _is(other, name)), None)
        if found is None:
            raise
        raise DnoError(
            f"{error}. It is a {found.name} rubric; needed here is a {form.name} one (builtin: {form.builtin})"
        ) from None


def _read(form: Form, name: str, *, place: str) -> Rubric:
    is_path = name.endswith((".yaml", ".yml"))
    place = f"{place} {name!r}"
    try:
        data = Path(name).expanduser().read_bytes() if is_path else (_BUILTIN / f"{name}.yaml").read_bytes()
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(item.name.removesuffix(".yaml") for item in _BUILTIN.iterdir()))
        reason = getattr(error, "strerror", None) or error
        raise DnoError(
            f"{place}: cannot be read ({reason}); give the path of a .yaml file or a builtin name ({known})"
        ) from None
    try:
        file = form.file.model_validate(yaml.safe_load(data))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DnoError(f"{place}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise DnoError(f"{place}: {explain(error)}; compare with {_BUILTIN / form.builtin}.yaml") from None
    rubric = form.make(file, hashlib.sha256(data).hexdigest())
    check_templates(rubric, texts=form.texts, place=place)
    return rubric


def _is(form: Form, name: str) -> bool:
    try:
        _read(form, name, place="")
    except DnoError:
        return False
    return True


def _told(file: RubricFile, digest: str) -> dict[str, str]:
    return {"name": file.name, "version": file.version, "digest": digest, "system": file.system, "user": file.user}


def _listwise(file: PointsFile, digest: str) -> Rubric:
    scale = file.scale
    entry = f'{{"justification": "...", "score": <integer from {file.min_score} to {file.max_score}>}}'
    return Rubric(
        **_told(file, digest),
        titles=lambda count: [f"CANDIDATE {number}" for number in replies.numbers(count)],
        reply_shape=lambda count: "{" + ", ".join(f'"{number}": {entry}' for number in replies.numbers(count)) + "}",
        read=replies.whole(lambda text, count: replies.read_points(text, count=count, scale=scale)),
        schema=lambda count: replies.points_schema(count, scale=scale),
        optional=lambda count: {"count": count, "min_score": file.min_score, "max_score": file.max_score},
    )


def _pointwise(file: PointsFile, digest: str) -> Rubric:
    return Rubric(
        **_told(file, digest),
        titles=lambda count: ["RESPONSE"],
        reply_shape=lambda count: "Score: <points>",
        read=lambda reply, shown: (replies.read_whole_score(reply, scale=file.scale),),
        schema=lambda count: None,
        optional=lambda count: {"min_score": file.min_score, "max_score": file.max_score},
        shown="response",
    )


def _pairwise(file: RubricFile, digest: str) -> Rubric:
    return Rubric(
        **_told(file, digest),
        titles=lambda count: ["CANDIDATE 1", "CANDIDATE 2"],
        reply_shape=lambda count: '{"justification": "...", "verdict": <"first", "second" or "tie">}',
        read=replies.whole(lambda text, count: replies.read_verdict(text)),
        schema=lambda count: replies.VERDICT_SCHEMA,
        optional=lambda count: {},
    )


def _five_way(file: RubricFile, digest: str) -> Rubric:
    words = ", ".join(f'"{word}"' for word in replies.FIVE)
    return dataclasses.replace(
        _pairwise(file, digest),
        reply_shape=lambda count: f'{{"justification": "...", "verdict": <one of {words}>}}',
        read=replies.whole(lambda text, count: replies.read_verdict(text, replies.FIVE)),
        schema=lambda count: replies.FIVE_SCHEMA,
    )


def _one_token(file: TokensFile, digest: str) -> Rubric:
    tokens = (file.first_token, file.second_token)
    return Rubric(
        **_told(file, digest),
        titles=lambda count: [f"CANDIDATE {token}" for token in tokens],
        reply_shape=lambda count: " or ".join(tokens),
        read=lambda reply, shown: replies.read_tokens(reply.first_logprobs, tokens=tokens),
        schema=lambda count: None,
        optional=lambda count: {"first_token": tokens[0], "second_token": tokens[1]},
    )


# All candidates of a prompt are graded in one reply.
LISTWISE = Form("list-wise", "listwise_6point", PointsFile, _listwise)
# One response per request, one score per reply.
POINTWISE = Form("point-wise", "additive_5point", PointsFile, _pointwise, texts=("response",))
# The reply says which of two candidates is better, or that they are equally good.
PAIRWISE = Form("pairwise", "pairwise_verdict", RubricFile, _pairwise)
# The same, and how clearly: Arena-Hard's five verdicts.
FIVE_WAY = Form("five-way pairwise", "pairwise_five", RubricFile, _five_way)
# The probabilities of a verdict of one token: AlpacaEval 2.0's weighted form.
ONE_TOKEN = Form("one-token", "pairwise_token", TokensFile, _one_token)
_FORMS = (LISTWISE, POINTWISE, PAIRWISE, ONE_TOKEN)
