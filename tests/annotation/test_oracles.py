"""The embedded oracle: hand-computed values, and the properties of a general preference."""

from __future__ import annotations

import itertools
import math

import pytest

from dno_jax.annotation.oracles import CRITERIA, majority_matrix, words
from dno_jax.errors import DnoError

PROMPT = "Tell me about a red fox with a lamp near the river."
THREE = ("relevance", "variety", "brevity")

# Of the topic's four words TOPICAL has 4, VARIED 3, SHORT 2; they have 10, 14 and 11 words, 4, 14 and 11 distinct ones.
TOPICAL = "Red fox red fox lamp lamp river river fox red."
VARIED = "A fox takes the lamp down to one quiet river bank at dawn today"
SHORT = "The fox sleeps near one red tree all day long now"


def vote(first: str, second: str, *, criteria: tuple[str, ...] = THREE, target_words: int = 10) -> float:
    return majority_matrix(PROMPT, (first, second), criteria=criteria, target_words=target_words)[0][1]


def rate(name: str, response: str, *, target_words: int = 10) -> float:
    return CRITERIA[name](PROMPT, response, target_words)


def test_words_are_lower_case_and_keep_inner_apostrophes():
    found = words("The fox's den, it isn't 3-fold: élan_vital!")
    assert found == ["the", "fox's", "den", "it", "isn't", "3", "fold", "élan", "vital"]


@pytest.mark.parametrize(
    ("name", "response", "expected"),
    [
        ("relevance", "A red fox. A RED fox!", 2 / 4),  # red, fox of {red, fox, lamp, river}; once each
        ("relevance", "Foxes and lamps.", 0.0),  # other forms do not count
        ("variety", "the fox and the owl", 4 / math.sqrt(5)),
        ("variety", "fox fox fox fox", 1 / 2),
        ("brevity", "one two three", -7.0),
        ("brevity", " ".join(["word"] * 12), -2.0),
        ("completeness", "It sleeps.", 1.0),
        ("completeness", 'It said "no!" ', 1.0),
        ("completeness", "It sleeps. And then", 0.0),
        ("completeness", "It costs 3.5", 0.0),
        ("freshness", "it runs and it runs and it runs", 3 / 6),  # iri ria air iri ria air
        ("freshness", "it runs", 1.0),
    ],
)
def test_hand_computed_values(name, response, expected):
    assert rate(name, response) == pytest.approx(expected, abs=1e-12)


def test_a_prompt_without_content_words_makes_relevance_abstain():
    assert CRITERIA["relevance"]("Tell me a story.", "Anything.", 10) == 0.0
    wins = majority_matrix("Tell me a story.", ("One.", "Two."), criteria=("relevance",), target_words=10)
    assert wins == ((0.5, 0.5), (0.5, 0.5))


def test_the_majority_of_transitive_criteria_has_a_cycle():
    # With a target of 11 words, best first: relevance T V S, variety V S T, brevity S T V. So T > V > S > T.
    pool = (TOPICAL, VARIED, SHORT)
    assert [rate("relevance", text) for text in pool] == [1.0, 3 / 4, 2 / 4]
    assert [rate("variety", text) for text in pool] == pytest.approx([4 / 10**0.5, 14**0.5, 11**0.5])
    assert [rate("brevity", text, target_words=11) for text in pool] == [-1.0, -3.0, 0.0]
    wins = majority_matrix(PROMPT, pool, criteria=THREE, target_words=11)
    assert wins == ((0.5, 1.0, 0.0), (0.0, 0.5, 1.0), (1.0, 0.0, 0.5))


def test_matrix_is_antisymmetric_about_one_half_and_independent_of_order():
    pool = (TOPICAL, VARIED, SHORT, "", "The fox", "It runs and it runs and it runs.", TOPICAL)
    criteria = tuple(CRITERIA)
    wins = majority_matrix(PROMPT, pool, criteria=criteria, target_words=10)
    for i, j in itertools.product(range(len(pool)), repeat=2):
        assert wins[i][j] + wins[j][i] == 1.0
        assert wins[i][j] == vote(pool[i], pool[j], criteria=criteria)
    assert all(wins[i][i] == 0.5 for i in range(len(pool)))

    for order in itertools.islice(itertools.permutations(range(len(pool))), 0, 5040, 97):
        shuffled = majority_matrix(PROMPT, [pool[i] for i in order], criteria=criteria, target_words=10)
        assert shuffled == tuple(tuple(wins[i][j] for j in order) for i in order)
    assert majority_matrix(PROMPT, pool, criteria=criteria[::-1], target_words=10) == wins


def test_equal_criteria_abstain_and_a_draw_is_one_half():
    assert vote(TOPICAL, TOPICAL) == 0.5
    # Same words in another order: all three criteria abstain.
    assert vote("red fox", "fox red") == 0.5
    # Equal relevance and length, so variety decides alone.
    assert vote("fox one two", "fox one one") == 1.0
    # Relevance for the first, brevity for the second: one vote each.
    assert vote("red fox red fox", "owl sun owl sun owl sun owl sun", criteria=("relevance", "brevity")) == 0.5


@pytest.mark.parametrize("empty", ["", "  \n", "...", "_!"])
def test_an_empty_response_loses_on_everything_and_ties_with_another(empty):
    for name in CRITERIA:
        assert rate(name, empty) < rate(name, "x")
    worst = "owl " * 100
    assert vote(worst, empty) == 1.0
    assert vote(empty, worst) == 0.0
    assert vote(empty, "") == 0.5


def test_an_unknown_criterion_is_named_with_the_known_ones():
    known = "relevance, variety, brevity, completeness, freshness"
    with pytest.raises(DnoError, match=f"unknown criterion 'wit'; known: {known}"):
        vote("a", "b", criteria=("relevance", "wit", "brevity"))
