"""Where a response's thought ends and its answer begins. Text only: what lies in a response was written by a model."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

# What reasoning models write around a thought, as their templates and servers spell it.
_NAMES = ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")
_TAGS = (
    *((f"<{name}>", f"</{name}>") for name in _NAMES),
    ("[think]", "[/think]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|start_thinking|>", "<|end_thinking|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("<unused94>", "<unused95>"),
)
_CLOSING = dict(_TAGS)


@functools.cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Match any of the tags, in any case; one in backticks is spoken of, not used."""
    return re.compile("(?<!`)(?:" + "|".join(map(re.escape, texts)) + ")(?!`)", re.IGNORECASE)


_OPEN, _CLOSE = _any_of(tuple(_CLOSING)), _any_of(tuple(_CLOSING.values()))
_OPEN_AT_END = re.compile(rf"(?:{_OPEN.pattern})\s*\Z", re.IGNORECASE)
_EMPTY_AT_END = re.compile(rf"(?:{_OPEN.pattern})\s*(?:{_CLOSE.pattern})\s*\Z", re.IGNORECASE)
_BLANKS = re.compile(r"\s*")
THOUGHT_TAGS = frozenset(tag for pair in _TAGS for tag in pair)
"""The tags in lower case."""


class SplitThought(NamedTuple):
    """A response in its two parts.

    Attributes:
        thought: what was thought, without its tags; empty where nothing was.
        answer: what follows the thought, without blanks at its start; the text as it is where there is no thought.
        whole: false where the text ends inside its thought: there is no answer then.
    """

    thought: str
    answer: str
    whole: bool

    @property
    def is_answer(self) -> bool:
        """Whether something was said besides the thought."""
        return self.whole and bool(self.answer.strip())


def split_thought(text: str, opened: bool = False) -> SplitThought:
    """Part a response from the thought that it begins with.

    A thought stands at the start: after an opening tag, or without one where the prompt has opened it, or where a
    closing tag comes before any opening one (a server whose template opened the thought). Tags further on are words.

    Args:
        opened: whether the prompt ends inside a thought, so that the text begins in it.
    """
    thoughts: list[str] = []
    at = 0  # the text before it is thoughts; another may follow at once
    while True:
        head = _OPEN.match(text, _skip_blanks(text, at))
        start = head.end() if head else at
        if head or opened:
            closing = _CLOSE if opened or head is None else _any_of((_CLOSING[head[0].lower()],))
            close = closing.search(text, start)
            if close is None:
                return SplitThought("\n\n".join([*thoughts, text[start:].strip()]), "", False)
        else:
            first, close = _OPEN.search(text, at), None if thoughts else _CLOSE.search(text)
            if close is None or (first is not None and first.start() < close.start()):
                return SplitThought("\n\n".join(thoughts), text[at:], True)
        thoughts.append(text[start : close.start()].strip())
        at, opened = _skip_blanks(text, close.end()), False


def opens_thought(prompt: str) -> bool:
    """Return whether a prompt ends with a tag that opens a thought, so that the response begins inside one."""
    return _OPEN_AT_END.search(prompt[-200:]) is not None


def after_opening(response: str, *, prompt: str) -> str:
    """Return what of a response is left to say after a prompt that has opened its thought.

    Where the response opens it again, with a tag of its own, that is in the prompt already, with the blanks after it.
    """
    head, opened = _OPEN.match(response, _skip_blanks(response, 0)), _OPEN_AT_END.search(prompt)
    if head is None or opened is None:
        return response
    return response[head.end() :].removeprefix(re.sub(_OPEN, "", opened[0]))


def without_opening(prompt: str) -> str:
    """Return a prompt without the tag at its end that opens a thought; as it is where there is none."""
    return _OPEN_AT_END.sub("", prompt)


def without_thought_at_end(prompt: str) -> str:
    """Return a prompt without the empty thought that it ends with; as it is where there is none."""
    return _EMPTY_AT_END.sub("", prompt)


def _skip_blanks(text: str, at: int) -> int:
    return _BLANKS.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
