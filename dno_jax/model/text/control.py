"""Which tokens could pass for the structure of a chat, and which are only words, whatever a tokenizer calls them."""

from __future__ import annotations

import re

from dno_jax.reasoning import THOUGHT_TAGS

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
