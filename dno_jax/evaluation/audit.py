"""What is wrong with a judged comparison of policies: one warning per defect, in a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from dno_jax.annotation.quality.warnings import warnings
from dno_jax.config import EvaluationSection, QualitySection
from dno_jax.evaluation.comparisons import Comparisons
from dno_jax.evaluation.matrix import Matrix, mean_win_rates

_LEVEL = 0.01  # of what is looked for: a sound run is warned of nothing 99 times in 100
_QUANTILE = 1.6448536269514722  # on both sides of 1/2, one against the other: by chance far rarer than one side alone


def audit(matrix: Matrix, figures: Mapping[str, Any], quality: QualitySection, section: EvaluationSection) -> list[str]:
    """Return what a matrix of win rates and its judge's figures warn of.

    Args:
        figures: of the judge's own answers, as `Quality.figures` returns them. Cycles are looked for among players:
            of responses of equal policies a quarter of the triples are cyclic by chance.
    """
    own = {name: figure for name, figure in figures.items() if name != "cyclic_share"}
    found = warnings(own, quality)
    if "tie_rate" not in figures or figures["tie_rate"]["low"] <= (
        1.0 if quality.max_tie_rate is None else quality.max_tie_rate
    ):
        found += _tie_convention(matrix.comparisons.part(players=len(matrix.policies)))
    return found + _cycles(matrix) + _prompts(matrix, section) + _clusters(matrix, section) + _groups(matrix)


def _cycles(matrix: Matrix) -> list[str]:
    cycles = matrix.cycles
    if cycles is None or cycles.p > _LEVEL:
        return []
    return [
        f"cycles among players (a > b > c > a): {cycles.observed} of {cycles.triples} triples, where a ranking with as "
        f"much noise would show {cycles.expected:.1f}, and none as clear (p = {cycles.p:.2g}): no ranking fits; choose "
        "by the mean over all policies or the Nash mixture, not by who beat whom last."
    ]


def _prompts(matrix: Matrix, section: EvaluationSection) -> list[str]:
    prompts = len(matrix.comparisons.prompts)
    if section.min_prompts is None or prompts >= section.min_prompts:
        return []
    half = 98.0 / np.sqrt(prompts)
    return [
        f"{prompts} held-out prompts, expected at least {section.min_prompts} (evaluation.min_prompts): a win "
        f"rate is known to about +-{half:.0f} points; hold out more (1,000 give +-3)."
    ]


def _clusters(matrix: Matrix, section: EvaluationSection) -> list[str]:
    pairs = matrix.comparisons.pairs()
    if section.max_design_effect is None or not len(pairs.pairs) or pairs.design_effect <= section.max_design_effect:
        return []
    count, prompts = int(pairs.comparisons.max()), int(pairs.prompts.max())
    return [
        f"verdicts on one prompt agree: {count:,} comparisons on {prompts:,} prompts are worth "
        f"{count / pairs.design_effect:,.0f} independent ones (factor {pairs.design_effect:.1f}, expected at most "
        f"{section.max_design_effect:g}: evaluation.max_design_effect). Intervals allow for it; to narrow them, "
        "hold out more prompts, not more samples."
    ]


def _groups(matrix: Matrix) -> list[str]:
    if len(matrix.groups) < 2:
        return []
    told = "; ".join(", ".join(group[:8]) for group in matrix.groups)
    return [
        f"players that no comparison joins: {told}: nothing says which group is better; have them answer the same "
        "prompts and judge these together."
    ]


def _tie_convention(policies: Comparisons) -> list[str]:
    """Whether the order of two policies' mean win rates turns round, beyond noise, where ties are left out."""
    decided = policies.decided()
    if len(policies.players) < 2 or np.isnan(decided.rates()).any():
        return []
    (half, half_error), (none, none_error) = mean_win_rates(policies), mean_win_rates(decided)
    for i, j in combinations(range(len(policies.players)), 2):
        sides = [
            (means[i] - means[j]) / max(error, 1e-9)
            for means, errors in ((half, half_error), (none, none_error))
            for error in [np.sqrt(max(errors[i, i] + errors[j, j] - 2 * errors[i, j], 0.0))]
        ]
        if abs(sides[0]) > _QUANTILE and abs(sides[1]) > _QUANTILE and sides[0] * sides[1] < 0.0:
            first, second = (i, j) if sides[0] > 0 else (j, i)
            ties = policies.ties.sum(axis=0)[[first, second]].sum(axis=1) / policies.count.sum(axis=0)[
                [first, second]
            ].sum(axis=1)
            return [
                f"the ranking depends on how ties count: policy {policies.players[first]} ({100 * ties[0]:.0f} % ties) "
                f"is above policy {policies.players[second]} ({100 * ties[1]:.0f} %) where a tie is half a win, below "
                "it where ties are left out; ask for finer verdicts (points, or logprob) before choosing between them."
            ]
    return []
