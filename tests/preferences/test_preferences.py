import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest

from dno_jax.preferences import (
    PairChoice,
    ScoredCandidate,
    all_pairs,
    best_worst_pair,
    check_preference_matrix,
    count_cycles,
    large_margin_pairs,
    matched_pairs,
    repeated_ngram_share,
    replay_counts,
    scores_to_wins,
    soft_target,
    spin_pairs,
    verdict_pairs,
    win_matrix,
    win_rates,
)

PAPER = {"positive_floor": 5.0, "margin": 2.0, "student_margin": 1.0}
CYCLE = np.asarray([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])


def pool(*students, gold=None, degenerate=(), counts=None):
    counts = counts or [1] * len(students)
    made = [
        ScoredCandidate(f"s{i}", float(score), degenerate=i in degenerate, count=count)
        for i, (score, count) in enumerate(zip(students, counts, strict=True))
    ]
    return made + ([ScoredCandidate("gold", float(gold), "gold")] if gold is not None else [])


def named(pairs):
    return [(pair.chosen.candidate_id, pair.rejected.candidate_id) for pair in pairs]


def random_game(rng, size):
    wins = rng.uniform(size=(size, size))
    wins = np.triu(wins, 1) + np.tril(1.0 - wins.T, -1)
    np.fill_diagonal(wins, 0.5)
    return wins


def tournament(rng, size):
    wins = (random_game(rng, size) > 0.5).astype(float)
    np.fill_diagonal(wins, 0.5)
    return wins


# Estimates


def test_win_rates_are_means_over_the_others():
    np.testing.assert_allclose(win_rates(CYCLE).rate, [0.5, 0.5, 0.5])
    np.testing.assert_allclose(win_rates(scores_to_wins([6.0, 2.0, 2.0])).rate, [1.0, 0.25, 0.25])


def test_win_rates_by_hand_with_repeated_texts_and_gold_apart():
    wins = np.asarray([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]])
    # Text 0 came three times, text 1 once; gold (2) meets all four but is nobody's opponent.
    rates = win_rates(wins, opponents=[3, 1, 0])
    np.testing.assert_allclose(rates.rate, [(2 * 0.5 + 0.8) / 3, 0.2, (3 * 0.7 + 0.1) / 4])
    meets = [[0.5, 0.5, 0.8], [0.2, 0.2, 0.2], [0.7, 0.7, 0.7, 0.1]]
    expected = [np.std(values, ddof=1) / math.sqrt(len(values)) for values in meets]
    np.testing.assert_allclose(rates.standard_error, expected, atol=1e-15)
    # Not leaving it out is a matter of `own` alone.
    np.testing.assert_allclose(win_rates(wins, opponents=[3, 1, 0], own=[0, 0, 0]).rate[0], (3 * 0.5 + 0.8) / 4)


def test_one_opponent_has_no_standard_error():
    rates = win_rates(scores_to_wins([1.0, 2.0, 3.0]), opponents=[1, 1, 0])
    np.testing.assert_array_equal(np.isnan(rates.standard_error), [True, True, False])
    np.testing.assert_array_equal(rates.rate, [0.0, 1.0, 1.0])


def pools(policy, num_samples):
    """Every possible pool of a policy's samples, with its probability."""
    for texts in product(range(len(policy)), repeat=num_samples):
        yield texts, math.prod(policy[text] for text in texts)


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_win_rates_over_the_samples_are_unbiased_by_enumeration(num_samples):
    wins = random_game(np.random.default_rng(1), 4)
    policy = np.asarray([0.5, 0.3, 0.2, 0.0])  # the last is gold, never sampled
    exact = wins @ policy
    weighted, gold, mass = np.zeros(4), 0.0, np.zeros(4)
    for texts, probability in pools(policy[:3], num_samples):
        counts = np.bincount(texts, minlength=4)
        there = [*np.flatnonzero(counts).tolist(), 3]
        rate = win_rates(wins[np.ix_(there, there)], opponents=counts[there]).rate
        weighted[there[:-1]] += probability * counts[there[:-1]] * rate[:-1]
        mass += probability * counts
        gold += probability * rate[-1]
    np.testing.assert_allclose(weighted[:3] / mass[:3], exact[:3], atol=1e-12)
    np.testing.assert_allclose(gold, exact[3], atol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4])
