"""The annotators that ask nobody: what they answer, and what they refuse."""

from __future__ import annotations

import asyncio
import itertools
import re

import numpy as np
import pytest

from dno_jax.annotation import Annotator, Candidate, Pool
from dno_jax.annotation.embedded import GivenAnnotator, GoldAnnotator, OracleAnnotator, TableAnnotator
from dno_jax.config import OracleSection, TableSection
from dno_jax.errors import DnoError
from dno_jax.preferences import check_preference_matrix
from dno_jax.records import GivenResponse, Message, Prompt

PROMPT = Prompt(prompt_id="p", messages=(Message(role="user", content="Play."),))
ANSWERS = ("rock", "paper", "Scissors")
TABLE = ((0.5, 0.1, 0.8), (0.9, 0.5, 0.3), (0.2, 0.7, 0.5))


def pool(*texts: str, iteration: int = 0, prompt: Prompt = PROMPT, gold: str | None = None) -> Pool:
    candidates = [Candidate(f"{iteration:03}/{prompt.prompt_id}/{i}", text) for i, text in enumerate(texts)]
    if gold is not None:
        candidates.insert(1, Candidate(f"{iteration:03}/{prompt.prompt_id}/gold", gold))
    return Pool(prompt, tuple(candidates))


def given(*rows: tuple[str, float | None]) -> Prompt:
    return PROMPT.model_copy(
        update={"candidates": tuple(GivenResponse(text=text, score=score) for text, score in rows)}
    )


def prompts(count: int) -> list[Prompt]:
    return [PROMPT.model_copy(update={"prompt_id": f"p{number}"}) for number in range(count)]


def table(*, draws: bool = True, seed: int = 0, **fields) -> TableAnnotator:
    return TableAnnotator(
        TableSection(**{"answers": ANSWERS, "preferences": TABLE, "draws": draws, **fields}), seed=seed
    )


def wins(annotator: Annotator, judged: Pool) -> np.ndarray:
    judgement = annotator.recall(judged)
    assert (judgement.state, judgement.scores, judgement.judge) == ("ok", None, annotator.identity)
    assert (judgement.prompt_id, judgement.candidate_ids) == (judged.prompt.prompt_id, judged.candidate_ids)
    return check_preference_matrix(np.asarray(judgement.wins))


def test_all_keep_to_the_protocol():
    for annotator in (OracleAnnotator(OracleSection()), table(), GoldAnnotator(), GivenAnnotator()):
        assert isinstance(annotator, Annotator)
        judged = pool("rock", "paper", prompt=given(("rock", 1.0), ("paper", 2.0)))
        judgement = asyncio.run(annotator.judge(judged))
        assert judgement.state == "ok"
        assert judgement == annotator.recall(judged)
        asyncio.run(annotator.probe())
        asyncio.run(annotator.close())


def test_the_oracles_identity_names_what_decides():
    sections = [
        OracleSection(),
        OracleSection(target_words=31),
        OracleSection(criteria=("brevity", "variety", "freshness")),
    ]
    assert len({OracleAnnotator(section).identity for section in sections}) == 3


@pytest.mark.parametrize(
    "texts", [("rock", "paper", "scissors"), (" ROCK!", "Paper, of course: rock is dull", "scissors\n")]
)
def test_a_table_states_its_probabilities_by_the_first_word(texts):
    np.testing.assert_array_equal(wins(table(draws=False), pool(*texts)), TABLE)


def test_what_is_no_answer_loses_to_every_answer_and_ties_with_another():
    # The second is no answer though it names one; the third is another word; the last has no word at all.
    judged = pool("paper", "my paper", "papers", "?!")
    expected = [[0.5, 1, 1, 1], [0, 0.5, 0.5, 0.5], [0, 0.5, 0.5, 0.5], [0, 0.5, 0.5, 0.5]]
    np.testing.assert_array_equal(wins(table(draws=False), judged), expected)
    drawn = np.mean([wins(table(), pool("paper", "my paper", "papers", prompt=each)) for each in prompts(1000)], axis=0)
    np.testing.assert_array_equal(drawn[0, 1:], 1.0)
    assert drawn[1, 2] == pytest.approx(0.5, abs=0.05)  # three standard deviations; the draws are fixed


def test_draws_are_whole_verdicts_as_frequent_as_the_table_says():
    texts = ("rock", "paper", "scissors", "Rock.")
    index = [0, 1, 2, 0]
    drawn = np.stack([wins(table(), pool(*texts, prompt=each)) for each in prompts(4000)])
    off_diagonal = ~np.eye(4, dtype=bool)
    assert set(np.unique(drawn[:, off_diagonal])) == {0.0, 1.0}
    np.testing.assert_array_equal(drawn + drawn.transpose(0, 2, 1), 1.0)
    expected = np.asarray(TABLE)[np.ix_(index, index)]
    # Standard deviation at most 0.5 / sqrt(4000) = 0.008, six different pairs; the draws are fixed.
    np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=0.025)
    # Pairs of one pool are drawn apart from each other: no two of the six go together.
    pairs = [drawn[:, i, j] for i, j in itertools.combinations(range(4), 2)]
    correlation = np.corrcoef(pairs) - np.eye(6)
    assert np.abs(correlation).max() < 0.06  # standard deviation 0.016, fifteen of them


def test_certain_preferences_are_never_drawn_otherwise():
    certain = ((0.5, 1.0, 0.0), (0.0, 0.5, 1.0), (1.0, 0.0, 0.5))
    annotator = table(preferences=certain)
    for each in prompts(200):
        np.testing.assert_array_equal(wins(annotator, pool("rock", "paper", "scissors", prompt=each)), certain)


