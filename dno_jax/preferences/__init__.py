"""From verdicts to training pairs: payoffs (transforms), win rates and labels (estimates), who meets whom (pairs)."""

from dno_jax.preferences.estimates import (
    WinRates,
    check_preference_matrix,
    count_cycles,
    count_decided_triples,
    scores_to_wins,
    soft_target,
    win_matrix,
    win_rates,
)
from dno_jax.preferences.pairs import (
    PairChoice,
    ScoredCandidate,
    all_pairs,
    best_worst_pair,
    large_margin_pairs,
    matched_pairs,
    repeated_ngram_share,
    replay_counts,
    spin_pairs,
    verdict_pairs,
)
from dno_jax.preferences.transforms import TRANSFORMS, transformed

__all__ = [
    "TRANSFORMS",
    "PairChoice",
    "ScoredCandidate",
    "WinRates",
    "all_pairs",
    "best_worst_pair",
    "check_preference_matrix",
    "count_cycles",
    "count_decided_triples",
    "large_margin_pairs",
    "matched_pairs",
    "repeated_ngram_share",
    "replay_counts",
    "scores_to_wins",
    "soft_target",
    "spin_pairs",
    "transformed",
    "verdict_pairs",
    "win_matrix",
    "win_rates",
]