def test_gold_among_the_opponents_biases_a_samples_rate_as_documented(num_samples):
    wins = random_game(np.random.default_rng(2), 4)
    policy = np.asarray([0.5, 0.3, 0.2])
    exact = wins[:, :3] @ policy
    first, gold = np.zeros(3), 0.0  # of the first sample, given its text; of gold
    for texts, probability in pools(policy, num_samples):
        index = [*texts, 3]  # one row a sample: a repeated text meets itself at 1/2
        rate = win_rates(wins[np.ix_(index, index)]).rate
        first[texts[0]] += probability * rate[0] / policy[texts[0]]
        gold += probability * rate[-1]
    biased = (num_samples - 1) / num_samples * exact[:3] + wins[:3, 3] / num_samples
    np.testing.assert_allclose(first, biased, atol=1e-12)
    assert np.abs(first - exact[:3]).max() > 0.01
    np.testing.assert_allclose(gold, exact[3], atol=1e-12)


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_the_difference_within_a_pair_of_samples_has_the_documented_mean(num_samples):
    wins = random_game(np.random.default_rng(3), 3)
    policy = np.asarray([0.5, 0.3, 0.2])
    exact = wins @ policy
    mean = np.zeros((3, 3))
    for texts, probability in pools(policy, num_samples):
        rate = win_rates(wins[np.ix_(texts, texts)]).rate
        mean[texts[:2]] += probability * (rate[0] - rate[1]) / (policy[texts[0]] * policy[texts[1]])
    others = num_samples - 1
    expected = (num_samples - 2) / others * (exact[:, None] - exact[None, :]) + (2 * wins - 1) / others
    np.testing.assert_allclose(mean, expected, atol=1e-12)
    # So a squared regression over pairs of samples finds r_t's differences K / (K - 1) times too large.
    np.testing.assert_allclose(mean @ policy, num_samples / others * (exact - 0.5), atol=1e-12)


def test_win_rates_and_their_errors_over_simulated_pools():
    rng = np.random.default_rng(4)
    size, num_samples, num_pools = 12, 6, 4000
    wins, policy = random_game(rng, size), rng.dirichlet(np.ones(size))
    exact = wins @ policy
    off = np.zeros((num_pools, size))  # count * (estimate - r_t): mean zero for each text
    fixed = np.zeros((num_pools, 2))  # estimate and squared error of text 0 as an outsider
    for n in range(num_pools):
        texts, counts = np.unique(rng.choice(size, size=num_samples, p=policy), return_counts=True)
        rates = win_rates(wins[np.ix_(texts, texts)], opponents=counts)
        off[n, texts] = counts * (rates.rate - exact[texts])
        there = [0, *texts]
        outsider = win_rates(wins[np.ix_(there, there)], opponents=[0, *counts.tolist()])
        fixed[n] = outsider.rate[0], outsider.standard_error[0] ** 2
    assert np.all(np.abs(off.mean(0)) <= 5 * off.std(0, ddof=1) / math.sqrt(num_pools))
    # The squared error is an unbiased estimate of the estimate's variance, here known exactly.
    variance = (wins[0] ** 2 @ policy - exact[0] ** 2) / num_samples
    assert abs(fixed[:, 1].mean() - variance) <= 5 * fixed[:, 1].std(ddof=1) / math.sqrt(num_pools)
    squares = (fixed[:, 0] - exact[0]) ** 2
    assert abs(squares.mean() - variance) <= 5 * squares.std(ddof=1) / math.sqrt(num_pools)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opponents": [1, -1, 1]}, "not negative"),
        ({"opponents": np.asarray([1.0, 0.5, 1.0])}, "whole"),
        ({"opponents": np.asarray([1.0, np.inf, 1.0])}, "counts"),
        ({"opponents": [1, 1]}, r"opponents has shape \(2,\)"),
        ({"opponents": np.ones((3, 3))}, "opponents has shape"),
        ({"own": [1, 1]}, "own has shape"),
        ({"own": [1, 2, 1]}, "only 0 and 1"),
        ({"opponents": [1, 0, 1], "own": [1, 1, 1]}, "candidate 1 has own = 1"),
        ({"opponents": [0, 0, 1]}, "candidate 2 has no opponent left"),
        ({"opponents": [0, 0, 0]}, "candidate 0 has no opponent left"),
    ],
)
def test_win_rates_refuses_bad_counts(arguments, message):
    with pytest.raises(ValueError, match=message):
        win_rates(CYCLE, **arguments)


