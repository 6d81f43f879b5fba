"""Where a stop string ends a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def stopped(
    stops: Sequence[str], ids: Sequence[int], *, decode: Callable[[Sequence[int]], str]
) -> tuple[int, str] | None:
    """Return how many ids of a response stay, and its text before a stop string; None where it holds none.

    Both are of the shortest prefix that holds one, or they would depend on how many ids came at once: with more of
    them another string, which ends later, may begin earlier.
    """
    if not _held(stops, ids, decode=decode):
        return None
    texts = (decode(ids[:count]) for count in range(1, len(ids) + 1))
    return next((n, text[:end]) for n, text in enumerate(texts, 1) if (end := _first(stops, text)) is not None)


def _held(stops: Sequence[str], ids: Sequence[int], *, decode: Callable[[Sequence[int]], str]) -> bool:
    """Whether a prefix of a response holds a stop string: the whole itself, but for bytes that are no text.

    A tokenizer that falls back on bytes makes U+FFFD of all that stand together as soon as one of them is no text, also
    of a newline that was there before it. A text without U+FFFD begins with all that its prefixes hold.
    """
    for count in range(len(ids), 0, -1):
        text = decode(ids[:count])
        if _first(stops, text) is not None:
            return True
        if "\ufffd" not in text:
            return False
    return False


def _first(needles: Sequence[str], text: str) -> int | None:
    """Where the first of some strings begins in a text."""
    found = [place for needle in needles if (place := text.find(needle)) >= 0]
    return min(found, default=None)
