"""Evaluation with everything in it: a guard, responses from elsewhere, the teacher and three policies."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dno_jax import iteration
from dno_jax.config import RunConfig, parse_config
from dno_jax.data.prompts import load_prompts
from dno_jax.errors import DnoError
from dno_jax.run_dir import RunDir
from dno_jax.stages import evaluate
from dno_jax.stages.suite import Wanted
from dno_jax.stages.suites import sample
from tests.configured import deep_merge
from tests.running import run_stage
from tests.small import small_tree

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; tests read it, and add what no other reads."""
    folder = tmp_path_factory.mktemp("measured")
    tree = small_tree(folder)
    held_out = load_prompts(str(folder / "held_out.jsonl"))
    rows = [{"prompt_id": prompt.prompt_id, "response": f"bas des {prompt.prompt_id}"} for prompt in held_out[:3]]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    guard = [{"question": f"des dot {word}", "answer": word} for word in ("bas", "des", "dot", "bam")]
    (folder / "guard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in guard))
    evaluation = {
        "external": {"other": str(folder / "other.jsonl")},
        "guard": {"path": str(folder / "guard.jsonl"), "num_samples": 2},
    }
    config = parse_config(RunConfig, deep_merge(tree, {"evaluation": evaluation}), place="test")
    iteration.run(config)
    return config, folder


def test_everybody_is_compared_with_everybody(finished):
    config, _ = finished
    manifest = RunDir(config.run_dir).stage("evaluate", 1).require()
    found = manifest.details["comparison"]
    assert found["players"] == ["0", "1", "2", "gold", "other"]
    rates = np.asarray(found["rates"], np.float64)
    np.testing.assert_allclose(rates + rates.T, 1.0, atol=2e-4)
    assert manifest.dropped == {"held-out prompt without a response of other": 1}
    (pair,) = [pair for pair in found["pairs"] if (pair["player"], pair["opponent"]) == ("2", "other")]
    assert (pair["n"], pair["prompts"]) == (6, 3)
    assert manifest.details["win_rates"]["other"]["rate"] == pytest.approx(rates[2, 4], abs=1e-4)
    assert [one["player"] for one in found["neighbours"]] == ["1", "2"]
    assert any(sentence.startswith("4 held-out prompts") for sentence in manifest.details["warnings"])


def test_every_policy_answers_the_guards_questions_once(finished):
    config, _ = finished
    guard = RunDir(config.run_dir).stage("evaluate", 1).require().details["guard"]
    assert guard["questions"] == 4
    assert set(guard["accuracy"]) == {"0", "1", "2"}
    assert guard["accuracy"]["2"]["n"] == 8


def test_a_redone_evaluation_draws_nothing_again(finished):
    config, _ = finished
    run_dir = RunDir(config.run_dir)
    before = run_dir.stage("evaluate", 1).require()
    changed = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"num_samples": 1})})
    after = run_stage(evaluate, changed, 1)
    assert after.details["guard"] == before.details["guard"]
    drawn = {name: digest for name, digest in before.outputs.items() if not name.startswith("judgements/")}
    assert {name: after.outputs[name] for name in drawn} == drawn
    assert run_stage(evaluate, config, 1).details["matrix"] == before.details["matrix"]


def test_a_guard_that_is_trained_on_is_refused(finished):
    config, folder = finished
    trained = load_prompts(str(folder / "prompts.jsonl"))[0].messages[-1].content
    (folder / "leak.jsonl").write_text(json.dumps({"question": trained, "answer": "bas"}) + "\n")
    guard = config.evaluation.guard.model_copy(update={"path": str(folder / "leak.jsonl"), "num_samples": 3})
    section = config.evaluation.model_copy(update={"guard": guard, "num_samples": 1})
    with pytest.raises(DnoError, match="is also in the prompts"):
        run_stage(evaluate, config.model_copy(update={"evaluation": section}), 1)


def test_a_policy_answers_a_suite(finished):
    config, folder = finished
    rows = [{"instruction": f"bas des {word}", "output": word} for word in ("dot", "bam")]
    (folder / "suite.json").write_text(json.dumps(rows))
    made = sample(config, Wanted("alpaca_eval", str(folder / "suite.json"), policy=0))
    outputs = json.loads((made / "model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in rows]
    assert all(isinstance(row["output"], str) for row in outputs)