def test_soft_targets():
    assert soft_target(0.5, 0.5) == 0.5
    assert soft_target(1.0, 0.0) == pytest.approx(0.731, abs=5e-4)
    assert soft_target(0.0, 1.0) == pytest.approx(0.269, abs=5e-4)
    assert soft_target(6.0, 4.0, temperature=2.0) == pytest.approx(soft_target(1.0, 0.0), abs=1e-15)
    assert isinstance(soft_target(1.0, 0.0), float)
    first, second = np.float32([0.25, 1.0, 1e6]), np.float32([0.75, 0.0, -1e6])
    targets = soft_target(first, second)
    assert targets.dtype == np.float64
    np.testing.assert_allclose(targets, [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-1)), 1.0], rtol=1e-12)
    np.testing.assert_allclose(targets + soft_target(second, first), 1.0, atol=1e-15)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be > 0"):
            soft_target(1.0, 0.0, temperature=temperature)


def bias_bound(variance):
    """The most that |E sigma(d) - sigma(E d)| can be: half the largest |sigma''|, 1 / (6 sqrt 3), times Var(d)."""
    return variance / (12.0 * math.sqrt(3.0))


def test_the_plug_in_bias_of_soft_targets_stays_within_its_bound():
    worst = 0.0
    for p, q, num_samples, temperature in product((0.1, 0.5, 0.9), (0.2, 0.5, 1.0), (1, 2, 5), (0.25, 1.0)):
        grid = np.arange(num_samples + 1)
        binomial = np.asarray([math.comb(num_samples, k) for k in grid], np.float64)
        masses = [binomial * x**grid * (1 - x) ** (num_samples - grid) for x in (p, q)]
        share = grid / num_samples
        labels = soft_target(*np.broadcast_arrays(share[:, None], share[None, :]), temperature=temperature)
        bias = masses[0] @ labels @ masses[1] - soft_target(p, q, temperature=temperature)
        bound = bias_bound((p * (1 - p) + q * (1 - q)) / num_samples / temperature**2)
        assert abs(bias) <= bound + 1e-15
        worst = max(worst, abs(bias))
    assert worst > 0.01  # there is a bias to bound
    # Tight: a narrow spread about the steepest bend of sigma, at log(2 + sqrt 3).
    bend, spread = math.log(2 + math.sqrt(3)), 0.01
    narrow = (soft_target(bend + spread, 0.0) + soft_target(bend - spread, 0.0)) / 2 - soft_target(bend, 0.0)
    assert abs(narrow) == pytest.approx(bias_bound(spread**2), rel=1e-3)


