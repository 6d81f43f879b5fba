"""How many cycles there are among players, beside how many a ranking with this much noise would show."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from dno_jax.evaluation.comparisons import Comparisons, PairRates
from dno_jax.statistics import correlated

_DRAWS = 2000
_SLIGHT = 0.5  # a comparison won and one lost, that each player has in thought: nobody is infinitely strong


@dataclass(frozen=True)
class Cycles:
    """Cyclic triples of players by their win rates, a > b > c > a.

    Attributes:
        triples: those of which every two met.
        observed: how many are cyclic.
        expected: the mean number where the players' strengths are Bradley-Terry's, fitted to the rates, and the rates
            err as prompts make them err.
        p: how often such draws show cycles as strong: the sum over triples of the weakest of their three t values.
    """

    triples: int
    observed: int
    expected: float
    p: float


def count_cycles(comparisons: Comparisons) -> Cycles | None:
    """Return the cycles among players and what Bradley-Terry would expect; None where no three have all met."""
    pairs = comparisons.pairs()
    triples = _triples(pairs)
    if not len(triples):
        return None
    error = np.sqrt(0.25 / pairs.effective)
    fitted = bradley_terry(pairs, len(comparisons.players))
    drawn = fitted + correlated(pairs.covariance, seed=0, draws=_DRAWS)
    strength, observed = _strength((pairs.rate[None] - 0.5) / error, triples)
    chance, expected = _strength((drawn - 0.5) / error, triples)
    beyond = int((chance >= strength[0] - 1e-12).sum()) if strength[0] > 0.0 else _DRAWS
    return Cycles(len(triples), int(observed[0]), float(expected.mean()), (1 + beyond) / (1 + _DRAWS))


def bradley_terry(pairs: PairRates, num_players: int) -> Float[np.ndarray, " M"]:
    """Return the rates that strengths alone would give, by maximum likelihood (Newton), half a comparison added."""
    design = np.zeros((len(pairs.pairs), num_players))
    design[np.arange(len(design)), pairs.pairs[:, 0]] = 1.0
    design[np.arange(len(design)), pairs.pairs[:, 1]] = -1.0
    weight, strength = pairs.effective, np.zeros(num_players)
    ridge = _SLIGHT * np.eye(num_players)
    for _ in range(100):
        expected = 1.0 / (1.0 + np.exp(-design @ strength))
        slope = design.T @ (weight * (pairs.rate - expected)) - ridge @ strength
        curve = design.T @ (design * (weight * expected * (1.0 - expected))[:, None]) + ridge
        step = np.linalg.solve(curve, slope)
        strength = strength + step * min(1.0, 1.0 / max(np.abs(step).max(), 1e-9))
        if np.abs(step).max() < 1e-10:
            break
    return 1.0 / (1.0 + np.exp(-design @ strength))


def _triples(pairs: PairRates) -> np.ndarray:
    """[K, 3, 2]: for each triple a < b < c the places of ab, bc, ca among the pairs, and the sign of each."""
    place = {(i, j): (number, 1) for number, (i, j) in enumerate(pairs.pairs.tolist())}
    place |= {(j, i): (number, -1) for (i, j), (number, _) in list(place.items())}
    names = sorted({name for pair in place for name in pair})
    found = [
        [place[edge] for edge in ((a, b), (b, c), (c, a))]
        for a, b, c in combinations(names, 3)
        if (a, b) in place and (b, c) in place and (c, a) in place
    ]
    return np.asarray(found, np.int64).reshape(-1, 3, 2)


def _strength(t: Float[np.ndarray, "D M"], triples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the weakest links of cyclic triples, and count these, in each of D draws."""
    edges = t[:, triples[:, :, 0]] * triples[:, :, 1]  # [D, K, 3]
    weakest = np.maximum(edges.min(axis=2), (-edges).min(axis=2))
    return np.maximum(weakest, 0.0).sum(axis=1), (weakest > 0.0).sum(axis=1)
