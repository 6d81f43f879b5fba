"""What all rubrics have in common: a YAML file with two Jinja texts, checked when it is read."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jinja2
import jinja2.meta
import jinja2.sandbox
import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from dno_jax.annotation.judges.fences import count_fences, fence, fence_code, fence_rule, fenced_conversation
from dno_jax.annotation.question import Reply
from dno_jax.errors import DnoError
from dno_jax.records import Message, explain

_BUILTIN = resources.files("dno_jax.annotation") / "rubrics"
_JINJA = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


class RubricFile(BaseModel, ABC):
    """A rubric of any form.

    Whatever a model wrote is hostile here. It reaches the request only as a value of a template, never as a template,
    between fences.

    Attributes:
        system, user: Jinja texts of the two messages; an empty system message is not sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    form: ClassVar[str]  # for people
    builtin: ClassVar[str]  # name of the form's own rubric
    shown: ClassVar[str] = "candidates"  # the field of the template that holds what is judged
    optional: ClassVar[frozenset[str]] = frozenset()  # fields that a template may use

    name: str = Field(pattern=r"^[\w.-]+$")
    version: str = Field(pattern=r"^[\w.-]+$")
    system: str
    user: str
    _digest: str = PrivateAttr(default="")

    @property
    def digest(self) -> str:
        """sha256 of the file's bytes, so that an edited rubric with an old version is still another rubric."""
        return self._digest

    @property
    def identity(self) -> str:
        return f"{self.name}@{self.version}#{self.digest[:12]}"

    @property
    def _needed(self) -> frozenset[str]:
        return frozenset({"fence_rule", "conversation", self.shown, "reply_shape"})

    @abstractmethod
    def _example(self) -> tuple[list[dict[str, str]], int]:
        """A request, and how many fences it must hold."""

    def _render(
        self, conversation: Sequence[Message], shown: Mapping[str, str], *, reply_shape: str, **optional: Any
    ) -> list[dict[str, str]]:
        """Render the messages of a chat.completions request; `shown` is what is judged, by the titles of its fences."""
        code = fence_code([*(message.content for message in conversation), *shown.values()], salt=self.digest)
        fields = {
            "fence_rule": fence_rule(code),
            "conversation": fenced_conversation(conversation, code=code),
            self.shown: "\n\n".join(fence(title, text, code=code) for title, text in shown.items()),
            "reply_shape": reply_shape,
            **optional,
        }
        system, user = (_template(text).render(fields) for text in (self.system, self.user))
        return [{"role": "system", "content": system}] * bool(system.strip()) + [{"role": "user", "content": user}]


class JudgeRubric(RubricFile):
    """A rubric of a form that is asked over an endpoint."""

    def messages(self, conversation: Sequence[Message], candidates: Sequence[str]) -> list[dict[str, str]]:
        """Render the request.

        Args:
            conversation: the prompt's messages.
            candidates: texts in the order of presentation; two of them where the form compares.

        Returns:
            The messages of a chat.completions request: a system message, unless the rubric's is empty, and a user
            message.
        """
        count = len(candidates)
        names = [f"CANDIDATE {name}" for name in self._names(count)]
        shown = dict(zip(names, candidates, strict=True))
        return self._render(conversation, shown, reply_shape=self._reply_shape(count), **self._fields(count))

    @abstractmethod
    def read(self, reply: Reply, *, shown: Sequence[str]) -> tuple[float, ...]:
        """Read the reply to a request that showed these candidates, as `question.Reader` does.

        Raises:
            Unparsable: it is no answer.
        """

    @abstractmethod
    def schema(self, count: int) -> Mapping[str, Any] | None:
        """Return the JSON schema of a reply on `count` candidates; None where a reply is no JSON."""

    @abstractmethod
    def _names(self, count: int) -> list[str]:
        """What the candidates are called, by their places."""

    @abstractmethod
    def _reply_shape(self, count: int) -> str: ...

    def _fields(self, count: int) -> dict[str, Any]:
        """Values of the fields that a template may use."""
        return {}

    def _example(self) -> tuple[list[dict[str, str]], int]:
        return self.messages([Message(role="user", content="q")], ["one", "another"]), 3


RubricT = TypeVar("RubricT", bound=RubricFile)


def read_rubric(kind: type[RubricT], name: str, *, place: str) -> RubricT:
    """Read a builtin rubric by name, or a file by path (a name that ends in .yaml or .yml).

    Args:
        place: the field of the configuration that names it.

    Raises:
        DnoError: there is none, or it cannot be used; naming the file, the field and what was expected.
    """
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
        rubric = kind.model_validate(yaml.safe_load(data))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DnoError(f"{place}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise DnoError(f"{place}: {explain(error)}; compare with {_BUILTIN / kind.builtin}.yaml") from None
    rubric._digest = hashlib.sha256(data).hexdigest()
    _check_templates(rubric, place=place)
    return rubric


def _check_templates(rubric: RubricFile, *, place: str) -> None:
    """Refuse a template that would forget what is judged or the fences' rule, or that fails when it is rendered."""
    try:
        used = jinja2.meta.find_undeclared_variables(_JINJA.parse(rubric.system + "\n" + rubric.user))
    except jinja2.TemplateError as error:
        raise DnoError(f"{place}: not a Jinja template: {error}") from None
    if missing := rubric._needed - used:
        raise DnoError(f"{place}: the template never shows {', '.join(sorted(missing))}; each is needed once")
    if unknown := used - rubric._needed - rubric.optional:
        known = ", ".join(sorted(rubric._needed | rubric.optional))
        raise DnoError(f"{place}: the template uses {', '.join(sorted(unknown))}; known here: {known}")
    try:
        messages, num_fences = rubric._example()
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise DnoError(f"{place}: the template does not render: {error}") from None
    if count_fences("\n".join(message["content"] for message in messages)) != (num_fences, num_fences):
        raise DnoError(
            f"{place}: conversation and {rubric.shown} must each be shown exactly once, on lines of their own, so that "
            "the lines that enclose them stay lines"
        )


@functools.lru_cache(maxsize=16)
def _template(text: str) -> jinja2.Template:
    return _JINJA.from_string(text)
