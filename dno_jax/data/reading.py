"""Rows as prompts and as examples, and what is said of them in one line."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from dno_jax.data.chats import Chat, Understood, Unreadable
from dno_jax.data.formats import COLUMNS, understand
from dno_jax.data.sources import named
from dno_jax.errors import DnoError
from dno_jax.records import Conversation, Example, Prompt, explain

_QUOTES = "\"'“”‘’«»¿¡"  # noqa: RUF001
_MARKS = _QUOTES + ".,;:!?…。、，！？"  # noqa: RUF001

RowT = TypeVar("RowT", bound=Conversation)
Rows = Iterable[tuple[dict[str, Any], str]]


@dataclass
class Reading:
    """What was read of a file or several.

    Attributes:
        forms: rows by the form that they were taken for.
        ignored: columns that mean nothing here, in the order in which they came.
        left_out: rows, or turns, that are no prompts or examples, by reason.
        repeated: rows in the words of an earlier one that are kept, as they have names of their own.
        errors: of the rows that are wrong, where they are collected instead of raised.
    """

    paths: str | Sequence[str]
    rows: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    ignored: dict[str, None] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    errors: list[str] | None = None

    def line(self, kept: str) -> str:
        """Say it in one line, for the log.

        Args:
            kept: what was made of it, such as "100 prompts".
        """
        forms = ", ".join(name if len(self.forms) == 1 else f"{count} x {name}" for name, count in self.forms.items())
        parts = [f"{named(self.paths)}: {kept} from {self.rows:,} rows ({forms})"]
        if self.left_out:
            parts.append("left out: " + ", ".join(f"{count:,} x {why}" for why, count in self.left_out.most_common()))
        if self.repeated:
            parts.append(f"{self.repeated:,} repeat another's words")
        if self.ignored:
            names = [name if name.isprintable() else repr(name) for name in self.ignored]
            parts.append("ignored: " + ", ".join(names[:12]) + (f" and {len(names) - 12} more" * (len(names) > 12)))
        return "; ".join(parts)

    def understood(self, rows: Rows, *, what: str) -> Iterator[tuple[Understood, str]]:
        """Yield what rows mean; raise, or collect, why one means nothing."""
        for row, place in rows:
            self.rows += 1
            try:
                found = understand(row)
            except Unreadable as error:
                self.fault(f"{place}: not a valid {what}: {error}")
                continue
            self.forms[found.form] += 1
            for name, value in row.items():
                if name not in found.used and not (value is None and name in COLUMNS):
                    self.ignored[name] = None
            self.ignored |= dict.fromkeys(sorted(found.inner))
            yield found, place

    def fault(self, text: str) -> None:
        """Raise, or collect, an error.

        Raises:
            DnoError: errors are not collected.
        """
        if self.errors is None:
            raise DnoError(text)
        self.errors.append(text)

    def made(self, kind: type[RowT], row: dict[str, Any], *, place: str, what: str) -> RowT | None:
        try:
            return kind.model_validate(row)
        except ValidationError as error:
            self.fault(f"{place}: not a valid {what}: {explain(error)}")
            return None


def prompts_of(rows: Rows, reading: Reading, *, candidates: bool = True) -> Iterator[tuple[Prompt, str]]:
    """Yield prompts with their places; of rows that say the same, those with no name of their own once.

    Args:
        candidates: bring the responses that come with forms of others (this project's own are always brought).

    Raises:
        DnoError: a malformed row, or a name that comes twice.
    """
    names: set[str] = set()
    seen: set[bytes] = set()
    for found, place in reading.understood(rows, what="prompt"):
        own = found.own if found.strict else {name: found.own[name] for name in found.own if name != "prompt_id"}
        prompt = prompt_of(found, reading, place=place, candidates=candidates)
        if prompt is None:
            continue
        words, name = words_of(prompt), prompt.prompt_id
        if words in seen and "prompt_id" not in own:
            reading.left_out["repeats another's words"] += 1
            continue
        if name in names:
            reading.fault(
                f"{place}: prompt_id {name!r} comes 2 times; ids must be unique: give this row another one, or none"
            )
            continue
        names.add(name)
        reading.repeated += words in seen
        seen.add(words)
        yield prompt, place


def prompt_of(found: Understood, reading: Reading, *, place: str, candidates: bool = True) -> Prompt | None:
    """Make a prompt of a row; None where it asks nothing, which is counted.

    Raises:
        DnoError: it is not one.
    """
    if not found.strict and not (found.messages and found.messages[-1]["content"].strip()):
        reading.left_out["no question"] += 1
        return None
    row = _named(found.messages, found.own) | {"gold": found.gold}
    if found.candidates and (candidates or found.strict):
        row["candidates"] = found.candidates
    return reading.made(Prompt, row, place=place, what="prompt")


def examples_of(
    rows: Rows, reading: Reading, *, turns: Literal["last", "all"] = "last"
) -> Iterator[tuple[Example, str]]:
    """Yield supervised examples with their places.

    Args:
        turns: the assistant's last turn alone, or each of them after the chat before it.

    Raises:
        DnoError: a malformed row.
    """
    for found, place in reading.understood(rows, what="example"):
        answered: list[tuple[Chat, Any]] = []
        if found.undesired:
            reading.left_out["undesired completion"] += 1
            continue
        if turns == "all" or found.answer is None:
            answered += found.answered_turns()
        if found.answer or (found.strict and found.answer is not None):
            answered.append((found.messages, found.answer))
        if not answered and found.strict:
            reading.fault(
                f"{place}: not a valid example: no answer; expected response or completion, or messages with a turn of "
                "the assistant's"
            )
        elif not answered:
            reading.left_out["no answer"] += 1
        for messages, answer in answered if turns == "all" else answered[-1:]:
            own = {name: value for name, value in found.own.items() if name != "source"}
            if messages is not found.messages:  # the prefix is the last answer's
                own.pop("assistant_prefix", None)
            row = _named(messages, own) | {"response": answer}
            if example := reading.made(Example, row, place=place, what="example"):
                yield example, place


def _named(messages: Chat, own: dict[str, Any]) -> dict[str, Any]:
    """A conversation with the name that it has, or one made of its text."""
    parts = [messages, *([own["assistant_prefix"]] if own.get("assistant_prefix") else [])]
    identity = ", ".join(json.dumps(part, sort_keys=True) for part in parts)
    return {"prompt_id": hashlib.sha256(identity.encode()).hexdigest()[:16], **own, "messages": messages}


def words_of(prompt: Conversation) -> bytes:
    """Name the words of a chat: equal where chats differ in case, blanks and the marks around words alone.

    Marks inside of words and operators count: 3+4 is not 3-4.
    """
    digest = hashlib.blake2b(digest_size=16)
    for role, text in (*((m.role, m.content) for m in prompt.messages), ("prefix", prompt.assistant_prefix)):
        words = (word.lstrip(_QUOTES).rstrip(_MARKS) for word in unicodedata.normalize("NFC", text).casefold().split())
        digest.update("\0".join((role, *filter(None, words), "\0")).encode())
    return digest.digest()
