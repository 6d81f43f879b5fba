"""Arena-Hard's arithmetic: two games per question, five verdicts, and a Bradley-Terry win rate over the baseline.

Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dno_jax.addresses import Purpose, rng
from dno_jax.statistics import Tally

STRONG = 3  # battles that "much better" counts for
_ROUNDS = 100  # of the official bootstrap


@dataclass(frozen=True)
class ArenaScore:
    """Win rates in percent.

    Attributes:
        low, high: the official interval, of battles drawn anew.
        standard_error: by question, as both games of one are no independent witnesses.
        battles: games counted by their weight.
    """

    win_rate: float
    low: float
    high: float
    standard_error: float | None
    n_total: int
    battles: int


def score(games: Sequence[Sequence[float]]) -> ArenaScore:
    """Return a model's win rate over the baseline.

    A verdict of "much better" is three battles, any other one, a tie half a win. With one opponent the maximum
    likelihood of Bradley-Terry is the share of battles won.

    Args:
        games: per question what each game says of the model: 1 much better, .75 better, .5 a tie, .25 and 0.

    Raises:
        ValueError: no game, or another verdict.
    """
    tally, won = Tally(), []
    for own in games:
        battles = [battle for verdict in own for battle in _battles(verdict)]
        tally.add(sum(battles), len(battles))
        won += battles
    if not won:
        raise ValueError("no game has a verdict")
    rates = _drawn_anew(np.asarray(won, np.float64))
    low, high = np.quantile(rates, (0.025, 0.975))
    error = 100.0 * float(np.sqrt(tally.variance)) if tally.clusters > 1 else None
    return ArenaScore(100.0 * tally.mean, 100.0 * float(low), 100.0 * float(high), error, tally.clusters, len(won))


def _battles(verdict: float) -> list[float]:
    if verdict not in (0.0, 0.25, 0.5, 0.75, 1.0):
        raise ValueError(f"a game's verdict is 0, .25, .5, .75 or 1, got {verdict}")
    result = 0.5 if verdict == 0.5 else float(verdict > 0.5)
    return [result] * (STRONG if verdict in (0.0, 1.0) else 1)


def _drawn_anew(won: Float[np.ndarray, " B"]) -> Float[np.ndarray, " R"]:
    places = rng(Purpose.BATTLES, 0, "battles").integers(0, len(won), (_ROUNDS, len(won)))
    return won[places].mean(axis=1)
