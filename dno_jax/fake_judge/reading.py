"""What a request asks: read as a careful judge reads it, by the lines that bear the request's code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["listwise", "pairwise", "token", "chat", "probe"]

_CODE = re.compile(r"<<<TITLE ([0-9a-f]{16})>>>")
_FENCE = re.compile(r"^<<<(END )?(?:(MESSAGE|CANDIDATE) )?([^\n>]+) ([0-9a-f]{16})>>>(?:\n|\Z)", re.MULTILINE)
_RANGE = re.compile(r"<integer from (-?\d+) to (-?\d+)>")
_ONE_WORD = re.compile(r"\A\s*Reply with the one word:? (\w+)\W*\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """A request, read.

    Attributes:
        form: what is wanted. chat: an answer; probe: one word.
        prompt: the text that the candidates answer; of a chat its last message, of a probe the word.
        candidates: as shown, the first shown first.
        names: what they are called.
        low, high: the range of the points that the reply's shape names; 1 to 6 where it names none.
        five_way: of a pair, whether the verdict also says how clearly.
    """

    form: Form
    prompt: str
    candidates: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    low: int = 1
    high: int = 6
    five_way: bool = False


def read_body(body: Mapping[str, Any]) -> Asked:
    """Tell what a chat.completions request asks for."""
    messages = body["messages"]
    found = _read_fences("\n".join(message_text(message) for message in messages))
    if found is None or not found[1]:
        last = message_text(messages[-1])
        word = _ONE_WORD.match(last)
        return Asked("probe", word[1]) if word else Asked("chat", last)
    prompt, candidates, instructions = found
    form: Form = "pairwise" if '"verdict"' in instructions else "token" if body.get("logprobs") else "listwise"
    low, high = map(int, named[-1]) if (named := _RANGE.findall(instructions)) else (1, 6)
    five_way = '"first much better"' in instructions
    return Asked(form, prompt, tuple(candidates.values()), tuple(candidates), low, high, five_way)


def _read_fences(text: str) -> tuple[str, dict[str, str], str] | None:
    """The prompt, the candidates by name, and all that stands outside the fences; None if no code is given."""
    announced = _CODE.search(text)  # stands in the first message, before any text of others
    if announced is None:
        return None
    conversation: list[tuple[str, str]] = []
    candidates: dict[str, str] = {}
    outside: list[str] = []
    end = 0
    for line in _FENCE.finditer(text):
        closes, kind, title, code = line.groups()
        if code != announced[1] or title == "TITLE":
            continue
        content = text[end : line.start()]
        if not closes:
            outside.append(content)
        elif kind == "CANDIDATE":
            candidates[title] = content[:-1]  # without the newline before the fence
        elif kind == "MESSAGE":
            conversation.append((title, content[:-1]))
        end = line.end()
    outside.append(text[end:])
    asked = [content for title, content in conversation if title == "(user)"]
    prompt = asked[-1] if asked else "\n".join(content for _, content in conversation)
    return prompt, candidates, "\n".join(outside)


def message_text(message: Mapping[str, Any]) -> str:
    """The words of a message, in one part or several."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content or ""
