"""What a judge reads of a response that thinks, and what becomes of one that never comes to its answer."""

from __future__ import annotations

from collections import Counter

import pytest

from dno_jax.data.pools import pools_of, shown_text
from dno_jax.records import Judgement, Message, Prompt, Rollout
from dno_jax.stages.held_out import Players
from dno_jax.stages.pair import new_pairs
from tests.stages.test_pair import made_of, make_config, rollout, texts_of

PROMPT = Prompt(prompt_id="q", messages=(Message(role="user", content="Why?"),))
CUT = "Light scat"


def thinking(text: str, sample: int, *, in_thought: bool = True, **changes) -> Rollout:
    finish = "length" if text.endswith(CUT) else "stop"
    return rollout(text, sample, **changes).model_copy(update={"in_thought": in_thought, "finish": finish})


ROWS = [
    thinking("Light scatters.\n</think>\n\nBlue.", 0),
    thinking("A guess.\n</think>\n\nBlue.", 1),  # the same answer after another thought
    thinking("Hm.</think>Red.", 2),
    thinking(CUT, 3),
    thinking(f"Else {CUT}", 4),
    thinking("Hm.</think>\n", 5),
    rollout("<think>\nI know.\n</think>\n\nBlue, by scattering.", -1, source="gold"),
]


def test_a_judge_reads_answers_and_what_has_none_is_counted():
    dropped = Counter()
    (pool,) = pools_of(ROWS, {"q": PROMPT}, dropped=dropped)
    assert [candidate.text for candidate in pool.candidates] == ["Blue, by scattering.", "Blue.", "Red."]
    assert dropped == {"response cut inside its thought": 2, "duplicate response": 1, "empty response": 1}


def test_a_judge_may_be_shown_thoughts():
    dropped = Counter()
    (pool,) = pools_of(ROWS, {"q": PROMPT}, dropped=dropped, reasoning=True)
    texts = [row.text for row in ROWS]
    assert [candidate.text for candidate in pool.candidates] == [texts[6], *texts[:3]]
    assert dropped == {"response cut inside its thought": 2, "empty response": 1}


@pytest.mark.parametrize(
    ("text", "in_thought", "answer"),
    [
        ("  Plain words.\n", False, "  Plain words.\n"),  # unaltered
        ("<think>Hm.</think>Blue.", False, "Blue."),
        ("Hm.</think>Blue.", False, "Blue."),
        (f"<think>{CUT}", False, ""),
        ("Blue.", True, ""),  # it never closed its thought
    ],
)
def test_what_is_shown_of_a_response(text, in_thought, answer):
    row = thinking(text, 0, in_thought=in_thought)
    assert shown_text(row, reasoning=False) == answer
    assert shown_text(row, reasoning=True) == (text if answer else "")


@pytest.mark.parametrize("reward", ["win_rate", "score"])
@pytest.mark.parametrize("rule", ["large_margin", "best_worst", "all"])
def test_a_response_cut_inside_its_thought_is_a_negative(rule, reward):
    rows = [row for row in ROWS if row.sample in (0, 2, 3)]
    config = make_config(
        kind="oracle" if reward == "win_rate" else "openai",
        pairing={"rule": rule, "reward": reward, "positive_floor": 0.5, "margin": 0.0, "student_margin": 0.0},
    )
    answer = {"wins": ((0.5, 0.9), (0.1, 0.5))} if reward == "win_rate" else {"scores": (5.0, 2.0)}
    names = tuple(row.rollout_id for row in rows[:2])
    verdict = Judgement(prompt_id="q", candidate_ids=names, judge="hand", state="ok", **answer)
    made = new_pairs([verdict], rows, config, iteration=0)
    blue, cut = rows[0].text, rows[2].text
    assert (blue, cut) in texts_of(made, rows)
    assert not [pair for pair in made.pairs if pair.chosen_id == rows[2].rollout_id]


def test_one_answer_alone_beats_a_response_without_any():
    """No judge is asked where one response has an answer; the pair is there all the same."""
    rows = [row for row in ROWS if row.sample in (2, 3)]
    made = new_pairs([], rows, make_config(), iteration=0)
    assert list(texts_of(made, rows)) == [(rows[0].text, rows[1].text)]


def test_equal_answers_are_one_candidate_counted_as_often_as_it_was_sampled():
    rows = ROWS[:3]
    names = (rows[0].rollout_id, rows[2].rollout_id)
    wins = ((0.5, 1.0), (0.0, 0.5))
    verdict = Judgement(prompt_id="q", candidate_ids=names, judge="hand", state="ok", wins=wins)
    (pair,) = new_pairs([verdict], rows, make_config(), iteration=0).pairs
    assert (pair.chosen_id, pair.rejected_id, pair.weight) == (*names, 2.0)
    shown = make_config(annotation={"show_reasoning": True})
    wins = {(rows[a].text, rows[b].text): 0.75 for a, b in ((0, 1), (0, 2), (1, 2))}
    assert len(made_of(shown, rows, wins=wins).pairs) == 3


def test_a_prefix_that_opens_a_thought_is_shown_without_its_tag():
    prompt = PROMPT.model_copy(update={"assistant_prefix": "Well. <think>\n"})
    rows = [row for row in ROWS if row.sample in (0, 2)]
    (pool,) = pools_of(rows, {"q": prompt}, dropped=Counter())
    assert [candidate.text for candidate in pool.candidates] == ["Well. Blue.", "Well. Red."]
    (pool,) = pools_of(rows, {"q": prompt}, dropped=Counter(), reasoning=True)
    assert pool.candidates[0].text == "Well. <think>\n" + rows[0].text
    assert Players(prompt, 0, {"0": "Blue.", "1": "Red."}).pool().candidates[0].text == "Well. Blue."


def test_points_of_the_data_are_for_all_of_a_text():
    assert make_config(annotation={"kind": "given"}, pairing={"reward": "score"}).annotation.shows_reasoning


def test_who_has_no_answer_loses_on_held_out_prompts():
    players = Players(PROMPT, 0, {"0": "Blue.", "1": "", "2": "Red.", "3": ""})
    pool = players.pool()
    assert [candidate.text for candidate in pool.candidates] == ["Blue.", "Red."]
    wins = ((0.5, 0.8), (0.2, 0.5))
    verdict = Judgement(prompt_id="q", candidate_ids=pool.candidate_ids, judge="hand", state="ok", wins=wins)
    rates = {(row.player, row.opponent): row.preference for row in players.preferences(verdict)}
    assert rates == {
        ("0", "1"): 1.0,
        ("0", "2"): 0.8,
        ("0", "3"): 1.0,
        ("1", "2"): 0.0,
        ("1", "3"): 0.5,
        ("2", "3"): 1.0,
    }
    alone = Players(PROMPT, 0, {"0": "Blue.", "1": ""})
    assert alone.pool() is None
    assert [(row.preference, row.longer) for row in alone.preferences(None)] == [(1.0, 5)]
