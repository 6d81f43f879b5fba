"""Responses from elsewhere, found by the prompt's id or by its words."""

from __future__ import annotations

import json

import pytest

from dno_jax.data.responses import read_responses
from dno_jax.errors import DnoError
from dno_jax.records import Message, Prompt

PROMPTS = [
    Prompt(prompt_id="a", messages=(Message(role="user", content="Why is the sky blue?"),)),
    Prompt(
        prompt_id="b",
        messages=(Message(role="system", content="Be brief."), Message(role="user", content="Name a colour.")),
    ),
]


def read(tmp_path, rows):
    path = tmp_path / "outputs.json"
    path.write_text(json.dumps(rows))
    return read_responses(str(path), PROMPTS, place="evaluation.external.other")


def test_by_id_by_words_and_in_alpaca_evals_form(tmp_path):
    other = {"prompt_id": "elsewhere", "response": "not asked here"}
    assert read(tmp_path, [{"prompt_id": "a", "response": "Scattering."}, other]) == {"a": "Scattering."}
    rows = [
        {"instruction": "why is the sky  blue", "output": "Scattering.", "generator": "other"},
        {"instruction": "Name a colour.", "output": ""},
    ]
    assert read(tmp_path, rows) == {"a": "Scattering.", "b": ""}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt_id": "z", "response": "x"}], "none of its 1 responses"),
        ([{"prompt_id": "a"}], "response or output"),
        ([{"output": "x"}], "prompt or instruction"),
        ([{"prompt_id": "a", "response": 3}], "response or output"),
        ([{"prompt_id": "a", "response": "x"}, {"prompt_id": "a", "response": "y"}], "a second response"),
    ],
)
def test_what_is_no_response(tmp_path, rows, message):
    with pytest.raises(DnoError, match=message):
        read(tmp_path, rows)