def test_a_draw_depends_on_its_address_alone():
    texts = ("rock", "paper", "scissors", "paper!", "lizard", "spock")
    judged = pool(*texts, gold="rock, says the teacher")
    expected = wins(table(), judged)
    np.testing.assert_array_equal(wins(table(), judged), expected)  # another annotator of the same table
    for order in itertools.islice(itertools.permutations(range(7)), 0, 5040, 229):
        shuffled = Pool(PROMPT, tuple(judged.candidates[i] for i in order))
        np.testing.assert_array_equal(wins(table(), shuffled), expected[np.ix_(order, order)])
    some = (0, 2, 5)  # what else is in the pool does not matter
    fewer = Pool(PROMPT, tuple(judged.candidates[i] for i in some))
    np.testing.assert_array_equal(wins(table(), fewer), expected[np.ix_(some, some)])


def test_seed_prompt_iteration_and_sample_each_draw_anew():
    texts = ("rock", "rock.") * 6  # fair coins: 66 a pool
    upper = np.triu_indices(12, k=1)
    base = wins(table(), pool(*texts))[upper]
    others = {
        "seed": wins(table(seed=1), pool(*texts)),
        "prompt": wins(table(), pool(*texts, prompt=prompts(1)[0])),
        "iteration": wins(table(), pool(*texts, iteration=1)),
    }
    for name, other in others.items():
        assert 0.25 < np.mean(other[upper] != base) < 0.75, name  # four standard deviations of 66 coins
    assert 0.25 < base.mean() < 0.75


def test_a_tables_identity_names_what_decides():
    rolled = ("paper", "scissors", "rock")
    other = ((0.5, 0.1, 0.8), (0.9, 0.5, 0.31), (0.2, 0.69, 0.5))
    annotators = [table(), table(seed=1), table(draws=False), table(answers=rolled), table(preferences=other)]
    assert len({annotator.identity for annotator in annotators}) == 5
    assert table(draws=False).identity == table(draws=False, seed=1).identity  # nothing is drawn
    assert table(answers=("Rock", "PAPER", "scissors")).identity == table().identity  # case decides nothing


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"preferences": ((0.5, 0.1), (0.9, 0.5))}, r"3 answers need 3 rows of 3, got rows of \[2, 2\]"),
        ({"preferences": ((0.5, 0.1, 0.8), (0.9, 0.5), (0.2, 0.7, 0.5))}, r"got rows of \[3, 2, 3\]"),
        ({"preferences": ((0.5, 0.1, 0.8), (0.9, 0.5, 0.3), (0.2, 0.6, 0.5))}, r"preferences: P \+ P\^T must be 1"),
        ({"preferences": ((0.6, 0.1, 0.8), (0.9, 0.5, 0.3), (0.2, 0.7, 0.5))}, r"preferences: P \+ P\^T must be 1"),
        ({"preferences": ((0.5, -0.1, 0.8), (1.1, 0.5, 0.3), (0.2, 0.7, 0.5))}, r"lie in \[0, 1\]"),
        ({"answers": ("rock", "paper", "Rock")}, "twice"),
        ({"answers": ("rock", "paper", "long scissors")}, "'long scissors' is not one word"),
        ({"answers": ("rock", "paper", "")}, "'' is not one word"),
    ],
)
def test_a_table_that_is_none_is_refused(fields, reason):
    with pytest.raises(DnoError, match=rf"annotation\.table\..*{reason}"):
        table(**fields)


def test_gold_beats_every_other_and_the_others_tie():
    judged = pool("a", "b", gold="teacher")
    np.testing.assert_array_equal(wins(GoldAnnotator(), judged), [[0.5, 0, 0.5], [1, 0.5, 1], [0.5, 0, 0.5]])
    # No id but the teacher's own counts: neither a prompt of that name nor a response that says so.
    other = PROMPT.model_copy(update={"prompt_id": "gold"})
    np.testing.assert_array_equal(wins(GoldAnnotator(), pool("gold", "/gold", prompt=other)), np.full((2, 2), 0.5))
    held_out = Pool(PROMPT, (Candidate("0", "a"), Candidate("gold", "b")))
    np.testing.assert_array_equal(wins(GoldAnnotator(), held_out), [[0.5, 0], [1, 0.5]])


def test_given_scores_are_found_by_text_in_the_pools_order():
    prompt = given(("two", 2.0), ("one", -1.5), ("unused", 9.0), ("two", None), ("one", -1.5))
    judged = pool("one", "two ", prompt=prompt)
    judgement = asyncio.run(GivenAnnotator().judge(judged))
    assert (judgement.state, judgement.scores, judgement.wins) == ("ok", (-1.5, 2.0), None)
    assert judgement.judge == GivenAnnotator().identity
    assert judgement == GivenAnnotator().recall(judged)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("one", 1.0), ("two", 2.0)], "no score for the text of gold$"),
        ([("one", 1.0), ("two", None), ("teacher", 3.0)], "no score for the text of 1$"),
        ([], "no score for the text of 0, gold, 1$"),
        ([("one", 1.0), ("two", 2.0), ("teacher", 3.0), ("one ", 2.0)], "several scores for the text of 0$"),
    ],
)
def test_a_missing_or_ambiguous_score_is_a_failure_never_a_number(rows, reason):
    judged = pool("one", "two", gold="teacher", prompt=given(*rows))
    judgement = asyncio.run(GivenAnnotator().judge(judged))
    assert (judgement.state, judgement.scores, judgement.wins) == ("failed", None, None)
    assert re.search(reason, judgement.detail)
    assert GivenAnnotator().recall(judged) is None
