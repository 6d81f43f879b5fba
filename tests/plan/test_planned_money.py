"""What `dno plan` says of judges against what a run asks, and the limit that all of a run's stages keep together."""

from __future__ import annotations

import json
from functools import partial

import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.data.prompts import TokenizedPrompt, split_prompts
from dno_jax.errors import DnoError
from dno_jax.fake_judge import FakeJudge
from dno_jax.files import write_atomically
from dno_jax.plan.annotation import plan_annotation
from dno_jax.records import Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.stages import annotate, evaluate, teach
from dno_jax.stages.sample import _Previous
from tests.running import run_stage
from tests.stages.judged import judged_tree, paid

PAIRWISE = {"form": "pairwise"}


def config_of(folder, url, **changes) -> RunConfig:
    rows = [{"prompt_id": f"p{number:02d}", "prompt": f"Question {number}?"} for number in range(12)]
    rows[0]["gold"] = "The data's own."
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes["prompts"] = {"held_out": 3} | changes.get("prompts", {})
    tree = judged_tree(folder, url, iterations=2, sampling={"num_samples": 3}, **changes)
    return parse_config(RunConfig, tree, place="test")


def written(prompt: Prompt, sample: int, *, policy: int, text: str | None = None) -> Rollout:
    return Rollout(
        rollout_id=f"{policy:03d}/{prompt.prompt_id}/{sample if text is None else 'gold'}",
        prompt_id=prompt.prompt_id,
        sample=sample,
        source="policy" if text is None else "gold",
        policy=policy if text is None else None,
        text=text or f"answer {sample} of {policy} q=0.{policy}{sample}",
        token_ids=(5, 6, 2),
        prompt_token_ids=(1,),
        logprob=-1.0 if text is None else None,
        finish="stop",
    )


def sample(config: RunConfig, iteration: int) -> None:
    """Three students' responses to every prompt, and the gold one."""
    stage = RunDir(config.run_dir).stage("sample", iteration)
    gold = teach.taught(config, RunDir(config.run_dir), iteration=iteration)
    prompts = [gold.add(prompt) for prompt in split_prompts(config).training[iteration]]
    previous, rows = _Previous(RunDir(config.run_dir), config, iteration), []
    for prompt in prompts:
        rows += [written(prompt, number, policy=iteration) for number in range(3)]
        rows += [written(prompt, -1, policy=iteration, text=prompt.gold)] if prompt.gold else []
        rows += previous.read("0000000", prompt.prompt_id)
    stage.write_shard("0000000", rows)
    lines = "".join(prompt.model_dump_json() + "\n" for prompt in prompts)
    write_atomically(RunDir(config.run_dir).prompts_path(iteration), lines)
    stage.finish(config, inputs={}, rows=len(rows), seconds=0.0)


def judge_held_out(config: RunConfig, iteration: int) -> None:
    run_dir = RunDir(config.run_dir)
    held_out = split_prompts(config).held_out
    if config.annotation.teacher:
        held_out = tuple(map(teach.taught(config, run_dir, iteration=None).add, held_out))
    for policy in (0, 1) if iteration == 0 else (iteration + 1,):
        rows = [written(prompt, number, policy=policy) for prompt in held_out for number in range(2)]
        evaluate.rollouts_of(run_dir, policy, 0, 2).write_shard("0000000", rows)
    evaluate._judge(config, run_dir, held_out, stage=run_dir.stage("evaluate", iteration), newest=iteration + 1)


