"""The win-rate matrix on planted policies: intervals that cover, differences that are not made up, cycles, mixtures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dno_jax.evaluation.comparisons import Comparisons, Row, told_apart
from dno_jax.evaluation.cycles import bradley_terry, count_cycles
from dno_jax.evaluation.length_control import length_controlled
from dno_jax.evaluation.matrix import _choice, win_rate_matrix
from dno_jax.statistics import effective_number, most_extreme, wilson

NAMES = ("0", "1", "2", "3", "4", "5")


def comparisons(wins, *, ties=None, count=1.0):
    """Of arrays [N, P, P] of sums per prompt: above the diagonal as given, below it as follows."""
    upper = np.triu(np.ones(wins.shape[1:]), 1)
    counts = np.broadcast_to(count * (upper + upper.T), wins.shape)
    both = wins * upper + np.swapaxes((count - wins) * upper, 1, 2)
    none = np.zeros(wins.shape)
    return Comparisons(
        NAMES[: wins.shape[1]], tuple(map(str, range(len(wins)))), both, counts, none if ties is None else ties, none
    )


def drawn(P, *, prompts, samples=1, ties=0.0, seed=0, longer=0):
    """Rows of independent verdicts by planted probabilities; of every pair."""
    rng, rows = np.random.default_rng(seed), []
    for x in range(prompts):
        for _ in range(samples):
            for i in range(len(P)):
                for j in range(i + 1, len(P)):
                    value = 0.5 if rng.random() < ties else float(rng.random() < P[i][j])
                    rows.append(Row(str(x), str(i), str(j), value, longer))
    return rows


def ranked(*strengths):
    gaps = np.subtract.outer(strengths, strengths)
    return 1.0 / (1.0 + np.exp(-gaps))


KINDS = {
    "coins": lambda rng, p, n: ((rng.random((4000, n)) < p).astype(float), 1),
    "ties": lambda rng, p, n: (np.where(rng.random((4000, n)) < 0.3, 0.5, rng.random((4000, n)) < (p - 0.15) / 0.7), 1),
    "clusters": lambda rng, p, n: (rng.binomial(4, rng.beta(3 * p, 3 - 3 * p, (4000, n))).astype(float), 4),
    "one coin per prompt, with ties": lambda rng, p, n: (
        4.0 * np.where(rng.random((4000, n)) < 0.3, 0.5, rng.random((4000, n)) < (p - 0.15) / 0.7),
        4,
    ),
    "probabilities": lambda rng, p, n: (rng.beta(2 * p, 2 - 2 * p, (4000, n)), 1),
}


@pytest.mark.parametrize("prompts", [50, 200, pytest.param(800, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_cover_planted_win_rates_93_to_97_times_in_100(kind, prompts):
    """As `Tally.share` makes them, here of 4,000 runs at once; 3 standard errors of such a count are one point."""
    rng = np.random.default_rng(prompts)
    for p in (0.5, 0.6, 0.75):
        total, count = KINDS[kind](rng, p, prompts)
        rate = total.sum(axis=1) / (count * prompts)
        off = total - rate[:, None] * count
        variance = prompts / (prompts - 1) * (off**2).sum(axis=1) / (count * prompts) ** 2
        low, high = wilson(rate, effective_number(rate, variance, np.full(len(rate), prompts)))
        covered = ((low <= p) & (p <= high)).mean()
        assert 0.93 <= covered <= 0.975, (p, covered)


def test_an_interval_by_verdicts_would_be_too_narrow():
    rng = np.random.default_rng(0)
    won = rng.random(200) < 0.6
    rows = [Row(str(x), "1", "0", float(won[x])) for x in range(200) for _ in range(4)]
    pairs = Comparisons.of(rows).pairs()
    assert pairs.design_effect == pytest.approx(4.0, rel=0.03)
    assert pairs.comparisons.tolist() == [800]
    assert pairs.effective[0] == pytest.approx(199.0)


@pytest.mark.parametrize(
    ("prompts", "families"), [(50, 60), *(pytest.param(n, 400, marks=pytest.mark.soak) for n in (50, 100, 800))]
)
def test_equal_neighbours_are_called_different_in_5_families_of_100(prompts, families):
    """Five neighbours that are equal on average, and correlated: each has its own strength on each prompt."""
    rng = np.random.default_rng(prompts)
    wrong = 0
    for _ in range(families):
        strength = rng.normal(size=(prompts, 6))
        wins = (strength[:, :, None] > strength[:, None, :]).astype(float)
        neighbours = [(str(t + 1), str(t)) for t in range(5)]
        wrong += any(found.is_told for found in told_apart(comparisons(wins), neighbours))
    assert wrong / families <= 0.05 + 3 * (0.05 * 0.95 / families) ** 0.5


def test_differences_that_are_there_are_told():
    found = win_rate_matrix(drawn(ranked(0.0, 1.0, 1.0, 2.5), prompts=300), policies=NAMES[:4])
    assert [(one.player, one.opponent, one.is_told) for one in found.neighbours] == [
        ("1", "0", True),
        ("2", "1", False),
        ("3", "2", True),
    ]
    assert found.stop == ""
    for one in found.neighbours:
        own = found.intervals[one.player, one.opponent]
        assert one.low < own.low < own.value < own.high < one.high  # several at once need more room
    first = told_apart(found.comparisons, [("1", "0")])[0]
    own = found.intervals["1", "0"]
    assert (first.low, first.high) == (pytest.approx(own.low, abs=2e-3), pytest.approx(own.high, abs=2e-3))


def test_the_largest_of_independent_t_values_is_as_in_the_tables():
    """Sidak's quantile of 5 normals, and Student's of one with 10 degrees of freedom."""
    many = most_extreme(np.eye(5), freedom=10**6, draws=200_000)
    assert np.quantile(many, 0.95) == pytest.approx(2.5688, abs=0.02)
    one = most_extreme(np.asarray([[0.3]]), freedom=10, draws=200_000)
    assert np.quantile(one, 0.95) == pytest.approx(2.2281, abs=0.02)
    same = most_extreme(np.ones((5, 5)), freedom=10**6, draws=200_000)
    assert np.quantile(same, 0.95) == pytest.approx(1.96, abs=0.02)


def test_the_newest_policy_that_wins_nothing_is_said():
    equal = win_rate_matrix(drawn(ranked(0.0, 1.5, 1.5), prompts=200), policies=NAMES[:3])
    assert equal.stop.startswith("policy 2 does not beat policy 1: the interval ")
    assert equal.stop.endswith("over 200 prompts includes 50 %")
    worse = win_rate_matrix(drawn(ranked(0.0, 2.0, 0.5), prompts=200), policies=NAMES[:3])
    assert worse.stop.startswith("policy 2 loses to policy 1")
    assert win_rate_matrix(drawn(ranked(0.0, 1.0), prompts=9), policies=["1"], others=["0"]).stop == ""


def test_bradley_terry_is_recovered():
    P = ranked(0.0, 0.4, 1.1, 0.7)
    wins = np.broadcast_to(P, (4000, 4, 4)) + 0.0
    pairs = comparisons(wins).pairs()
    fitted = bradley_terry(pairs, 4)
    assert fitted == pytest.approx(P[np.triu_indices(4, 1)], abs=2e-3)


def test_cycles_are_counted_beside_what_a_ranking_would_show():
    ring = np.full((3, 3), 0.5)
    for i in range(3):
        ring[i, (i + 1) % 3], ring[(i + 1) % 3, i] = 0.65, 0.35
    found = count_cycles(Comparisons.of(drawn(ring, prompts=300)))
    assert (found.triples, found.observed) == (1, 1)
    assert found.expected < 0.3
    assert found.p < 0.01
    clear = count_cycles(Comparisons.of(drawn(ranked(0.0, 1.0, 2.0, 3.0), prompts=300)))
    assert (clear.triples, clear.observed, clear.p) == (4, 0, 1.0)
    assert clear.expected < 0.01
    alarms = [count_cycles(Comparisons.of(drawn(np.full((4, 4), 0.5), prompts=60, seed=s))).p for s in range(20)]
    assert np.mean(np.asarray(alarms) <= 0.01) <= 0.1  # of equal policies, where cycles come by chance
    assert count_cycles(Comparisons.of(drawn(ranked(0.0, 1.0), prompts=9))) is None


def test_the_mixture_and_the_choice_of_a_cyclic_game():
    ring = np.full((3, 3), 0.5)
    for i in range(3):
        ring[i, (i + 1) % 3], ring[(i + 1) % 3, i] = 0.8, 0.2
    found = win_rate_matrix(drawn(ring, prompts=400), policies=NAMES[:3])
    assert all(0.2 < share < 0.5 for share in found.mixture.shares.values())
    assert sum(found.mixture.shares.values()) == pytest.approx(1.0)
    assert 0.0 <= found.mixture.gap < 0.15 < min(found.mixture.gaps.values())
    assert len(found.choice.alike) >= 1  # the means of a ring are equal
    assert 0.0 < found.choice.flattery < 0.05
    best = win_rate_matrix(drawn(ranked(0.0, 1.0, 2.0), prompts=400), policies=NAMES[:3])
    assert best.mixture.shares == pytest.approx({"0": 0.0, "1": 0.0, "2": 1.0})
    assert (best.choice.best, best.choice.alike) == ("2", ())


def test_choosing_the_best_of_many_equals_flatters_it():
    """The mean of the largest of 6 mean rates, by its definition on fresh draws."""
    rng = np.random.default_rng(0)
    seen, said = [], []
    for _ in range(60):
        strength = rng.normal(size=(80, 6))
        found = comparisons((strength[:, :, None] > strength[:, None, :]).astype(float))
        seen.append(((found.rates().sum(axis=1) - 0.5) / 5).max() - 0.5)
        said.append(_choice(found).flattery)
    assert np.mean(said) == pytest.approx(np.mean(seen), rel=0.6)


def test_who_never_met_has_no_rate_and_stands_apart():
    rows = [*drawn(ranked(0.0, 1.0), prompts=60), *(Row(f"other {x}", "2", "gold", 1.0 - x % 2) for x in range(60))]
    found = win_rate_matrix(rows, policies=NAMES[:3], others=("gold",))
    assert found.groups == [["0", "1"], ["2", "gold"]]
    assert found.rates[0][2] is None
    assert (found.mixture, found.choice, found.cycles) == (None, None, None)
    assert [(one.player, one.opponent) for one in found.neighbours] == [("1", "0")]
    assert found.stop == ""
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["groups"] == found.groups


def test_both_ways_are_one_comparison_seen_twice():
    rows = drawn(ranked(0.0, 1.0, 0.3), prompts=80, ties=0.2)
    turned = [Row(row.prompt_id, row.opponent, row.player, 1.0 - row.preference, -row.longer) for row in rows]
    one, other = (win_rate_matrix(found, policies=NAMES[:3]).as_dict() for found in (rows, turned))
    assert one["rates"] == other["rates"]
    pairs = {(pair["player"], pair["opponent"]): pair for pair in one["pairs"]}
    for (player, opponent), pair in pairs.items():
        back = pairs[opponent, player]
        assert pair["value"] + back["value"] == pytest.approx(1.0)
        assert pair["low"] + back["high"] == pytest.approx(1.0, abs=2e-4)
        assert pair["ties"] == back["ties"] == pytest.approx(0.2, abs=0.15)


@pytest.mark.parametrize("row", [Row("p", "0", "1", 1.5), Row("p", "0", "0", 0.5), Row("p", "0", "x", 0.5)])
def test_refuses_what_is_no_comparison(row):
    with pytest.raises(ValueError, match=r"preference|none of the players"):
        win_rate_matrix([row], policies=NAMES[:2])


def lengths(prompts, *, fair, slope, seed=0, samples=1):
    """Verdicts by strength and length: P(win) at equal length is `fair`."""
    rng, rows = np.random.default_rng(seed), []
    longer = rng.normal(80.0, 150.0, size=(prompts, samples)).round()
    chance = 1.0 / (1.0 + np.exp(-np.log(fair / (1.0 - fair)) - slope * np.tanh(longer / longer.std(ddof=1))))
    won = rng.random((prompts, 1)) < chance
    for x in range(prompts):
        rows += [Row(str(x), "1", "0", float(won[x, s]), int(longer[x, s])) for s in range(samples)]
    return rows


def test_a_win_rate_that_length_bought_is_seen_through():
    rows = lengths(600, fair=0.5, slope=2.0)
    assert np.mean([row.preference for row in rows]) > 0.6
    found = length_controlled(rows)
    assert found.low < 0.5 < found.high
    unbiased = length_controlled(lengths(600, fair=0.7, slope=0.0))
    assert unbiased.low < 0.7 < unbiased.high


def test_length_controlled_intervals_cover_the_truth():
    covered = 0
    for seed in range(120):
        found = length_controlled(lengths(100, fair=0.6, slope=1.0, seed=seed, samples=2))
        covered += found.low <= 0.6 <= found.high
    assert 0.91 <= covered / 120 <= 0.995


def test_lengths_of_which_nothing_can_be_said():
    assert length_controlled([Row(str(x), "1", "0", 1.0, x) for x in range(40)]) is None
    assert length_controlled([Row(str(x), "1", "0", 0.5, x) for x in range(40)]) is None  # not 50 % for sure
    assert length_controlled([Row("p", "1", "0", float(x % 2), x) for x in range(40)]) is None
    assert length_controlled([Row(str(x), "1", "0", float(x < 20), 100 if x < 20 else -100) for x in range(40)]) is None
    equal = length_controlled([Row(str(x), "1", "0", float(x % 4 > 0), 7) for x in range(40)])
    assert equal.value == pytest.approx(0.75)
