from collections import Counter

import numpy as np
import pytest

from dno_jax.preferences import (
    ScoredCandidate,
    check_preference_matrix,
    expected_win_rates,
    large_margin_pairs,
    repeated_ngram_share,
    replay_counts,
    scores_to_wins,
    win_matrix,
)

PAPER = {"positive_floor": 5.0, "margin": 2.0, "student_margin": 1.0}


def pool(*students, gold=None, degenerate=()):
    made = [ScoredCandidate(f"s{i}", float(score), degenerate=i in degenerate) for i, score in enumerate(students)]
    return made + ([ScoredCandidate("gold", float(gold), is_gold=True)] if gold is not None else [])


def named(pairs):
    return [(pair.chosen.candidate_id, pair.rejected.candidate_id) for pair in pairs]


def test_the_papers_rules_by_hand():
    # Gold 5 needs a gap of 2, student 6 a gap of 1; 4 and below are never chosen.
    pairs, dropped = large_margin_pairs(pool(6, 5, 4, 3, 3, gold=5), **PAPER)
    assert sorted(named(pairs)) == sorted(
        [
            ("s0", "s1"), ("s0", "s2"), ("s0", "s3"), ("s0", "s4"), ("s0", "gold"),
            ("s1", "s2"), ("s1", "s3"), ("s1", "s4"), ("gold", "s3"), ("gold", "s4"),
        ]
    )  # fmt: skip
    # s1 = gold and s3 = s4 tie; gold > s2 is one short; s2 > s3 and s2 > s4 lack a good enough winner.
    assert dropped == Counter({"tie": 2, "below margin": 1, "chosen below positive_floor": 2})
    assert Counter(pair.kind for pair in pairs) == Counter({"student>student": 7, "student>gold": 1, "gold>student": 2})


def test_every_unordered_pair_is_a_pair_or_counted():
    rng = np.random.default_rng(0)
    for _ in range(50):
        candidates = pool(*rng.integers(1, 7, size=5).tolist(), gold=int(rng.integers(1, 7)), degenerate={1})
        pairs, dropped = large_margin_pairs(candidates, **PAPER)
        assert len(pairs) + sum(dropped.values()) == 15
        for pair in pairs:
            assert pair.chosen.reward >= 5
            assert not pair.chosen.degenerate


def test_equal_rewards_make_no_pair_even_without_a_margin():
    pairs, dropped = large_margin_pairs(pool(6, 6, 6), positive_floor=0.0, margin=0.0, student_margin=0.0)
    assert not pairs
    assert dropped == Counter({"tie": 3})


def test_a_degenerate_response_is_a_negative_to_every_good_one_whatever_its_score():
    pairs, dropped = large_margin_pairs(pool(5, 6, 2, degenerate={1}), **PAPER)
    assert ("s0", "s1") in named(pairs)
    assert not [pair for pair in named(pairs) if pair[0] == "s1"]
    assert dropped["chosen below positive_floor"] == 1
    both, reasons = large_margin_pairs(pool(5, 6, degenerate={0, 1}), **PAPER)
    assert not both
    assert reasons == Counter({"both degenerate": 1})


def test_max_pairs_keeps_the_widest_gaps():
    pairs, dropped = large_margin_pairs(pool(6, 5, 1, 2), **PAPER, max_pairs=2)
    assert named(pairs) == [("s0", "s2"), ("s0", "s3")]
    assert dropped["over max_pairs_per_prompt"] == 3


def test_a_margin_survives_binary_fractions():
    pairs, _ = large_margin_pairs(pool(0.6, 0.4), positive_floor=0.5, margin=0.2, student_margin=0.2)
    assert len(pairs) == 1


def test_win_rates_are_means_over_the_others():
    wins = np.asarray([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
    np.testing.assert_allclose(expected_win_rates(wins), [0.5, 0.5, 0.5])
    np.testing.assert_allclose(expected_win_rates(scores_to_wins([6.0, 2.0, 2.0])), [1.0, 0.25, 0.25])


def test_either_form_of_a_verdict_gives_its_win_matrix():
    wins = ((0.5, 0.25), (0.75, 0.5))
    np.testing.assert_array_equal(win_matrix(wins=wins, scores=None), wins)
    np.testing.assert_array_equal(win_matrix(wins=None, scores=(4.0, 2.0)), [[0.5, 1.0], [0.0, 0.5]])
    for both_or_none in ({"wins": None, "scores": None}, {"wins": wins, "scores": (4.0, 2.0)}):
        with pytest.raises(ValueError, match="either wins or scores"):
            win_matrix(**both_or_none)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.7], [0.7, 0.5]], "must be 1 everywhere"),
        ([[0.5, 1.2], [-0.2, 0.5]], "lie in"),
        ([[0.5, 0.5]], "square"),
    ],
)
def test_refuses_what_is_no_preference_matrix(matrix, message):
    with pytest.raises(ValueError, match=message):
        check_preference_matrix(np.asarray(matrix))


def test_repetition():
    assert repeated_ngram_share([1, 2, 3, 4, 5], 2) == 0.0
    assert repeated_ngram_share([1, 2] * 50, 4) == pytest.approx(1 - 2 / 97)
    assert repeated_ngram_share([1, 2, 3], 4) == 0.0
    assert repeated_ngram_share([7] * 10, 4) == pytest.approx(6 / 7)


@pytest.mark.parametrize("available", [[1000, 1000, 1000], [10, 1000], [0, 50], [5, 0, 3], []])
@pytest.mark.parametrize("num_new", [1, 7, 100])
def test_replayed_shares_stay_within_their_caps(available, num_new):
    counts = replay_counts(available, num_new=num_new, fraction=0.3, decay=0.5)
    total = num_new + sum(counts)
    for age, (count, have) in enumerate(zip(counts, available, strict=True)):
        assert 0 <= count <= have
        assert count <= 0.3 * 0.5**age * total + 1e-9
    if available == [1000, 1000, 1000] and num_new == 100:
        # 30 %, 15 % and 7.5 % of 100 / (1 - 0.525) = 210 pairs, but for rounding down.
        np.testing.assert_allclose(counts, [63, 31, 15], atol=2)
