"""Which pairs of a pool are compared, and what the outcomes say about those that are not.

A schedule is a generator of rounds: it yields pairs of candidates and is sent P(first beats second) of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence

from dno_jax.config import OpenAISection

Schedule = Generator[Sequence[tuple[int, int]], Sequence[float], None]

_ROUNDING = 1e-12  # a mean of two preferences may miss 1/2 by a rounding


def all_pairs(num_candidates: int) -> Schedule:
    """Compare every two candidates, in one round: C (C - 1) / 2 pairs."""
    yield list(itertools.combinations(range(num_candidates), 2))


def tournament(seats: Sequence[int]) -> Schedule:
    """Let neighbours meet, then the winners of the round before, until one is left: C - 1 pairs.

    An odd one out passes, and sits first in the next round. Of a tie, the one seated first advances: seats drawn at
    random make that a fair coin.

    Args:
        seats: [C] candidates in the order in which they sit down.
    """
    left = list(seats)
    while len(left) > 1:
        pairs = list(zip(left[::2], left[1::2], strict=False))
        preferences = yield pairs
        winners = [
            first if preference > 0.5 - _ROUNDING else second
            for (first, second), preference in zip(pairs, preferences, strict=True)
        ]
        left = left[2 * len(pairs) :] + winners


def known_wins(played: Mapping[tuple[int, int], float], *, num_candidates: int) -> tuple[tuple[float, ...], ...]:
    """Return what is known of every pair.

    A pair that met has its outcome. One that did not, but is joined by a chain of wins (a beat b, b beat c), has the
    least probability of the chain: what moderate stochastic transitivity, P(a > c) >= min(P(a > b), P(b > c)),
    vouches for. Of all others nothing is known, and 1/2 says so: no winner is made up. Of a tournament, that leaves the
    champion above everyone on a chain, and losers in different branches without a verdict on each other; a cycle of
    preferences cannot show.

    Args:
        played: (i, j) -> P(i beats j) of pairs that met, each in one order only.

    Returns:
        [C][C] probabilities P(row beats column); diagonal 1/2, wins + wins^T = 1.
    """
    known = dict(played) | {(second, first): 1.0 - p for (first, second), p in played.items()}
    chain = {pair: p for pair, p in known.items() if p > 0.5 + _ROUNDING}
    for via, first, second in itertools.product(range(num_candidates), repeat=3):  # Floyd and Warshall's order
        least = min(chain.get((first, via), 0.5), chain.get((via, second), 0.5))
        if least > max(0.5, chain.get((first, second), 0.5)):
            chain[first, second] = least

    def win(row: int, column: int) -> float:
        if row == column:
            return 0.5
        if (row, column) in known:
            return known[row, column]
        return 0.5 + chain.get((row, column), 0.5) - chain.get((column, row), 0.5)

    candidates = range(num_candidates)
    return tuple(tuple(win(row, column) for column in candidates) for row in candidates)


def num_questions(section: OpenAISection, *, num_candidates: int) -> int:
    """Return how many requests a pool of C candidates takes.

    list-wise: min(num_orders, C!). Pairs: C (C - 1) / 2, or C - 1 of a tournament; twice that in both orders.
    """
    if section.form == "listwise":
        return min(section.num_orders, math.factorial(num_candidates))
    pairs = {"all_pairs": math.comb(num_candidates, 2), "tournament": num_candidates - 1}[section.schedule]
    return pairs * (1 + section.both_orders)
