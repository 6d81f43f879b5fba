"""What a judge is told, and how its reply is read: one record, whatever the form (`forms` has them)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from dno_jax.annotation.judges.fences import count_fences, fence, fence_code, fence_rule, fenced_conversation
from dno_jax.annotation.question import Reply
from dno_jax.errors import DnoError
from dno_jax.records import Message

_JINJA = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@dataclass(frozen=True)
class Rubric:
    """What is asked about some texts, and how the reply is read.

    Whatever a model wrote is hostile here. It reaches the request only as a value of a template, never as a template,
    between fences.

    Attributes:
        name, version: as its file says.
        digest: sha256 of the file's bytes, so that an edited rubric with an old version is still another rubric.
        system, user: Jinja texts of the two messages; an empty system message is not sent.
        titles: n -> titles of the fences around n texts, by their places.
        reply_shape: n -> the words by which the reply's shape is asked for.
        read: (reply, texts as shown) -> one number per text, as `question.Reader` gives them; raises Unparsable where
            the reply is no answer.
        schema: n -> JSON schema of the reply; None where a reply is no JSON.
        optional: n -> values of the fields that a template may use besides.
        shown: the field of the templates that holds the texts.
    """

    name: str
    version: str
    digest: str
    system: str
    user: str
    titles: Callable[[int], Sequence[str]]
    reply_shape: Callable[[int], str]
    read: Callable[[Reply, Sequence[str]], tuple[float, ...]]
    schema: Callable[[int], Mapping[str, Any] | None]
    optional: Callable[[int], Mapping[str, Any]]
    shown: str = "candidates"

    @property
    def identity(self) -> str:
        return f"{self.name}@{self.version}#{self.digest[:12]}"

    def messages(self, conversation: Sequence[Message], texts: Sequence[str]) -> list[dict[str, str]]:
        """Render the request.

        Args:
            conversation: the prompt's messages.
            texts: what is judged, in the order of presentation: two where the form compares, one where it grades one.

        Returns:
            The messages of a chat.completions request: a system message, unless the rubric's is empty, and a user
            message.
        """
        code = fence_code([*(message.content for message in conversation), *texts], salt=self.digest)
        titled = zip(self.titles(len(texts)), texts, strict=True)
        fields = {
            "fence_rule": fence_rule(code),
            "conversation": fenced_conversation(conversation, code=code),
            self.shown: "\n\n".join(fence(title, text, code=code) for title, text in titled),
            "reply_shape": self.reply_shape(len(texts)),
            **self.optional(len(texts)),
        }
        system, user = (_template(text).render(fields) for text in (self.system, self.user))
        return [{"role": "system", "content": system}] * bool(system.strip()) + [{"role": "user", "content": user}]


def check_templates(rubric: Rubric, *, texts: Sequence[str], place: str) -> None:
    """Refuse a template that would forget what is judged or the fences' rule, or that fails when it is rendered.

    Args:
        texts: as many as a request may show.
        place: names the rubric in errors.
    """
    needed, optional = {"fence_rule", "conversation", rubric.shown, "reply_shape"}, set(rubric.optional(len(texts)))
    try:
        used = jinja2.meta.find_undeclared_variables(_JINJA.parse(rubric.system + "\n" + rubric.user))
    except jinja2.TemplateError as error:
        raise DnoError(f"{place}: not a Jinja template: {error}") from None
    if missing := needed - used:
        raise DnoError(f"{place}: the template never shows {', '.join(sorted(missing))}; each is needed once")
    if unknown := used - needed - optional:
        known = ", ".join(sorted(needed | optional))
        raise DnoError(f"{place}: the template uses {', '.join(sorted(unknown))}; known here: {known}")
    try:
        messages = rubric.messages([Message(role="user", content="q")], texts)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise DnoError(f"{place}: the template does not render: {error}") from None
    num_fences = 1 + len(texts)
    if count_fences("\n".join(message["content"] for message in messages)) != (num_fences, num_fences):
        raise DnoError(
            f"{place}: conversation and {rubric.shown} must each be shown exactly once, on lines of their own, so that "
            "the lines that enclose them stay lines"
        )


@functools.lru_cache(maxsize=16)
def _template(text: str) -> jinja2.Template:
    return _JINJA.from_string(text)
