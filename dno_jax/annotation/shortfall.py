"""The error of a stage for which too many answers are missing."""

from __future__ import annotations

from collections import Counter

from dno_jax.annotation.question import Unparsable
from dno_jax.errors import DnoError


def refuse_shortfall(
    where: str, reasons: Counter[str], *, total: int, missing: str, remedy: str, max_failed: float
) -> None:
    """Stop where more is missing than may be.

    Args:
        where: the stage's folder, or the section of the configuration that is at fault.
        reasons: "state: detail" of each that is missing, counted.
        total: that were asked for.
        missing: completes "3 of 10 ...", as in "pools have no verdict".
        remedy: a sentence: what another call does, and what to set to continue without them.
        max_failed: share of all that may be missing, in [0, 1].

    Raises:
        DnoError: with the three most common reasons; of unreadable replies, one is shown for each.
    """
    count = reasons.total()
    if count > max_failed * total:
        kinds: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for reason, number in reasons.items():
            kind = reason.partition(Unparsable.BEGINS)[0]
            kinds[kind] += number
            examples.setdefault(kind, reason)
        shown = "; ".join(f"{number} x {examples[kind]}" for kind, number in kinds.most_common(3))
        raise DnoError(f"{where}: {count} of {total} {missing} ({shown}). {remedy}")
