"""Planted preferences: points for the candidates of a pool, and the slips of a judge that means to give those."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from dno_jax.annotation.oracles import majority_matrix
from dno_jax.config import OracleSection
from dno_jax.fake_judge.behaviour import Behaviour, normal, uniform
from dno_jax.fake_judge.reading import Asked

Scorer = Callable[[str, Sequence[str]], Sequence[float]]
"""(prompt text, candidates as shown) -> points of each, on the rubric's scale (1 to 6 unless it says otherwise)."""

_MARKER = re.compile(r"\bq=(-?\d+(?:\.\d+)?)")
_ORACLE = OracleSection()


def true_points(asked: Asked, *, behaviour: Behaviour, scorer: Scorer | None = None) -> list[float]:
    """What the candidates are worth, whatever order they are shown in."""
    if scorer is not None:
        return [float(points) for points in scorer(asked.prompt, asked.candidates)]
    if behaviour.prefers == "oracle":
        wins = majority_matrix(
            asked.prompt, asked.candidates, criteria=_ORACLE.criteria, target_words=_ORACLE.target_words
        )
        return _spread([round(sum(row), 6) for row in wins], asked)
    if behaviour.prefers == "longest":
        return _spread([float(len(text)) for text in asked.candidates], asked)
    return [asked.low + (asked.high - asked.low) * marked_quality(text) for text in asked.candidates]


def marked_quality(text: str) -> float:
    """The number that the last q=0.37 in a text says, held in [0, 1]; 0 without one."""
    found = _MARKER.findall(text)
    return min(1.0, max(0.0, float(found[-1]))) if found else 0.0


def given_points(points: Sequence[float], asked: Asked, *, behaviour: Behaviour, name: str) -> list[int]:
    """The grades of a list: with noise and the first one's bonus, rounded, held in the range."""
    slipped = _slip(points, behaviour, name)
    slipped[0] += behaviour.first_bonus
    return [min(asked.high, max(asked.low, math.floor(one + 0.5))) for one in slipped]


def first_wins(points: Sequence[float], *, behaviour: Behaviour, name: str) -> float:
    """The verdict on a pair as it is shown: 1 the first, 0 the second, 1/2 a tie."""
    if uniform(behaviour.seed, "tie", name) < behaviour.ties:
        return 0.5
    if uniform(behaviour.seed, "bias", name) < abs(behaviour.first_bias):
        return float(behaviour.first_bias > 0)
    first, second = _slip(points, behaviour, name)
    if abs(first - second) <= behaviour.tie_margin:
        return 0.5
    return float(first > second)


def first_probability(points: Sequence[float], *, behaviour: Behaviour, name: str) -> float:
    """The probability of the token that names the first of a pair."""
    if uniform(behaviour.seed, "tie", name) < behaviour.ties:
        return 0.5
    first, second = _slip(points, behaviour, name)
    lead = 0.0 if abs(first - second) <= behaviour.tie_margin else behaviour.sharpness * (first - second)
    read = 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, lead))))
    return max(0.0, behaviour.first_bias) + (1.0 - abs(behaviour.first_bias)) * read


def _slip(points: Sequence[float], behaviour: Behaviour, name: str) -> list[float]:
    if not behaviour.noise:
        return list(points)
    return [one + behaviour.noise * normal(behaviour.seed, "noise", name, number) for number, one in enumerate(points)]


def _spread(ranked: Sequence[float], asked: Asked) -> list[float]:
    """Spread ranks over the range: the best gets the highest grade, the worst the lowest, equals the same."""
    levels = {value: index for index, value in enumerate(sorted(set(ranked)))}
    step = (asked.high - asked.low) / max(1, len(levels) - 1)
    return [asked.low + step * levels[value] for value in ranked]
