"""Who was compared with whom on which prompt, and what it came to. Pure numpy.

Everything that is said of several pairs of players at once (simultaneous intervals, cycles, who is best) rests on the
joint covariance of their win rates, prompts being the clusters: all players answer the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dno_jax.statistics import effective_number, most_extreme, wilson

_TIE = 1e-9  # a mean of verdicts misses 1/2 by a rounding


class Row(NamedTuple):
    """One comparison of two players on a prompt.

    Attributes:
        preference: P(player preferred to opponent), in [0, 1].
        longer: characters of the player's response more than of the opponent's.
    """

    prompt_id: str
    player: str
    opponent: str
    preference: float
    longer: int = 0

    def turned(self) -> Row:
        """Return the same comparison as the opponent's."""
        return Row(self.prompt_id, self.opponent, self.player, 1.0 - self.preference, -self.longer)


@dataclass(frozen=True)
class PairRates:
    """Win rates of some pairs, the first player's over the second's, with their joint uncertainty.

    Attributes:
        pairs: [M, 2] indices of players.
        covariance: of the rates, cluster-robust over prompts.
        apart: variances of the rates if all comparisons were independent, one prompt's too.
        comparisons, prompts: what each rate is the mean of.
    """

    pairs: Int[np.ndarray, "M 2"]
    rate: Float[np.ndarray, " M"]
    covariance: Float[np.ndarray, "M M"]
    apart: Float[np.ndarray, " M"]
    comparisons: Int[np.ndarray, " M"]
    prompts: Int[np.ndarray, " M"]

    @property
    def effective(self) -> Float[np.ndarray, " M"]:
        return effective_number(self.rate, np.diagonal(self.covariance), self.prompts)

    @property
    def freedom(self) -> int:
        return max(int(self.prompts.min()) - 1, 1)

    @property
    def design_effect(self) -> float:
        """How many times wider the variances are than those of independent comparisons, over all pairs."""
        total = float(self.apart.sum())
        return float(np.trace(self.covariance)) / total if total > 0.0 else 1.0

    @property
    def t(self) -> Float[np.ndarray, " M"]:
        """How many standard errors each rate lies from 1/2, the error being that of a rate of 1/2."""
        return (self.rate - 0.5) / np.sqrt(0.25 / self.effective)

    def quantile(self) -> float:
        """Standard errors to either side that hold all pairs at once 95 times in 100."""
        extreme = most_extreme(self.covariance, freedom=self.freedom)
        return float(np.quantile(extreme, 0.95))


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a set of players, summed per prompt.

    Attributes:
        players: by name.
        prompts: ids.
        wins: sums over a prompt's comparisons of P(row preferred to column).
        count: their numbers.
        ties: how many of them stand at 1/2.
        squares: sums of the preferences' squares.
    """

    players: tuple[str, ...]
    prompts: tuple[str, ...]
    wins: Float[np.ndarray, "N P P"]
    count: Float[np.ndarray, "N P P"]
    ties: Float[np.ndarray, "N P P"]
    squares: Float[np.ndarray, "N P P"]

    @classmethod
    def of(cls, rows: Iterable[Row], players: Sequence[str] | None = None) -> Comparisons:
        """Sum rows up; each counts for both of its players, in whichever order it names them.

        Args:
            players: in which order they stand; None: as they are first met.

        Raises:
            ValueError: a preference outside [0, 1], or a player against itself.
        """
        rows = list(rows)
        for row in rows:
            if not 0.0 <= row.preference <= 1.0 or row.player == row.opponent:
                raise ValueError(f"expected a preference in [0, 1] of two players, got {row}")
        names = list(players or dict.fromkeys(name for row in rows for name in (row.player, row.opponent)))
        prompts = list(dict.fromkeys(row.prompt_id for row in rows))
        player, prompt = ({name: i for i, name in enumerate(found)} for found in (names, prompts))
        x = np.asarray([prompt[row.prompt_id] for row in rows], np.int64)
        i = np.asarray([player[row.player] for row in rows], np.int64)
        j = np.asarray([player[row.opponent] for row in rows], np.int64)
        value = np.asarray([row.preference for row in rows], np.float64)
        shape = (len(prompts), len(names), len(names))
        wins, count, ties, squares = (np.zeros(shape) for _ in range(4))
        for first, second, preferred in ((i, j, value), (j, i, 1.0 - value)):
            np.add.at(wins, (x, first, second), preferred)
            np.add.at(count, (x, first, second), 1.0)
            np.add.at(ties, (x, first, second), np.abs(value - 0.5) <= _TIE)
            np.add.at(squares, (x, first, second), preferred**2)
        return cls(tuple(names), tuple(prompts), wins, count, ties, squares)

    def decided(self) -> Comparisons:
        """Return the comparisons that are no ties."""
        wins, squares = self.wins - 0.5 * self.ties, self.squares - 0.25 * self.ties
        return replace(self, wins=wins, count=self.count - self.ties, ties=np.zeros_like(self.ties), squares=squares)

    def part(self, *, players: int | None = None, prompts: slice = slice(None)) -> Comparisons:
        """Return the comparisons of the first players on some prompts."""
        arrays = (a[prompts, :players, :players] for a in (self.wins, self.count, self.ties, self.squares))
        return Comparisons(self.players[:players], self.prompts[prompts], *arrays)

    def rates(self) -> Float[np.ndarray, "P P"]:
        """Return P(row beats column), a tie being half a win; 1/2 on the diagonal, nan where two never met."""
        wins, count = self.wins.sum(axis=0), self.count.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            rates = np.where(count > 0, wins / count, np.nan)
        np.fill_diagonal(rates, 0.5)
        return rates

    def pairs(self, names: Sequence[tuple[str, str]] | None = None) -> PairRates:
        """Return the rates of pairs that have met, with their joint covariance.

        Args:
            names: (player, opponent); None: every two players, the earlier one first.
        """
        place = {name: index for index, name in enumerate(self.players)}
        if names is None:
            wanted = list(zip(*np.triu_indices(len(self.players), 1), strict=True))
        else:
            wanted = [(place[first], place[second]) for first, second in names]
        total = self.count.sum(axis=0)
        met = np.asarray([(i, j) for i, j in wanted if total[i, j] > 0], np.int64).reshape(-1, 2)
        wins, count = self.wins[:, met[:, 0], met[:, 1]], self.count[:, met[:, 0], met[:, 1]]
        number = count.sum(axis=0)
        rate = wins.sum(axis=0) / number
        off = (wins - rate * count) / number
        squares = self.squares[:, met[:, 0], met[:, 1]].sum(axis=0)
        apart = np.maximum(squares / number - rate**2, 0.0) / np.maximum(number - 1.0, 1.0)
        prompts = (count > 0).sum(axis=0)
        scale = np.sqrt(prompts / np.maximum(prompts - 1, 1))
        covariance = (off.T @ off) * np.outer(scale, scale)
        return PairRates(met, rate, covariance, apart, number.astype(np.int64), prompts)

    def groups(self) -> list[list[str]]:
        """Return the players by who is joined to whom by comparisons, of the largest group first."""
        met = self.count.sum(axis=0) > 0
        left, found = set(range(len(self.players))), []
        while left:
            group, edge = set(), {min(left)}
            while edge:
                group |= edge
                edge = {int(j) for i in edge for j in np.flatnonzero(met[i])} - group
            left -= group
            found.append([self.players[i] for i in sorted(group)])
        return sorted(found, key=len, reverse=True)


@dataclass(frozen=True)
class Difference:
    """One of several pairs that are told apart at once.

    Attributes:
        low, high: of an interval that holds together with those of all other pairs 95 times in 100.
        p: how often a family without any difference shows one as large, by chance.
        prompts: on which they met.
    """

    player: str
    opponent: str
    rate: float
    low: float
    high: float
    p: float
    prompts: int

    @property
    def is_told(self) -> bool:
        """Whether the two are called different."""
        return self.low > 0.5 or self.high < 0.5


def told_apart(comparisons: Comparisons, names: Sequence[tuple[str, str]] | None = None) -> list[Difference]:
    """Tell which of several pairs differ, with the errors of the whole family held to 5 % (max-t).

    The largest of M correlated t statistics is drawn from the covariance of the M rates: pairs share their prompts, so
    this is less strict than Bonferroni's and Holm's first step, and holds at once.

    Args:
        names: the family, (player, opponent); None: every two players. Pairs that never met are left out.
    """
    found = comparisons.pairs(names)
    if not len(found.pairs):
        return []
    extreme = most_extreme(found.covariance, freedom=found.freedom)
    low, high = wilson(found.rate, found.effective, quantile=float(np.quantile(extreme, 0.95)))
    beyond = 1.0 - np.searchsorted(extreme, np.abs(found.t)) / len(extreme)
    return [
        Difference(
            comparisons.players[i], comparisons.players[j], *map(float, numbers), prompts=int(found.prompts[number])
        )
        for number, ((i, j), *numbers) in enumerate(
            zip(found.pairs.tolist(), found.rate, low, high, beyond, strict=True)
        )
    ]
