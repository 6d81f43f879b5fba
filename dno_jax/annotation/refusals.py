"""Responses that decline to respond, in words: no endpoint marks them, and no pair should have one as its winner."""

from __future__ import annotations

import re

# A refusal is short; a longer text that begins like one continues with an answer.
_LONGEST = 400
_CANNOT = (
    r"(?:can't|cannot|can not|won't|will not|am unable to|'m unable to|am not able to|'m not able to|must decline)"
)
_HELP = r"(?:help|assist|comply|fulfil\w*|provide|answer|discuss|engage|generate|create|write|do (?:that|this)|support)"
_REFUSAL = re.compile(
    r"(?:i'm sorry|i am sorry|sorry|i apologi[sz]e|my apologies|unfortunately|as an ai\b[^.!?]{0,40})?[\s,.;:!-]*"
    rf"(?:but\s+)?i\s?{_CANNOT}\b[^.!?]{{0,30}}?\b{_HELP}\b",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Say whether a text is a short one that begins by declining; rather too seldom than too often."""
    text = text.strip().replace("\u2019", "'")
    return len(text) <= _LONGEST and _REFUSAL.match(text) is not None
