"""The samples as they lie in the page: texts cut until all of them fit, and compressed, so many prompts to a chunk."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dno_jax.display import printable
from dno_jax.report.samples import Asked, Place

_MOST_BYTES = 8_000_000  # of the page that texts may take
_CHUNK = 100  # prompts
_TRIED = 4  # chunks of a place by which it is told whether all would fit
# How much of a prompt is shown: (answers of one writer, characters of an answer). The first that fits is taken.
_LEVELS = ((16, 4000), (8, 2000), (4, 1500), (2, 1000), (1, 1000), (1, 500), (1, 250), (1, 100))
_WORDS_OF_A_JUDGE = 1200


@dataclass(frozen=True)
class Browser:
    """What the page holds of the samples.

    Attributes:
        chunks: base64 of gzip of JSON, each a list of at most `_CHUNK` prompts of one place.
        note: what is left out of them, in a sentence.
    """

    chunks: tuple[str, ...]
    prompts: int
    note: str


def browser(places: Sequence[Place], *, most_bytes: int = _MOST_BYTES) -> Browser:
    """Compress prompts and answers, as much of each as fits into so many bytes together."""
    for level in _LEVELS:
        if sum(_size(place, level) for place in places) > most_bytes and level != _LEVELS[-1]:
            continue
        chunks = [_chunk(place, first, level) for place in places for first in _firsts(place)]
        if level == _LEVELS[-1] or sum(len(text) for text, _ in chunks) <= most_bytes:
            cut = sum((own for _, own in chunks), Counter[str]())
            prompts = sum(place.prompts for place in places)
            return Browser(tuple(text for text, _ in chunks), prompts, _note(cut, level))
    raise AssertionError("the last level takes all")


def _firsts(place: Place) -> range:
    return range(0, place.prompts, _CHUNK)


def _size(place: Place, level: tuple[int, int]) -> float:
    """Bytes that a place would take, by some of its chunks."""
    firsts = _firsts(place)
    tried = [len(_chunk(place, first, level)[0]) for first in firsts[:: max(1, len(firsts) // _TRIED)]]
    return len(firsts) * sum(tried) / max(len(tried), 1)


def _chunk(place: Place, first: int, level: tuple[int, int]) -> tuple[str, Counter[str]]:
    """One chunk of a place, and how much was cut from it."""

    def pack() -> tuple[str, Counter[str]]:
        cut = Counter[str]()
        return _packed(place.asked[first : first + _CHUNK], level, cut=cut), cut

    return place.once((first, level), pack)


def _packed(asked: Sequence[Asked], level: tuple[int, int], *, cut: Counter[str]) -> str:
    rows = [_row(one, level, cut=cut) for one in asked]
    packed = gzip.compress(json.dumps(rows, ensure_ascii=False).encode(), compresslevel=6, mtime=0)
    return base64.b64encode(packed).decode()


def _note(cut: Counter[str], level: tuple[int, int]) -> str:
    most, characters = level
    said = []
    if cut["texts"]:
        said.append(f"texts are cut after {characters:,} characters ({cut['texts']:,} of them)")
    if cut["answers"]:
        said.append(f"answers beyond {most} a writer are left out ({cut['answers']:,})")
    return f"To keep the page small, {' and '.join(said)}; the run's rollouts/ folders have all." if said else ""


def _row(asked: Asked, level: tuple[int, int], *, cut: Counter[str]) -> dict[str, Any]:
    """A prompt as the page reads it; keys are short, since there are many."""
    most, characters = level

    def shown(text: str, limit: int = characters) -> str:
        if len(text) <= limit:
            return printable(text)
        cut["texts"] += 1
        return f"{printable(text[:limit])} … {len(text) - limit:,} more characters"

    answers = []
    of_writer: Counter[str] = Counter()
    for one in asked.answers:
        of_writer[one.writer] += 1
        if of_writer[one.writer] > most:
            cut["answers"] += 1
            continue
        row: dict[str, Any] = {"w": one.writer, "t": shown(one.text)}
        row |= {"k": one.tokens} if one.tokens is not None else {}
        row |= {"n": one.sample} if one.sample > 0 else {}
        row |= {"s": round(one.score, 3)} if one.score is not None else {}
        row |= {"f": 1} if one.finish == "length" else {}
        row |= {"c": one.chosen} if one.chosen else {}
        row |= {"r": one.rejected} if one.rejected else {}
        answers.append(row)
    found: dict[str, Any] = {"i": printable(asked.prompt_id), "p": asked.place, "a": answers}
    found["m"] = [[role, shown(text, max(characters, 400))] for role, text in asked.messages]
    found |= {"b": shown(asked.prefix)} if asked.prefix else {}
    words = [shown(text, min(characters, _WORDS_OF_A_JUDGE)) for text in asked.judge[:most] if text.strip()]
    found |= {"j": words} if words else {}
    return found | ({"u": printable(asked.unjudged[:300])} if asked.unjudged else {})
