"""Schedules: who meets whom, how often, and what is said of those who never met."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from dno_jax.annotation.judges.schedules import all_pairs, known_wins, num_questions, tournament
from dno_jax.config import OpenAISection


def play(schedule, preference):
    """Rounds of a schedule, and the outcomes of the pairs that met."""
    rounds, played = [list(next(schedule))], {}
    while True:
        found = [preference(*pair) for pair in rounds[-1]]
        played |= zip(rounds[-1], found, strict=True)
        try:
            rounds.append(list(schedule.send(found)))
        except StopIteration:
            return rounds, played


def stronger(first, second):
    """The higher index is better."""
    return float(first > second)


@pytest.mark.parametrize("count", [2, 3, 6, 9])
def test_all_pairs_meet_once_in_one_round(count):
    rounds, played = play(all_pairs(count), stronger)
    assert len(rounds) == 1
    assert sorted(played) == sorted(itertools.combinations(range(count), 2))
    wins = known_wins(played, num_candidates=count)
    assert wins == tuple(tuple(0.5 * (1 + (i > j) - (i < j)) for j in range(count)) for i in range(count))


@pytest.mark.parametrize("count", range(2, 18))
def test_winners_meet_until_the_best_is_left(count):
    for trial in range(20):
        seats = random.Random(trial).sample(range(count), count)
        rounds, played = play(tournament(seats), stronger)
        assert len(played) == count - 1
        assert len(rounds) == math.ceil(math.log2(count))
        lost: set[int] = set()
        for pairs in rounds:
            playing = [candidate for pair in pairs for candidate in pair]
            assert len(set(playing)) == len(playing)
            assert not lost & set(playing)
            lost |= {min(pair) for pair in pairs}
        assert lost == set(range(count - 1))
        wins = known_wins(played, num_candidates=count)
        assert wins[count - 1] == (1.0,) * (count - 1) + (0.5,)


@pytest.mark.parametrize("count", [3, 5, 6, 8, 13])
def test_a_tournament_makes_no_winner_up(count):
    """Every preference it states is of a pair that met or follows from a chain of such; nothing else is but 1/2."""
    for trial in range(50):
        seats = random.Random(trial).sample(range(count), count)
        _, played = play(tournament(seats), stronger)
        below: dict[int, set[int]] = {candidate: set() for candidate in range(count)}
        for candidate in range(count):  # in order of strength, so that the losers' own victims are known
            for pair in played:
                if candidate == max(pair):
                    below[candidate] |= {min(pair)} | below[min(pair)]
        wins = known_wins(played, num_candidates=count)
        for i, j in itertools.product(range(count), repeat=2):
            assert wins[i][j] == 0.5 * (1 + (j in below[i]) - (i in below[j]))


def test_two_losers_of_different_branches_have_no_verdict_on_each_other():
    _, played = play(tournament([3, 0, 2, 1]), stronger)
    assert set(played) == {(3, 0), (2, 1), (3, 2)}
    wins = known_wins(played, num_candidates=4)
    assert wins == ((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.0, 0.0), (0.5, 1.0, 0.5, 0.0), (1.0, 1.0, 1.0, 0.5))


def test_a_chain_is_as_sure_as_its_weakest_link():
    wins = known_wins({(0, 1): 0.9, (2, 1): 0.3, (2, 3): 0.6}, num_candidates=5)
    assert wins[0][2] == pytest.approx(0.7)
    assert wins[0][3] == pytest.approx(0.6)
    assert wins[3][0] == pytest.approx(0.4)
    assert wins[4] == (0.5,) * 5
    # A tie is no win: nothing is concluded across it.
    assert known_wins({(0, 1): 1.0, (1, 2): 0.5}, num_candidates=3)[0][2] == 0.5
    # Pairs that met keep their outcome, whatever chains say.
    assert known_wins({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 0.0}, num_candidates=3)[0][2] == 0.0


def test_of_a_tie_the_first_seated_goes_on():
    rounds, _ = play(tournament([4, 2, 0, 3, 1]), lambda *_: 0.5)
    assert rounds == [[(4, 2), (0, 3)], [(1, 4)], [(0, 1)]]
    assert known_wins(dict.fromkeys([(4, 2), (0, 3), (1, 4), (0, 1)], 0.5), num_candidates=5) == ((0.5,) * 5,) * 5
    # A mean of two preferences that misses 1/2 by a rounding is a tie as well.
    assert play(tournament([0, 1, 2]), lambda *_: (0.1 + 0.2 + 0.7 - 1e-16) / 2)[0] == [[(0, 1)], [(2, 0)]]


@pytest.mark.parametrize(
    ("fields", "count", "number"),
    [
        ({}, 6, 1),
        ({"num_orders": 4}, 6, 4),
        ({"num_orders": 4}, 2, 2),
        ({"form": "pairwise"}, 6, 30),
        ({"form": "pairwise", "both_orders": False}, 6, 15),
        ({"form": "logprob", "schedule": "tournament"}, 6, 10),
        ({"form": "pairwise", "schedule": "tournament", "both_orders": False}, 6, 5),
        ({"form": "pairwise"}, 2, 2),
        ({"form": "pairwise", "num_orders": 4}, 3, 6),
    ],
)
def test_how_many_questions_a_pool_takes(fields, count, number):
    assert num_questions(OpenAISection(**fields), num_candidates=count) == number
