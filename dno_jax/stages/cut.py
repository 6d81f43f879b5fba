"""Responses that were cut at the limit of tokens: how many there are, said where it matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dno_jax.config import PairingSection
from dno_jax.console import say
from dno_jax.records import Rollout
from dno_jax.report.tables import shares_text

MUCH = 0.2  # a share above which it is a warning
_NAMES = {"policy": "samples", "mixture": "samples", "gold": "gold", "data": "data"}


class CutShares:
    """Counts of responses, by who wrote them, and of those without an end."""

    def __init__(self) -> None:
        self._all: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()

    def add(self, rollouts: Iterable[Rollout]) -> None:
        for rollout in rollouts:
            if rollout.source == "previous":  # counted in the iteration that drew it
                continue
            name = _NAMES[rollout.source]
            self._all[name] += 1
            self._cut[name] += rollout.finish == "length"

    def merge(self, other: CutShares) -> None:
        self._all.update(other._all)
        self._cut.update(other._cut)

    def figures(self) -> dict[str, dict[str, float]]:
        """For a manifest: the share that was cut, by who wrote them; empty where none was."""
        shares = {name: round(self._cut[name] / count, 4) for name, count in sorted(self._all.items())}
        return {"cut": shares} if any(self._cut.values()) else {}

    def tell(self, stage: str, *, limit: int, then: str = "") -> None:
        """Say how many were cut, as a warning where they are many.

        Args:
            stage: that says it.
            limit: `sampling.max_new_tokens`.
            then: completes the sentence: what becomes of them.
        """
        found = self.figures()
        if not found:
            return
        shares = found["cut"]
        much = "warning: " if max(shares.values()) > MUCH else ""
        remedy = "; raise it, or shorten what is sampled or given" if much else ""
        say(f"{much}{stage}: cut at sampling.max_new_tokens={limit}: {shares_text(shares)}{then}{remedy}")


def fate(rollout: Rollout, shown: str, section: PairingSection) -> str:
    """What becomes of a response in pairs: "keep", "negative" or "drop". One without its end teaches to go on.

    Args:
        shown: what a judge reads of it; one that has no answer at all loses without being cut off.
    """
    if rollout.finish != "length" or not shown:
        return "keep"
    return section.cut or ("negative" if rollout.source in ("policy", "mixture", "previous") else "drop")
