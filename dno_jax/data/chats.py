"""What a row means once it is understood, and the pieces that every form is made of: messages, texts, points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Chat = list[dict[str, str]]  # of {"role", "content"}

_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"),
}
ROLE = {name: role for role, names in _ROLES.items() for name in names}
_MAX_MESSAGES = 4000


class Unreadable(ValueError):
    """A row that is of no form, or not as its form is."""


@dataclass
class Understood:
    """One row, whatever it looked like.

    Attributes:
        form: what it was taken for.
        strict: whether a missing question or answer is an error; in forms that others publish such rows are common.
        messages: the chat that is answered.
        gold: the teacher's response.
        answer: what `dno sft` trains on; the same but where a row has both.
        candidates: {"text", "score"} of given responses.
        own: prompt_id, source and assistant_prefix, where the row has them.
        used: columns that were understood.
        inner: names inside of messages and candidates that were not.
        untrained: places of the assistant's turns in `messages` that the data says not to train on.
        undesired: whether what the row answers is a bad example.
    """

    form: str
    strict: bool = False
    messages: Chat = field(default_factory=list)
    gold: Any = None
    answer: Any = None
    candidates: list[Any] = field(default_factory=list)
    own: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    inner: set[str] = field(default_factory=set)
    untrained: set[int] = field(default_factory=set)
    undesired: bool = False

    def answered_turns(self) -> Iterator[tuple[Chat, str]]:
        """The assistant's earlier turns, each with the chat before it."""
        asked = False
        for place, message in enumerate(self.messages):
            asked = asked or message["role"] == "user"
            if message["role"] == "assistant" and asked and message["content"] and place not in self.untrained:
                yield self.messages[:place], message["content"]


def read_chat(value: Any, name: str, found: Understood) -> Chat:
    """Read a list of messages, of whatever names their roles and contents have.

    Raises:
        Unreadable: it is none.
    """
    if not isinstance(value, list) or not value:
        raise Unreadable(f"{name}: expected a list of messages, got {_kind(value)}")
    if len(value) > _MAX_MESSAGES:
        raise Unreadable(f"{name}: {len(value):,} messages; expected a chat of at most {_MAX_MESSAGES:,}")
    made: Chat = []
    for place, message in enumerate(value):
        where = f"{name}[{place}]"
        if not isinstance(message, dict):
            raise Unreadable(f"{where}: expected a message with role and content, got {_kind(message)}")
        spoken = message.get("role", message.get("from"))
        role = ROLE.get(spoken) if isinstance(spoken, str) else None
        if role is None:
            raise Unreadable(
                f"{where}: role {str(spoken)[:40]!r}; expected system, user or assistant (chats with tools are not "
                "read)"
            )
        content = message.get("content", message.get("value"))
        if message.get("tool_calls") or message.get("function_call"):
            raise Unreadable(f"{where}: calls a tool; chats with tools are not read")
        if content is None and role == "system":
            continue  # there is none
        if message.get("weight") == 0 and role == "assistant":  # as OpenAI's fine-tuning has it
            found.untrained.add(len(made))
        known = ("role", "from", "content", "value", "weight", "tool_calls", "function_call")
        found.inner.update(f"{name}.{key}" for key in message if key not in known)
        made.append({"role": role, "content": read_text(content, f"{where}.content")})
    return made


def read_text(value: Any, name: str) -> str:
    """A text, or the parts of one; pictures and sounds are none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [part if isinstance(part, str) else _part(part) for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(part for part in parts if part)
        kinds = {str(part.get("type"))[:40] for part in value if isinstance(part, dict) and _part(part) is None}
        raise Unreadable(f"{name}: a part of type {', '.join(sorted(kinds)) or 'unknown'}; expected text alone")
    raise Unreadable(f"{name}: expected a text, got {_kind(value)}")


def _part(part: Any) -> str | None:
    if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
        return part["text"] if isinstance(part.get("text"), str) else None
    return None


def read_number(value: Any, name: str) -> float | None:
    """Points; None where the data says that there are none."""
    if isinstance(value, str) and value.strip().casefold() in ("", "n/a", "na", "none"):
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Unreadable(f"{name}: expected a number, got {_kind(value)}")
    return number


def _kind(value: Any) -> str:
    if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
        return f"{type(value).__name__} of {len(value)}"
    return "null" if value is None else repr(value if not isinstance(value, str) else value[:40])
