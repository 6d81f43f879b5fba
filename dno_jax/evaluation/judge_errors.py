"""Win rates corrected for a judge's errors, by pairs that people have labelled (Rogan and Gladen; arXiv 2511.21140).

Pure numpy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from dno_jax.addresses import Purpose, rng
from dno_jax.evaluation.comparisons import Row
from dno_jax.evaluation.win_rates import preferences_of, win_rate
from dno_jax.statistics import Estimate, Tally

_DRAWS = 4000


@dataclass(frozen=True)
class JudgeErrors:
    """How often a judge sides with labels.

    Attributes:
        sensitivity: of pairs whose label prefers the first response, the mean P(first) by the judge.
        specificity: of pairs whose label prefers the second response, the mean P(second) by the judge.
    """

    sensitivity: Tally = field(default_factory=Tally)
    specificity: Tally = field(default_factory=Tally)

    @classmethod
    def of(cls, labelled: Iterable[tuple[str, float, float]]) -> JudgeErrors:
        """Return them of labelled pairs.

        Args:
            labelled: (prompt, the judge's P(first beats second), people's): pairs on one prompt are no independent
                witnesses. A label counts as the side that it leans to; undecided ones say nothing.

        Raises:
            ValueError: a share outside [0, 1].
        """
        first, second = [], []
        for prompt, judged, label in labelled:
            if not (0.0 <= judged <= 1.0 and 0.0 <= label <= 1.0):
                raise ValueError(f"expected shares in [0, 1], got the judge's {judged} and the label {label}")
            if label != 0.5:
                (first if label > 0.5 else second).append((prompt, judged if label > 0.5 else 1.0 - judged))
        return cls(*(Tally.of([one for _, one in side], [name for name, _ in side]) for side in (first, second)))

    def correct(self, rows: Iterable[Row], player: str, opponent: str) -> Estimate | None:
        """Return a player's win rate over another as people would have judged it; None where that cannot be said.

        The judge's rate p is theta sensitivity + (1 - theta) (1 - specificity) of the true rate theta. The interval
        carries all three uncertainties: quantiles of theta under Jeffreys' posteriors at the effective numbers. A rate
        beyond all that a judge with these errors gives is no certainty: it errs otherwise on these pairs, and the
        interval reaches to the rate's own.

        Args:
            player: stands where the labelled pairs have `first`; the two sides of pairs without an order are alike.
        """
        values, prompts = preferences_of(rows, player, opponent)
        if not values or self.why:
            return None
        rate = Tally.of(values, prompts)
        shares = (rate.mean, self.sensitivity.mean, self.specificity.mean)
        value = _theta(*(np.full(1, share) for share in shares))[0]
        low, high = np.quantile(_theta(_draws(rate, "rate"), *self._drawn), (0.025, 0.975))
        own = win_rate(values, prompts)
        low, high = own.low if low >= 1.0 else low, own.high if high <= 0.0 else high
        value, low, high = (float(np.clip(end, 0.0, 1.0)) for end in (value, low, high))
        return Estimate(value, low, high, rate.count, rate.clusters)

    @cached_property
    def why(self) -> str:
        """Why nothing can be corrected by these labels; empty where it can."""
        if not self.sensitivity.count or not self.specificity.count:
            return (
                f"{self.sensitivity.count} labels with a verdict prefer the first response and "
                f"{self.specificity.count} the second; some of both are needed"
            )
        first, second = self._drawn
        low, high = np.quantile(first + second - 1.0, (0.025, 0.975))
        if high < 0.0:
            return (
                f"the judge sides against {self.sensitivity.count + self.specificity.count} labels more often than "
                "with them; see whether their first and second response are the wrong way round"
            )
        if low <= 0.0:
            return (
                f"of {self.sensitivity.count + self.specificity.count} labels the judge's verdicts cannot be told from "
                "chance; label more pairs, or take another judge"
            )
        return ""

    def as_dict(self) -> dict[str, Any]:
        found = {"sensitivity": self.sensitivity, "specificity": self.specificity}
        return {name: tally.share().as_dict() for name, tally in found.items() if tally.count} | {"why": self.why}

    @cached_property
    def _drawn(self) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
        return _draws(self.sensitivity, "sensitivity"), _draws(self.specificity, "specificity")


def _theta(rate: np.ndarray, sensitivity: np.ndarray, specificity: np.ndarray) -> np.ndarray:
    """The true rate, in [0, 1] but for noise."""
    return (rate + specificity - 1.0) / np.maximum(sensitivity + specificity - 1.0, 1e-9)


def _draws(tally: Tally, name: str) -> Float[np.ndarray, " D"]:
    """Draws of a share from Jeffreys' posterior, seen in as many independent comparisons as the tally is worth."""
    seen = tally.effective
    return rng(Purpose.JUDGE_ERRORS, 0, name).beta(tally.mean * seen + 0.5, (1.0 - tally.mean) * seen + 0.5, _DRAWS)
