"""What a judge's figures warn of: only what its data bears out, in a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dno_jax.config import QualitySection


@dataclass(frozen=True)
class Check:
    """A figure of `Quality.figures`, and where it begins to be worrying.

    Attributes:
        figure: its name there.
        field: of QualitySection, with the threshold.
        kind: max and min bound the figure; error bounds its distance from 1/2.
        name: the figure, for people.
        unit: what it is counted over.
        meaning: what it says of the judge, and what to do.
        causes: figures that move this one; where one of them is warned of, that one is the defect.
    """

    figure: str
    field: str
    kind: Literal["max", "min", "error"]
    name: str
    unit: str
    meaning: str
    causes: tuple[str, ...] = ()


CHECKS = (
    Check(
        "flip_rate",
        "max_flip_rate",
        "max",
        "order-flip rate",
        "pairs asked in two orders",
        "swapping the responses reverses the verdict (0.5 is chance): ask in more orders (both_orders, num_orders), "
        "or take a stronger judge",
        causes=("first_wins", "repeat_agreement"),
    ),
    Check(
        "tie_rate",
        "max_tie_rate",
        "max",
        "tie rate",
        "pairs",
        "verdicts are paid for and make no pairs: take a finer rubric, more orders, or a judge that tells these "
        "responses apart",
        causes=("first_wins", "flip_rate", "repeat_agreement"),
    ),
    Check(
        "first_wins",
        "max_first_rate_error",
        "error",
        "P(first shown wins)",
        "decided comparisons",
        "the place in the prompt sways the judge: ask in both orders (both_orders, num_orders), which cancels it on "
        "average, or take a less biased judge",
    ),
    Check(
        "longer_wins",
        "max_longer_wins",
        "max",
        "P(longer wins)",
        "decided pairs of unequal length",
        "the policy may learn length instead of quality: look at some verdicts, and say in the rubric that length is "
        "no merit",
    ),
    Check(
        "repeat_agreement",
        "min_repeat_agreement",
        "min",
        "agreement with a repeated sample",
        "pairs asked twice",
        "the judge contradicts itself: lower its temperature, ask in more orders, or take a stronger judge",
    ),
    Check(
        "calibration_agreement",
        "min_calibration_agreement",
        "min",
        "agreement with labelled pairs",
        "labels",
        "the judge does not prefer what your labels prefer (0.5 is chance): change the rubric or the judge before "
        "training on its verdicts",
    ),
    Check(
        "cyclic_share",
        "max_cyclic_share",
        "max",
        "share of cyclic triples",
        "triples of decided pairs",
        "so many a > b > c > a come of a judge near chance (0.25), or of responses that no ranking fits: look at its "
        "agreement with a repeated sample, and take a stronger judge if that is low too",
        causes=("repeat_agreement",),
    ),
    Check(
        "loudest_judge",
        "max_loudest_judge",
        "max",
        "P(one judge of the ensemble overrules the others)",
        "pairs on which it contradicts them",
        "its probabilities are more extreme, so the mean is its own verdict: give it another form or temperature, or "
        "leave it out",
    ),
)


def warnings(figures: Mapping[str, Any], section: QualitySection) -> list[str]:
    """Return one sentence for each figure whose whole 95 % interval lies beyond its threshold, and is its own cause.

    Args:
        figures: as `Quality.figures` returns them, or as a manifest keeps them.
    """
    beyond = {
        check.figure: limit
        for check in CHECKS
        if check.figure in figures
        and (limit := getattr(section, check.field)) is not None
        and _is_beyond(check, figures[check.figure], limit)
    }
    return [
        _sentence(check, figures[check.figure], beyond[check.figure], explained=_explained(check, beyond))
        for check in CHECKS
        if check.figure in beyond and not beyond.keys() & set(check.causes)
    ]


def _explained(check: Check, beyond: Mapping[str, float]) -> list[str]:
    """Names of other figures beyond their limits that this one moves."""
    return [other.name for other in CHECKS if other.figure in beyond and check.figure in other.causes]


def _is_beyond(check: Check, figure: Mapping[str, Any], limit: float) -> bool:
    match check.kind:
        case "max":
            return figure["low"] > limit
        case "min":
            return figure["high"] < limit
        case "error":
            return figure["low"] > 0.5 + limit or figure["high"] < 0.5 - limit


def _sentence(check: Check, figure: Mapping[str, Any], limit: float, *, explained: Sequence[str]) -> str:
    bound = {"max": "at most", "min": "at least", "error": "within 0.5 +-"}[check.kind]
    return (
        f"{check.name} is {figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}] over {figure['n']:,} "
        f"{check.unit}, expected {bound} {limit:g} (annotation.quality.{check.field}): {check.meaning}."
        + (f" It moves {' and '.join(explained)} too." if explained else "")
    )