def test_scores_to_wins_hard_and_soft():
    np.testing.assert_array_equal(scores_to_wins([3.0, 1.0, 3.0]), [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]])
    soft = scores_to_wins([3.0, 1.0, 3.0], temperature=2.0)
    assert soft[0, 1] == pytest.approx(1 / (1 + math.exp(-1)))
    assert soft[0, 2] == 0.5
    check_preference_matrix(soft)
    # Far scores and small temperatures tend to the hard verdict without overflow.
    np.testing.assert_array_equal(scores_to_wins([1e6, 0.0], temperature=1e-3), scores_to_wins([1e6, 0.0]))
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        scores_to_wins([1.0, 2.0], temperature=-1.0)


def test_cycles_of_known_tournaments():
    assert count_cycles(CYCLE) == 1
    assert count_cycles(1.0 - CYCLE) == 1
    assert count_cycles(scores_to_wins([4.0, 3.0, 2.0, 1.0])) == 0
    assert count_cycles(np.full((5, 5), 0.5)) == 0
    for size in (5, 7, 9, 51):
        # Each beats the (C - 1) / 2 after it in the round: the most cycles there can be, C (C^2 - 1) / 24.
        ahead = (np.arange(size)[None, :] - np.arange(size)[:, None]) % size
        wins = np.where(ahead == 0, 0.5, (ahead <= size // 2).astype(float))
        assert count_cycles(wins) == size * (size**2 - 1) // 24


def test_cycles_of_random_tournaments_against_brute_force():
    rng = np.random.default_rng(5)
    for size in range(1, 9):
        for _ in range(10):
            wins = tournament(rng, size)
            wins[rng.uniform(size=wins.shape) < 0.1] = 0.5  # and some draws
            wins = (wins + 1.0 - wins.T) / 2
            beats = [[wins[i, j] > 0.5 for j in range(size)] for i in range(size)]
            cycles = sum(
                (beats[a][b] and beats[b][c] and beats[c][a]) or (beats[a][c] and beats[c][b] and beats[b][a])
                for a, b, c in combinations(range(size), 3)
            )
            assert count_cycles(wins) == cycles


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
        (np.ones((0, 0)), "not empty"),
    ],
)
def test_refuses_what_is_no_preference_matrix(matrix, message):
    with pytest.raises(ValueError, match=message):
        check_preference_matrix(np.asarray(matrix))


# Section 5.1's rules


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


def test_dno_restrictive_keeps_the_pairs_that_gold_wins():
    candidates = pool(6, 5, 4, 3, 3, gold=5)
    every, dropped = large_margin_pairs(candidates, **PAPER)
    pairs, restricted = large_margin_pairs(candidates, **PAPER, winner="gold")
    assert pairs == [pair for pair in every if pair.chosen.is_gold]
    assert named(pairs) == [("gold", "s3"), ("gold", "s4")]
    assert restricted == dropped + Counter({"winner is not gold": 8})
    # max_pairs is a limit on what is left.
    assert large_margin_pairs(candidates, **PAPER, winner="gold", max_pairs=2)[0] == pairs
    with pytest.raises(ValueError, match="winner is"):
        large_margin_pairs(candidates, **PAPER, winner="student")


def test_only_the_students_own_wins_have_the_smaller_margin():
    data, student = ScoredCandidate("d", 6.0, "data"), ScoredCandidate("s", 5.0)
    assert large_margin_pairs([data, student], **PAPER) == ([], Counter({"below margin": 1}))
    pairs, _ = large_margin_pairs([ScoredCandidate("s", 6.0), ScoredCandidate("d", 5.0, "data")], **PAPER)
    assert [pair.kind for pair in pairs] == ["student>data"]


# The other rules


def test_spin_lets_gold_win_whatever_the_rewards():
    candidates = [*pool(math.nan, 6, 1, counts=[1, 3, 1]), ScoredCandidate("gold", math.nan, "gold")]
    pairs, dropped = spin_pairs(candidates)
    assert named(pairs) == [("gold", "s0"), ("gold", "s1"), ("gold", "s2")]
    assert [pair.weight for pair in pairs] == [1.0, 3.0, 1.0]
    assert dropped == Counter({"both students": 3})
    assert spin_pairs(pool(1, 2, 3)) == ([], Counter({"no gold": 3}))
    odd = [ScoredCandidate("a", 0.0, "gold"), ScoredCandidate("b", 0.0, "gold"), ScoredCandidate("c", 0.0, "data")]
    assert spin_pairs(odd) == ([], Counter({"not gold against student": 3}))


