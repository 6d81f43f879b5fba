"""Where a thought ends: after tags of its own, tags that the prompt opened, and words that only look like them."""

from __future__ import annotations

import pytest

from dno_jax.reasoning import opens_thought, split_thought

GONE = [
    ("<think>\nLight scatters.\n</think>\n\nBlue.", False),
    ("\n <THINK>Light scatters.</Think>Blue.", False),
    ("<think>Light scatters. One writes `</think>` then.</think>Blue.", False),
    ("Light scatters.\n</think>\n\nBlue.", True),
    ("<think>\nLight scatters.</think>Blue.", True),
    ("Light scatters.\n</think>\n\nBlue.", False),  # a server whose template opened it
    ("<think>Light</think>\n<think>scatters.</think> Blue.", False),
    ("<thinking>Light scatters.</thinking>Blue.", False),
    ("<reasoning>Light </think> scatters.</reasoning>Blue.", False),
    ("[THINK]Light scatters.[/THINK]Blue.", False),
    ("◁think▷Light scatters.◁/think▷Blue.", False),
    ("<seed:think>Light scatters.</seed:think>Blue.", False),
    ("<|begin_of_thought|>\nLight scatters.<|end_of_thought|>Blue.", False),
    ("<|channel|>analysis<|message|>Light scatters.<|end|><|start|>assistant<|channel|>final<|message|>Blue.", False),
]


@pytest.mark.parametrize(("text", "opened"), GONE)
def test_an_answer_is_read_without_its_thought(text, opened):
    found = split_thought(text, opened)
    assert (found.answer, found.whole, found.is_answer) == ("Blue.", True, True)
    assert found.thought.startswith("Light")


@pytest.mark.parametrize(
    ("text", "opened"),
    [("Light scat", True), ("<think>Light scat", False), ("<think>a</think><think>Light scat", False), ("", True)],
)
def test_a_text_cut_inside_its_thought_is_no_answer(text, opened):
    found = split_thought(text, opened)
    assert (found.answer, found.whole, found.is_answer) == ("", False, False)
    assert found.thought.endswith("Light scat") or not text


def test_a_thought_that_nothing_follows_is_no_answer():
    assert split_thought("<think>Light scatters.</think>\n\n")[1:] == ("", True)
    assert not split_thought("<think>Light scatters.</think>\n\n").is_answer


@pytest.mark.parametrize(
    "text",
    ["  Blue.\n", "Blue, as <think>I</think> think.", "A tag such as `</think>` ends it.", "a < b, c > d", "", "\n"],
)
def test_words_that_are_no_thought_stay_as_they_are(text):
    assert split_thought(text) == ("", text, True)


def test_a_hostile_text_takes_no_long():
    many = 20_000
    assert split_thought("<think></think>" * many + "Blue.").answer == "Blue."
    assert not split_thought("<think>" * many).whole
    assert split_thought(" " * many + "</think" * many).whole


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|assistant|>\n<think>\n", True),
        ("[/INST][THINK]", True),
        ("<|assistant|>\n<think>\n\n</think>\n\n", False),
        ("<|assistant|>\n", False),
        ("What does <think> do?<|assistant|>", False),
    ],
)
def test_whether_a_prompt_opens_a_thought(prompt, opens):
    assert opens_thought(prompt) == opens
