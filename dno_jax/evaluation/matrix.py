"""Everything that the comparisons of a set of players say: who beats whom, who is best, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from dno_jax.evaluation.comparisons import Comparisons, Difference, PairRates, Row, told_apart
from dno_jax.evaluation.cycles import Cycles, count_cycles
from dno_jax.evaluation.length_control import length_controlled
from dno_jax.evaluation.win_rates import best_policy
from dno_jax.games import duality_gap, nash
from dno_jax.statistics import Estimate, correlated, wilson

_DRAWS = 4000
_DIGITS = 4


@dataclass(frozen=True)
class Mixture:
    """The Nash mixture of the game in which a player picks a policy, and the other one another.

    Attributes:
        shares: of each policy.
        gap: of mixtures made from one half of the prompts, measured on the other half: 0 is a mixture that nothing
            beats. By itself, on the prompts that it was made from, a mixture has none.
        gaps: of each policy alone, twice what its strongest rival wins of it over 1/2.
    """

    shares: dict[str, float]
    gap: float | None
    gaps: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """The policy of the highest mean win rate over the others (Algorithm 2, line 9).

    Attributes:
        alike: policies whose mean cannot be told from its own, all looked at at once.
        flattery: by how much choosing the best of several on these prompts raises its mean win rate, about.
    """

    best: str
    alike: tuple[str, ...]
    flattery: float


@dataclass(frozen=True)
class Matrix:
    """The win-rate matrix and what it says.

    Attributes:
        rates: [P][P] P(row beats column), None where two never met.
        intervals: (player, opponent) -> the rate with its own 95 % interval, over all pairs that met, both ways.
        controlled: the same at equal length, one way.
        ties: (player, opponent) -> the share of comparisons at 1/2, one way.
        neighbours: each policy and the one before it, told apart at once.
        pairs: every two players, told apart at once.
        cycles: None where no three players have all met.
        mixture, choice: of the policies; None where two of them never met.
        groups: players by who is joined to whom; more than one where some cannot be compared at all.
        comparisons: what all of it is made of.
    """

    players: tuple[str, ...]
    policies: tuple[str, ...]
    rates: list[list[float | None]]
    intervals: dict[tuple[str, str], Estimate]
    controlled: dict[tuple[str, str], Estimate]
    ties: dict[tuple[str, str], float]
    neighbours: list[Difference]
    pairs: list[Difference]
    cycles: Cycles | None
    mixture: Mixture | None
    choice: Choice | None
    groups: list[list[str]]
    comparisons: Comparisons

    @property
    def stop(self) -> str:
        """Say where the newest policy does not beat the one before it; empty where it does, or there is none."""
        last = next((found for found in self.neighbours if found.player == self.policies[-1]), None)
        if last is None:
            return ""
        told = f"{100 * last.rate:.0f} % [{100 * last.low:.0f}, {100 * last.high:.0f}]"
        if last.high < 0.5:
            return f"policy {last.player} loses to policy {last.opponent} ({told}): stop, or go back to {last.opponent}"
        if last.low <= 0.5:
            return (
                f"policy {last.player} does not beat policy {last.opponent}: the interval {told} over {last.prompts} "
                "prompts includes 50 %"
            )
        return ""

    def as_dict(self) -> dict[str, Any]:
        """As a manifest keeps it: names and rounded numbers; pairs are lists of {player, opponent, ...}."""
        plain = {
            "players": list(self.players),
            "policies": list(self.policies),
            "rates": self.rates,
            "pairs": [
                {"player": i, "opponent": j, **found.as_dict(), "ties": self.ties.get((i, j), self.ties.get((j, i)))}
                for (i, j), found in self.intervals.items()
            ],
            "length_controlled": [
                {"player": i, "opponent": j, **found.as_dict()} for (i, j), found in self.controlled.items()
            ],
            "neighbours": [asdict(found) | {"different": found.is_told} for found in self.neighbours],
            "different": [asdict(found) for found in self.pairs if found.is_told],
            "cycles": asdict(self.cycles) if self.cycles else None,
            "nash": asdict(self.mixture) if self.mixture else None,
            "choice": asdict(self.choice) if self.choice else None,
            "groups": self.groups,
            "stop": self.stop,
        }
        return _rounded(plain)


def win_rate_matrix(rows: Sequence[Row], *, policies: Sequence[str], others: Sequence[str] = ()) -> Matrix:
    """Return all that comparisons say of policies, in their order, and of whoever else was compared with them.

    Args:
        rows: one per comparison; each counts both ways.
        policies: oldest first.
        others: gold and responses from elsewhere.

    Raises:
        ValueError: a preference outside [0, 1], a player that is not named or is named twice, or no policy.
    """
    players = (*policies, *others)
    if not policies or len(set(players)) < len(players):
        raise ValueError(f"expected players of different names, one policy at least, got {list(players)}")
    if strange := {name for row in rows for name in (row.player, row.opponent)} - set(players):
        raise ValueError(f"{sorted(strange)} are none of the players {list(players)}")
    comparisons = Comparisons.of(rows, players)
    pairs = comparisons.pairs()
    places: dict[tuple[str, str], list[Row]] = {}
    for row in rows:  # all of two players one way round: as they first met
        met, turned = (row.player, row.opponent), (row.opponent, row.player)
        one_way = turned not in places
        places.setdefault(met if one_way else turned, []).append(row if one_way else row.turned())
    neighbours = [(newer, older) for older, newer in pairwise(policies)]
    rates = comparisons.rates()
    among = comparisons.part(players=len(policies))
    return Matrix(
        players=players,
        policies=tuple(policies),
        rates=[[None if np.isnan(rate) else float(rate) for rate in row] for row in rates],
        intervals=_intervals(comparisons, pairs),
        controlled={name: found for name, own in places.items() if (found := length_controlled(own))},
        ties=_ties(comparisons, pairs),
        neighbours=told_apart(comparisons, neighbours),
        pairs=told_apart(comparisons),
        cycles=count_cycles(comparisons),
        mixture=_mixture(among),
        choice=_choice(among),
        groups=comparisons.groups(),
        comparisons=comparisons,
    )


def _intervals(comparisons: Comparisons, pairs: PairRates) -> dict[tuple[str, str], Estimate]:
    low, high = wilson(pairs.rate, pairs.effective)
    found: dict[tuple[str, str], Estimate] = {}
    numbers = (pairs.rate, low, high, pairs.comparisons, pairs.prompts)
    for (i, j), rate, least, most, count, prompts in zip(pairs.pairs.tolist(), *numbers, strict=True):
        first, second = comparisons.players[i], comparisons.players[j]
        told = int(count), int(prompts)
        found[first, second] = Estimate(float(rate), float(least), float(most), *told)
        found[second, first] = Estimate(1.0 - float(rate), 1.0 - float(most), 1.0 - float(least), *told)
    return found


def _ties(comparisons: Comparisons, pairs: PairRates) -> dict[tuple[str, str], float]:
    ties, names = comparisons.ties.sum(axis=0), comparisons.players
    return {
        (names[i], names[j]): float(ties[i, j] / count)
        for (i, j), count in zip(pairs.pairs.tolist(), pairs.comparisons, strict=True)
    }


def _mixture(among: Comparisons) -> Mixture | None:
    rates = among.rates()
    if len(rates) < 2 or np.isnan(rates).any():
        return None
    halves = [among.part(prompts=slice(part, None, 2)).rates() for part in range(2)]
    gap = None
    if not any(np.isnan(half).any() for half in halves):
        gap = float(np.mean([duality_gap(halves[1 - part], nash(halves[part])) for part in range(2)]))
    alone = {name: duality_gap(rates, row) for name, row in zip(among.players, np.eye(len(rates)), strict=True)}
    return Mixture(dict(zip(among.players, nash(rates).tolist(), strict=True)), gap, alone)


def _choice(among: Comparisons) -> Choice | None:
    rates, count = among.rates(), len(among.players)
    if count == 1:
        return Choice(among.players[0], (), 0.0)
    if np.isnan(rates).any():
        return None
    best, (means, covariance) = best_policy(rates), mean_win_rates(among)
    errors = correlated(covariance, seed=0, draws=_DRAWS)
    seen = means + errors
    chosen = seen.argmax(axis=1)
    flattery = float(errors[np.arange(_DRAWS), chosen].mean())
    apart = errors - errors[:, [best]]
    scale = apart.std(axis=0)
    relative = np.abs(apart[:, scale > 0]) / scale[scale > 0]
    quantile = float(np.quantile(relative.max(axis=1), 0.95)) if relative.size else 0.0
    alike = [i for i in range(count) if i != best and means[best] - means[i] <= quantile * scale[i]]
    return Choice(among.players[best], tuple(among.players[i] for i in alike), max(flattery, 0.0))


def mean_win_rates(comparisons: Comparisons) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "P P"]]:
    """Return each player's mean win rate over the others, where all have met, and the means' covariance."""
    pairs, count = comparisons.pairs(), len(comparisons.players)
    of_pairs = np.zeros((count, len(pairs.pairs)))
    for number, (i, j) in enumerate(pairs.pairs.tolist()):
        of_pairs[i, number], of_pairs[j, number] = 1.0 / (count - 1), -1.0 / (count - 1)
    rates = comparisons.rates()
    means = (rates.sum(axis=1) - np.diagonal(rates)) / (count - 1)
    return means, of_pairs @ pairs.covariance @ of_pairs.T


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