@pytest.mark.parametrize("form", ["pairwise", "listwise"])
def test_a_plan_counts_what_a_run_asks_with_a_teacher_and_labelled_pairs(tmp_path, form):
    labels = [{"prompt": f"q{i}", "first": "good q=0.9", "second": "bad q=0.1", "preference": 1.0} for i in range(5)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    with FakeJudge(prefers="longest") as server:
        quality = {"calibration": str(tmp_path / "labels.jsonl"), "calibration_pairs": 4}
        teacher = {"model": "teacher", "base_url": server.url, "api_key_env": None, "max_tokens": 200}
        config = config_of(
            tmp_path,
            server.url,
            annotation={"openai": {"form": form}, "quality": quality, "teacher": teacher},
            evaluation={"num_samples": 2},
        )
        plan = plan_annotation(
            config,
            split=split_prompts(config),
            tokenize=lambda part: [TokenizedPrompt(prompt=prompt, token_ids=(1,)) for prompt in part],
            count=lambda text: len(text.split()),
        )
        asked: dict[str, int] = {}

        def counted(name: str, stage, iteration: int) -> None:
            before = server.counts.answered.total()
            stage(config, iteration)
            asked[name] = asked.get(name, 0) + server.counts.answered.total() - before

        for iteration in (0, 1):
            counted("teacher", partial(run_stage, teach), iteration)
            sample(config, iteration)
            counted(f"iteration {iteration}", partial(run_stage, annotate), iteration)
            counted("held out", judge_held_out, iteration)
        assert server.duplicates == 0
    planned = {name: estimate.total.requests for name, estimate in plan.parts.items()}
    asked["iteration 0"] -= planned["labelled pairs"]  # asked about with the first pools, and never again
    assert planned.pop("labelled pairs") == 4 * (2 if form == "pairwise" else 1)
    assert planned == asked


@pytest.mark.parametrize("openai", [PAIRWISE, PAIRWISE | {"both_orders": False}, {"form": "listwise"}], ids=str)
def test_meeting_the_policy_before_is_priced_and_its_own_verdicts_are_not_bought_again(tmp_path, openai):
    with FakeJudge(prefers="longest") as server:
        config = config_of(
            tmp_path,
            server.url,
            annotation={"openai": openai | {"timeout": 120.0}},
            prompts={"split": "shared", "held_out": 9},
            pairing={"reward": "win_rate", "opponents": "policy", "rule": "all"},
            outer={"scheme": "optimistic"},
        )
        if not openai.get("both_orders", True):  # a teacher's response has another id in each iteration: another order
            path = tmp_path / "prompts.jsonl"
            path.write_text(path.read_text().replace(', "gold": "The data\'s own."', ""))
        split = split_prompts(config)
        plan = plan_annotation(
            config,
            split=split,
            tokenize=lambda part: [TokenizedPrompt(prompt=prompt, token_ids=(1,)) for prompt in part],
            count=lambda text: len(text.split()),
        )
        asked = {}
        for iteration in (0, 1):
            sample(config, iteration)
            before = server.counts.answered.total()
            run_stage(annotate, config, iteration)
            asked[f"iteration {iteration}"] = server.counts.answered.total() - before
        assert server.duplicates == 0
    assert {name: plan.parts[name].total.requests for name in asked} == asked
    # Of 6 responses, a gold one besides, 3 pairs met before, or 6: 12 of 15 are new, 15 of 21.
    new = sum(15 if prompt.gold else 12 for prompt in split.training[1])
    per_pair = 1 + openai.get("both_orders", True)
    assert asked["iteration 1"] == (3 if openai["form"] == "listwise" else new * per_pair)


def test_a_response_is_planned_as_long_as_its_prompt_leaves_room_for(tmp_path):
    teacher = {"model": "teacher", "base_url": "http://127.0.0.1:9/v1", "api_key_env": None, "max_tokens": 50}
    config = config_of(tmp_path, "http://127.0.0.1:9/v1", annotation={"teacher": teacher})

    def planned(total: int | None, response_tokens: int | None = None):
        sampling = config.sampling.model_copy(update={"max_new_tokens": 16, "max_total_tokens": total})
        changed = config.model_copy(update={"sampling": sampling})
        return plan_annotation(
            changed,
            split=split_prompts(changed),
            tokenize=lambda part: [TokenizedPrompt(prompt=prompt, token_ids=(1,) * 10) for prompt in part],
            count=lambda text: len(text.split()),
            response_tokens=response_tokens,
        )

    for iteration in ("iteration 0", "iteration 1"):
        assert planned(20).parts[iteration] == planned(None, response_tokens=10).parts[iteration]
        assert planned(40).parts[iteration] == planned(None).parts[iteration] != planned(20).parts[iteration]


def test_the_alternatives_of_an_ensemble_are_asked_of_all_its_judges(tmp_path):
    judges = [{"model": name, "api_key_env": None, **PAIRWISE} for name in ("one", "two")]
    config = config_of(tmp_path, "http://127.0.0.1:9/v1", annotation={"kind": "ensemble", "ensemble": judges})
    plan = plan_annotation(
        config,
        split=split_prompts(config),
        tokenize=lambda part: [TokenizedPrompt(prompt=prompt, token_ids=(1,)) for prompt in part],
        count=lambda text: len(text.split()),
    )
    training = sum(estimate.total.requests for name, estimate in plan.parts.items() if name.startswith("iteration"))
    assert plan.others["pairwise, all pairs"].total.requests == training


def test_held_out_verdicts_stop_at_the_runs_limit_whatever_share_may_fail(tmp_path):
    prices = {"judge": {"input": 1000.0, "output": 1000.0}, "other": {"input": 1000.0, "output": 1000.0}}
    with FakeJudge(prefers="longest") as server:
        other = {"model": "other", "base_url": server.url, "api_key_env": None, "max_tokens": 256}
        config = config_of(
            tmp_path,
            server.url,
            annotation={"openai": {"max_tokens": 256}, "prices": prices, "max_usd": 6.0},
            evaluation={
                "num_samples": 2,
                "annotation": {"kind": "openai", "openai": other | PAIRWISE, "max_failed": 1.0},
            },
        )
        with pytest.raises(DnoError, match=r"max_usd=6 leaves no room.*pools have no verdict yet\. Raise annotation"):
            judge_held_out(config, 0)
        receipt = paid(config)
        assert server.requests > 0
        assert receipt["usd"] <= receipt["max_usd"] == 6.0
        assert receipt["models"].keys() == {"other"}
        assert receipt["models"]["other"]["price"]["input"] == 1000.0
        # what it has spent is gone for the training prompts, too
        sample(config, 0)
        with pytest.raises(DnoError, match="max_usd=6 leaves no room"):
            run_stage(annotate, config, 0)
        assert paid(config)["usd"] <= 6.0


@pytest.mark.parametrize("field", [{"max_usd": 0.0}, {"prices": {"m": {"input": 1, "output": 1}}}, {"store": "s"}])
def test_a_run_has_one_purse(tmp_path, field):
    with pytest.raises(
        DnoError, match=rf"evaluation\.annotation\.{next(iter(field))}: a run has one .*give annotation"
    ):
        config_of(tmp_path, "http://127.0.0.1:9/v1", evaluation={"annotation": {"kind": "oracle", **field}})


def test_what_the_runs_limit_covers_needs_a_price_in_evaluation_too(tmp_path):
    judge = {"kind": "openai", "openai": {"model": "other", "api_key_env": None}}
    with pytest.raises(DnoError, match=r"annotation\.prices has no 'other'"):
        config_of(
            tmp_path,
            "http://127.0.0.1:9/v1",
            annotation={"kind": "oracle", "max_usd": 1.0},
            evaluation={"annotation": judge},
        )
