"""Win rates with 95 % intervals that know that the responses to one prompt are no independent votes. Pure numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from dno_jax.evaluation.comparisons import Row
from dno_jax.statistics import Tally


@dataclass(frozen=True)
class WinRate:
    """A mean preference in [0, 1] and its 95 % interval, over `comparisons` of `prompts` prompts."""

    rate: float
    low: float
    high: float
    comparisons: int
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def win_rate(preferences: Sequence[float], prompt_ids: Sequence[str]) -> WinRate:
    """Return the mean preference with a Wilson interval at the effective number of comparisons.

    The variance of the mean is estimated from per-prompt sums (cluster-robust); see `Tally.share`.

    Args:
        preferences: P(policy preferred) of each comparison, in [0, 1]; 1/2 is a tie.
        prompt_ids: the prompt of each.

    Raises:
        ValueError: nothing to average, lengths differ, or a value outside [0, 1].
    """
    values = np.asarray(preferences, np.float64)
    if values.ndim != 1 or values.size == 0 or values.size != len(prompt_ids):
        raise ValueError(f"{values.size} preferences for {len(prompt_ids)} prompt ids; expected as many, at least one")
    if not np.all((values >= 0.0) & (values <= 1.0)):
        raise ValueError(f"preferences lie in [0, 1], got {values.min()} to {values.max()}")
    found = Tally.of(values, prompt_ids).share()
    assert found.low is not None
    assert found.high is not None  # of a share there is always one
    return WinRate(found.value, found.low, found.high, comparisons=found.count, prompts=found.prompts)


def rate_over(rows: Sequence[Row], player: str, opponent: str) -> WinRate | None:
    """Return a player's win rate over another; None where they never met."""
    values, prompt_ids = preferences_of(rows, player, opponent)
    return win_rate(values, prompt_ids) if values else None


def preferences_of(rows: Iterable[Row], player: str, opponent: str) -> tuple[list[float], list[str]]:
    """Return P(player preferred) of every comparison with an opponent, and the prompt of each."""
    values, prompt_ids = [], []
    for row in rows:
        if {row.player, row.opponent} == {player, opponent}:
            values.append(row.preference if row.player == player else 1.0 - row.preference)
            prompt_ids.append(row.prompt_id)
    return values, prompt_ids


def best_policy(wins: Float[np.ndarray, "T T"]) -> int:
    """Return the policy with the highest mean win rate over the others (Algorithm 2, line 9); the later one of equals.

    Not the win rate over its predecessor: improvement from step to step is not transitive under a general preference.

    Args:
        wins: P(row policy beats column policy) on validation prompts; the diagonal is not looked at.
    """
    wins = np.asarray(wins, np.float64)
    count = wins.shape[0]
    if count == 1:
        return 0
    mean = (wins.sum(axis=1) - np.diagonal(wins)) / (count - 1)
    return int(count - 1 - np.argmax(mean[::-1]))