def test_best_against_worst():
    pairs, dropped = best_worst_pair(pool(4, 6, 2, 6, 2, gold=5))
    assert named(pairs) == [("s1", "s2")]
    assert dropped == Counter({"not best against worst": 14})
    assert best_worst_pair(pool(4, 4, 4)) == ([], Counter({"tie": 3}))
    assert best_worst_pair(pool(4, 3), margin=2.0) == ([], Counter({"below margin": 1}))
    assert named(best_worst_pair(pool(0.4, 0.6), margin=0.2)[0]) == [("s1", "s0")]
    assert best_worst_pair(pool(4)) == best_worst_pair([]) == ([], Counter())


def test_all_pairs_weighs_by_count_and_keeps_ties_on_request():
    candidates = pool(4, 6, 4, counts=[2, 3, 1])
    pairs, dropped = all_pairs(candidates, keep_ties=True)
    assert named(pairs) == [("s1", "s0"), ("s1", "s2"), ("s0", "s2")]
    assert [pair.weight for pair in pairs] == [6.0, 3.0, 2.0]
    assert [pair.preference for pair in pairs] == [None] * 3
    assert not dropped
    assert all_pairs(candidates, keep_ties=False) == (pairs[:2], Counter({"tie": 1}))
    # The order of the pool plays no part, and a rounding makes no winner.
    assert all_pairs(candidates[::-1], keep_ties=True)[0] == pairs
    assert named(all_pairs(pool(0.3, 0.1 + 0.2), keep_ties=True)[0]) == [("s0", "s1")]
    assert not all_pairs(pool(0.3, 0.1 + 0.2), keep_ties=False)[0]


