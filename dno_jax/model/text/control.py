"""Which tokens could pass for the structure of a chat, and which are only words, whatever a tokenizer calls them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

from dno_jax.errors import DnoError
from dno_jax.reasoning import THOUGHT_TAGS
from dno_jax.records import Message

# A word that no template writes, in whose place a message, or a begin token, is looked for.
STAND_IN = "0d1e2f3a4b"
_BLANKS = "\u2581 \t\r\n"  # the first is SentencePiece's
# Letters with something before or after them that is no word: <|user|>, [INST], USER:
_MARK = re.compile(r"(?=.*[^\W\d_])(?:[^\w\s].*|.*[^\w\s])", re.DOTALL)


_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # what a tokenizer falls back on: a piece of any text


def is_blank(token: str) -> bool:
    return not token.strip(_BLANKS)


def is_said(token: str) -> bool:
    """Whether a model may say a token, though a tokenizer may call it special: blanks, bytes, tags of a thought."""
    return is_blank(token) or token.strip(_BLANKS).lower() in THOUGHT_TAGS or _BYTE.fullmatch(token) is not None


def is_mark(token: str) -> bool:
    """Whether an added token that a template writes could end or open a turn: it is no word, number or blank."""
    return not is_said(token) and _MARK.fullmatch(token.strip(_BLANKS)) is not None


def between_messages(prompt_text: Callable[[list[Message]], str]) -> list[str]:
    """Return what a template writes between messages, and before a system message; a preamble of its own is words.

    Args:
        prompt_text: renders a chat, and raises DnoError where the template refuses it.
    """
    question, answer = Message(role="user", content=STAND_IN), Message(role="assistant", content=STAND_IN)
    pieces: list[str] = []
    try:
        pieces += prompt_text([question, answer, question]).split(STAND_IN)[1:]
    except DnoError:  # chats of one question only
        with contextlib.suppress(DnoError):
            pieces += prompt_text([question]).split(STAND_IN)
    with contextlib.suppress(DnoError):
        pieces += prompt_text([Message(role="system", content=STAND_IN), question]).split(STAND_IN)
    return pieces
