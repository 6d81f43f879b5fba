"""The embedded preference: a majority vote of criteria, hence general, free and deterministic.

Each criterion c gives a response a number f_c(x, y), and votes for the response whose number is higher. The preference

    P(y > y' | x) = 1/2 (1 + sign( sum_c sign( f_c(x, y) - f_c(x, y') ) ))

is 1 if more criteria vote for y, 0 if more vote for y', and 1/2 on a draw. A criterion that finds both equal abstains.

No reward model need exist for it: every criterion alone is transitive, yet their majority is not (Condorcet's paradox).
Let three criteria rank three responses a b c, b c a and c a b: two of three prefer a to b, two b to c, and two c to a.
No Bradley-Terry scores express such a cycle; DNO is made for preferences that have them, so the demo is judged by one.

The judge reads surface features only. It is for demos and tests, and says nothing about the worth of a text.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

from dno_jax.errors import DnoError

Criterion = Callable[[str, str, int], float]
"""(prompt, response, target_words) -> a number, higher is better; its scale never matters, only its order does."""

CRITERIA: dict[str, Criterion] = {}
"""Every criterion by name; a name is what `annotation.oracle.criteria` lists."""

EMPTY = -math.inf
"""What every criterion gives a response without a word: below all others, equal to another empty one."""

_WORD = re.compile("[^\\W_]+(?:['\u2019][^\\W_]+)*")
_FINISHED = re.compile("[.!?\u2026][\"'\u201d\u2019)\\]]*\\s*\\Z")

# Words that carry no topic: function words, and the verbs and nouns with which one asks for a text.
_STOP_WORDS = """
    a about above after again all also am an and any are as at be been before being below between both but by can could
    did do does doing down during each few for from had has have having he her here hers him his how i if in into is it
    its just let me more most my near no nor not of off on once one only or other our out over own please s same she
    should so some such than that the their them then there these they this those through to too under until up us very
    was we were what when where which while who whom whose why will with would you your
    answer compose describe explain give list say short story tale tell text write
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def _criterion(rate: Criterion) -> Criterion:
    """Register a criterion under its function's name; it is asked only about responses that have words."""

    @functools.wraps(rate)
    def guarded(prompt: str, response: str, target_words: int) -> float:
        return rate(prompt, response, target_words) if words(response) else EMPTY

    CRITERIA[rate.__name__] = guarded
    return guarded


def words(text: str) -> list[str]:
    """Split into lower-case words: runs of letters and digits, with inner apostrophes."""
    return _WORD.findall(text.lower())


@_criterion
def relevance(prompt: str, response: str, target_words: int) -> float:
    """Share of the prompt's distinct content words (STOP_WORDS left out) that the response contains, in [0, 1].

    A word counts in the form the prompt has it. Without content words in the prompt all get 0: the criterion abstains.
    """
    topic = set(words(prompt)) - STOP_WORDS
    return len(topic & set(words(response))) / len(topic) if topic else 0.0


@_criterion
def variety(prompt: str, response: str, target_words: int) -> float:
    """Root type-token ratio (Guiraud): distinct words / sqrt(words).

    The plain ratio distinct / words is best for a response of one word; the root rewards new words, and still
    charges for repeated ones.
    """
    found = words(response)
    return len(set(found)) / math.sqrt(len(found))


@_criterion
def brevity(prompt: str, response: str, target_words: int) -> float:
    """Minus the distance to the length wanted: -|words - target_words|."""
    return -float(abs(len(words(response)) - target_words))


@_criterion
def completeness(prompt: str, response: str, target_words: int) -> float:
    """1 if the last sentence is ended (by . ! ? or an ellipsis, with or without closing quotes), else 0."""
    return float(_FINISHED.search(response) is not None)


@_criterion
def freshness(prompt: str, response: str, target_words: int) -> float:
    """1 - the share of word trigrams that repeat an earlier one, in (0, 1]; 1 below three words."""
    found = words(response)
    trigrams = list(zip(found, found[1:], found[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def majority_matrix(
    prompt: str, candidates: Sequence[str], *, criteria: Sequence[str], target_words: int
) -> tuple[tuple[float, ...], ...]:
    """Return [C][C] probabilities P(row beats column | prompt) (the formula at the top): diagonal 1/2, P + P^T = 1.

    An entry depends on its two texts only: neither on their order nor on the others in the pool.

    Args:
        criteria: names in CRITERIA.
        target_words: the length that "brevity" likes best, in words.

    Raises:
        DnoError: for an unknown criterion, listing the known ones.
    """
    rate = [_known(name) for name in criteria]
    rated = [tuple(one(prompt, text, target_words) for one in rate) for text in candidates]
    return tuple(tuple(_vote(first, second) for second in rated) for first in rated)


def _known(name: str) -> Criterion:
    if name not in CRITERIA:
        raise DnoError(f"annotation.oracle.criteria: unknown criterion {name!r}; known: {', '.join(CRITERIA)}")
    return CRITERIA[name]


def _vote(first: Sequence[float], second: Sequence[float]) -> float:
    # Comparisons, not differences: two empty responses are -inf each, and -inf - -inf is no number.
    lead = sum((a > b) - (a < b) for a, b in zip(first, second, strict=True))
    return 0.5 * (1 + (lead > 0) - (lead < 0))