def test_verdict_pairs_follow_a_cycle_that_no_rewards_can():
    wins = np.asarray([[0.5, 0.9, 0.2, 0.5], [0.1, 0.5, 1.0, 0.5], [0.8, 0.0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    candidates = pool(1, 2, 3, gold=9, counts=[2, 1, 1])
    pairs, dropped = verdict_pairs(candidates, wins, keep_ties=False)
    assert named(pairs) == [("s1", "s2"), ("s0", "s1"), ("s2", "s0")]
    assert [pair.preference for pair in pairs] == [1.0, 0.9, 0.8]
    assert [pair.weight for pair in pairs] == [1.0, 2.0, 2.0]
    assert dropped == Counter({"tie": 3})
    every, none = verdict_pairs(candidates, wins, keep_ties=True)
    assert named(every)[3:] == [("gold", "s0"), ("gold", "s1"), ("gold", "s2")]
    assert {pair.preference for pair in every[3:]} == {0.5}
    assert not none
    with pytest.raises(ValueError, match="of 4 candidates, expected the 2"):
        verdict_pairs(pool(1, 2), wins, keep_ties=True)
    with pytest.raises(ValueError, match="must be 1 everywhere"):
        verdict_pairs(pool(1, 2), np.ones((2, 2)), keep_ties=True)


def test_matched_pairs_use_each_response_once():
    candidates = pool(3, 1, 2, 2, 5)
    pairs, dropped = matched_pairs(candidates, rng=np.random.default_rng(0))
    used = [name for pair in named(pairs) for name in pair]
    assert len(pairs) == 2
    assert len(set(used)) == 4
    assert all(pair.margin > 0 or pair.chosen.candidate_id < pair.rejected.candidate_id for pair in pairs)
    assert dropped == Counter({"odd one out": 1})
    assert matched_pairs(candidates, rng=np.random.default_rng(0)) == (pairs, dropped)
    assert matched_pairs(candidates[:4], rng=np.random.default_rng(0))[1] == Counter()
    assert matched_pairs([], rng=np.random.default_rng(0)) == ([], Counter())
    with pytest.raises(ValueError, match="'s1' stands for 2 samples"):
        matched_pairs(pool(1, 2, counts=[1, 2]), rng=np.random.default_rng(0))


def test_every_matching_is_as_likely():
    rng = np.random.default_rng(6)
    drawn = Counter(frozenset(named(matched_pairs(pool(4, 3, 2, 1), rng=rng)[0])) for _ in range(3000))
    assert len(drawn) == 3
    # 1000 of each are expected; the standard deviation of a count is sqrt(3000 * 1/3 * 2/3) = 26.
    assert all(abs(count - 1000) < 5 * 26 for count in drawn.values())


RULES = {
    "large margin": lambda pool, rng: large_margin_pairs(pool, positive_floor=2.0, margin=2.0, student_margin=1.0),
    "restrictive": lambda pool, rng: large_margin_pairs(
        pool, positive_floor=2.0, margin=1.0, student_margin=1.0, winner="gold", max_pairs=2
    ),
    "spin": lambda pool, rng: spin_pairs(pool),
    "best worst": lambda pool, rng: best_worst_pair(pool, margin=2.0),
    "all": lambda pool, rng: all_pairs(pool, keep_ties=False),
    "all with ties": lambda pool, rng: all_pairs(pool, keep_ties=True),
    "verdict": lambda pool, rng: verdict_pairs(pool, random_game(rng, len(pool)).round(1), keep_ties=False),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_returns_or_counts_every_pair_whatever_the_order_of_the_pool(rule):
    rng = np.random.default_rng(7)
    for _ in range(60):
        size = int(rng.integers(1, 8))
        candidates = [
            ScoredCandidate(
                f"c{i}",
                float(rng.integers(1, 7)),
                str(rng.choice(["student", "gold", "data"])),
                degenerate=bool(rng.uniform() < 0.2),
                count=int(rng.integers(1, 4)),
            )
            for i in range(size)
        ]
        pairs, dropped = RULES[rule](candidates, rng)
        assert len(pairs) + sum(dropped.values()) == size * (size - 1) // 2
        assert all(count > 0 for count in dropped.values())
        assert len({frozenset(pair) for pair in named(pairs)}) == len(pairs)
        gaps = [pair.margin if pair.preference is None else pair.preference for pair in pairs]
        assert gaps == sorted(gaps, reverse=True)
        if rule != "verdict":
            assert RULES[rule](candidates[::-1], rng) == (pairs, dropped)


@pytest.mark.parametrize("rule", ["large margin", "best worst", "all"])
def test_rules_that_compare_rewards_refuse_nan_and_all_refuse_repeated_ids(rule):
    rng = np.random.default_rng(8)
    with pytest.raises(ValueError, match="'s1' has reward nan"):
        RULES[rule](pool(1, math.nan, 2), rng)
    with pytest.raises(ValueError, match="'s0' is there 2 times"):
        RULES[rule]([*pool(1, 2), *pool(3)], rng)


def test_a_candidate_is_checked_and_a_pair_knows_its_kind():
    gold, student = ScoredCandidate("g", 1.0, "gold"), ScoredCandidate("s", 3.0)
    assert gold.is_gold
    assert not student.is_gold
    pair = PairChoice(student, gold)
    assert (pair.kind, pair.margin, pair.weight, pair.preference) == ("student>gold", 2.0, 1.0, None)
    with pytest.raises(ValueError, match="'x': source is one of"):
        ScoredCandidate("x", 1.0, "teacher")
    with pytest.raises(ValueError, match="'x': count must be >= 1"):
        ScoredCandidate("x", 1.0, count=0)


# Odds and ends


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
