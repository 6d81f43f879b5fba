"""Figures that show whether a training goes well, and a word, once each, where it does not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from dno_jax.console import say
from dno_jax.training.objectives import OWN, OWN_SQUARES

_STEPS = 20  # that figures are averaged over before they are judged
_FALL = -0.1  # nats a token that chosen responses have lost, on average
_KL = 0.1  # nats a token
_SLOW = 5.0  # times the median step
_SLOW_SECONDS = 1.0  # shorter ones are nobody's concern


class Health:
    """Looks at every step of one training.

    Args:
        where: what the words begin with, such as "train 0".
        tell: prints a line.
    """

    def __init__(self, where: str, tell: Callable[[str], None] = say):
        self._where, self._tell = where, tell
        self._sounded: set[str] = set()
        self._seen: dict[str, deque[float]] = {}
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._begun = False

    def look(self, step: int, row: dict[str, float]) -> dict[str, float]:
        """Return a step's figures with those that follow from them: kl, jitter, alarms.

        kl estimates KL(pi_t || pi), in nats a response: half the mean of (log pi/pi_t)^2 over the batch's responses
        that pi_t sampled (to second order, and never negative). They are those that pairing chose, before the step.
        """
        row = dict(row)
        own, squares = row.pop(OWN, 0.0), row.pop(OWN_SQUARES, 0.0)
        if own:
            row["kl"] = squares / own / 2
        responses = row.pop("responses", 0.0)
        length = row["response_tokens"] / responses if responses else 1.0
        fall = self._mean("chosen_shift", row.get("chosen_shift"))
        if fall is not None and fall < _FALL:
            self._sound(
                "chosen falls",
                step,
                f"chosen responses have lost {-fall:.2g} nats a token since the iteration began (mean of {_STEPS} "
                "steps): a smaller optimizer.learning_rate, a larger loss.beta or loss.nll_weight hold them",
            )
        kl = self._mean("kl", row["kl"] / max(length, 1.0) if "kl" in row else None)
        if kl is not None and kl > _KL:
            self._sound(
                "far from the reference",
                step,
                f"the estimated KL divergence from the policy it began as is {kl:.2g} nats a token (mean of {_STEPS} "
                "steps): a smaller optimizer.learning_rate or a larger loss.beta keeps it nearer",
            )
        if row.get("tied") == 1.0:
            self._sound("tied", step, "every pair of the batch ties: it says nothing of what is preferred")
        elif row["grad_norm"] == 0.0:
            self._sound("no gradient", step, "the gradient is zero: the batch teaches nothing")
        self._look_at_time(step, row)
        return row | {"alarms": float(len(self._sounded))}

    def _look_at_time(self, step: int, row: dict[str, float]) -> None:
        seconds = row.get("step_seconds")
        if seconds is None or not self._begun:  # the first is compiled
            self._begun = True
            return
        if len(self._seconds) == _STEPS:
            median, slow = np.quantile(self._seconds, (0.5, 0.9))
            row["jitter"] = float(slow / max(median, 1e-9) - 1)
            if seconds > max(_SLOW * median, _SLOW_SECONDS):
                self._sound(
                    "slow step",
                    step,
                    f"it took {seconds:.3g} s, {seconds / median:.0f} times the median: a program was compiled, a "
                    "state was written, or something else uses the machine",
                )
        self._seconds.append(seconds)

    def _mean(self, name: str, value: float | None) -> float | None:
        """The mean of the last steps; None while they are too few."""
        if value is None or not np.isfinite(value):
            return None
        seen = self._seen.setdefault(name, deque(maxlen=_STEPS))
        seen.append(value)
        return float(np.mean(seen)) if len(seen) == _STEPS else None

    def _sound(self, kind: str, step: int, text: str) -> None:
        if kind not in self._sounded:
            self._sounded.add(kind)
            self._tell(f"warning: {self._where}, step {step}: {text}")
