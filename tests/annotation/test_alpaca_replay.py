"""The recorded verdicts of AlpacaEval 2.0's judge, read by ours: the same preferences, to the last digit kept."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter

import pytest

from dno_jax.annotation.judges.functions import PairWise
from dno_jax.annotation.judges.replies import read_tokens
from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.annotation.question import Reply
from dno_jax.config import OpenAISection
from dno_jax.data.pools import distinct_candidates, pools_of
from dno_jax.records import Message, Prompt, Rollout
from tests.annotation.planted import shown_by

# Recorded with log-probabilities; the other models' rows have preferences only.
MODELS = ("OpenHermes-2.5-Mistral-7B", "alpaca-7b", "claude-2.1", "gemma-7b-it", "gpt4_0613_concise", "vicuna-7b-v1.5")


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "alpaca_eval"


@pytest.fixture(scope="module")
def prompts(folder):
    return {row["index"]: row for row in rows(folder / "prompts.jsonl.gz")}


def is_swapped(instruction: str) -> bool:
    """AlpacaEval's rule: whether the model's output was shown first, the reference's second."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True], k=1)[0]


@pytest.mark.parametrize("model", MODELS)
def test_every_recorded_preference_comes_out(folder, prompts, model):
    outputs = {row["index"]: row["output"] for row in rows(folder / "outputs" / f"{model}.jsonl.gz")}
    function = PairWise(OpenAISection(form="logprob"), seed=0)
    replayed, orders = 0, Counter()
    for row in rows(folder / "annotations" / f"{model}.jsonl.gz"):
        if row["top_logprobs"] is None:
            continue
        prompt = prompts[row["index"]]
        pool = Pool(
            Prompt(prompt_id=str(row["index"]), messages=(Message(role="user", content=prompt["instruction"]),)),
            (Candidate("reference", prompt["reference"]), Candidate("model", outputs[row["index"]])),
        )
        order = (1, 0) if is_swapped(prompt["instruction"]) else (0, 1)
        question = function.question(pool, order=order)
        if replayed < 20:
            texts = [pool.candidates[index].text for index in order]
            assert shown_by(question) == (prompt["instruction"], texts)
        scores = question.read(Reply(text=None, finish="length", first_logprobs=dict(row["top_logprobs"])))
        of_model = scores[order.index(1)]
        assert 1.0 + of_model == pytest.approx(row["preference"], abs=1e-9, rel=0)
        replayed, orders[order] = replayed + 1, orders[order] + 1
    assert replayed > 780
    assert min(orders.values()) > 300  # both orders were recorded, so a rule that never swaps would fail


def test_the_swap_rule_cannot_be_left_out(folder, prompts):
    """Without it, half of the recorded preferences would be turned round."""
    wrong = 0
    for row in rows(folder / "annotations" / "vicuna-7b-v1.5.jsonl.gz"):
        if row["top_logprobs"] is not None:
            wrong += abs(1.0 + read_tokens(dict(row["top_logprobs"]), tokens=("m", "M"))[1] - row["preference"]) > 1e-3
    assert wrong > 300


@pytest.mark.parametrize("model", MODELS)
def test_identical_outputs_tie_without_a_call(folder, prompts, model):
    """AlpacaEval records 1.5 for them and asks nobody; our stage shows equal texts to no judge either."""
    outputs = {row["index"]: row["output"] for row in rows(folder / "outputs" / f"{model}.jsonl.gz")}
    for row in rows(folder / "annotations" / f"{model}.jsonl.gz"):
        texts = prompts[row["index"]]["reference"], outputs[row["index"]]
        recorded_without_a_call = row["top_logprobs"] is None
        assert recorded_without_a_call == (texts[0] == texts[1])
        if recorded_without_a_call:
            assert row["preference"] == 1.5


def test_our_stage_asks_nobody_about_equal_texts():
    def rollout(sample, text):
        return Rollout(
            rollout_id=f"0/p/{sample}", prompt_id="p", sample=sample, source="policy", policy=0, text=text,
            token_ids=(1,), prompt_token_ids=(1,), logprob=0.0, finish="stop",
        )  # fmt: skip

    same = [rollout(0, "Just so."), rollout(1, "Just so.\n")]
    prompt = Prompt(prompt_id="p", messages=(Message(role="user", content="How?"),))
    dropped: Counter[str] = Counter()
    assert pools_of(same, {"p": prompt}, dropped=dropped) == []
    assert dropped["duplicate response"] == 1
    assert len(distinct_candidates([*same, rollout(2, "Otherwise.")], dropped=Counter())) == 2
