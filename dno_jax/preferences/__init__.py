"""From verdicts to training pairs: win rates r_t and their labels (estimates), and who meets whom (pairs)."""

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

__all__ = [
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
    "verdict_pairs",
    "win_matrix",
    "win_rates",
]
