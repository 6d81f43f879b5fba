"""The annotate stage by itself.

It follows shards as they close, shows a judge what it should see, and never waits in vain.
"""

import asyncio
import threading
import time
from collections import Counter

import pytest

from dno_jax.annotation.embedded import OracleAnnotator
from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.records import Judgement, Message, Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.stages import annotate
from tests.running import run_stage

WORDS = ["bam", "dom", "fen", "gat", "kos", "lem", "bes", "dan"]


def rollout(prompt_id, sample, text, *, gold=False):
    return Rollout(
        rollout_id=f"000/{prompt_id}/{'gold' if gold else sample}",
        prompt_id=prompt_id,
        sample=-1 if gold else sample,
        source="gold" if gold else "policy",
        policy=None if gold else 0,
        text=text,
        token_ids=(1, 2),
        prompt_token_ids=(1,),
        logprob=None if gold else -1.0,
        finish="stop",
    )


@pytest.fixture
def sampled(make_config):
    """A run directory with four prompts and no rollouts yet."""
    config = make_config(iterations=1)
    run_dir = RunDir(config.run_dir)
    prompts = [
        Prompt(prompt_id=f"p{i}", messages=(Message(role="user", content=" ".join(WORDS[i : i + 3])),))
        for i in range(4)
    ]
    write_atomically(run_dir.prompts_path(0), "".join(prompt.model_dump_json() + "\n" for prompt in prompts))
    return config, run_dir


def rows(prompt_id, seed):
    return [rollout(prompt_id, k, " ".join(WORDS[(seed + k) % 8 :][:4])) for k in range(4)]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.02)


def test_shards_are_judged_while_sampling_goes_on(sampled):
    config, run_dir = sampled
    source, stage, errors = run_dir.stage("sample", 0), run_dir.stage("annotate", 0), []

    def work():
        try:
            run_stage(annotate, config, 0)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for index in range(4):
        source.write_shard(f"{index:07d}", rows(f"p{index}", index))
        wait_for(lambda done=index + 1: len(stage.shard_names()) == done or errors)  # before the next one is sampled
    assert stage.manifest() is None
    source.finish(config, inputs={}, rows=16, seconds=0.0)
    thread.join(60)
    assert not errors
    assert stage.require().rows == 4
    assert [row.prompt_id for row in stage.read(Judgement)] == ["p0", "p1", "p2", "p3"]


def judge_one_shard(config, run_dir):
    """Call the stage, and have sampling fail when one shard is judged."""
    with pytest.raises(DnoError, match="sampling stopped before it was finished"):
        run_stage(annotate, config, 0, abandoned=lambda: bool(run_dir.stage("annotate", 0).shard_names()))


def test_says_what_it_waits_for(sampled, monkeypatch):
    config, run_dir = sampled
    source = run_dir.stage("sample", 0)
    source.write_shard("0000000", rows("p0", 0))
    said = []

    class Reminder:
        def __call__(self, message):
            said.append(message)
            source.finish(config, inputs={}, rows=4, seconds=0.0)

    monkeypatch.setattr(annotate, "Reminder", Reminder)
    assert run_stage(annotate, config, 0).rows == 1
    (message,) = said
    assert "1 shards are judged; waiting for more" in message
    assert str(source.path) in message


def test_the_meter_reaches_its_total_after_a_restart(sampled, capfd):
    config, run_dir = sampled
    source = run_dir.stage("sample", 0)
    source.write_shard("0000000", rows("p0", 0))
    judge_one_shard(config, run_dir)
    source.write_shard("0000001", [rollout("p1", 0, "bam"), rollout("p1", 1, "dom"), rollout("p2", 0, "alone")])
    source.finish(config, inputs={}, rows=7, seconds=0.0)
    capfd.readouterr()
    run_stage(annotate, config, 0)
    assert "annotate  0: 2/2 pools" in capfd.readouterr().err


def test_what_runs_beside_a_failure_comes_to_its_end_first():
    ended = []

    async def fails():
        raise DnoError("first")

    async def goes_on():
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ended.append(True)

    with pytest.raises(DnoError, match="first"):
        asyncio.run(annotate.all_of(fails(), goes_on()))
    assert ended


def test_stops_when_sampling_has_failed_and_keeps_what_it_has(sampled):
    config, run_dir = sampled
    run_dir.stage("sample", 0).write_shard("0000000", rows("p0", 0))
    judge_one_shard(config, run_dir)
    assert run_dir.stage("annotate", 0).shard_names() == ["0000000"]
    assert run_dir.stage("annotate", 0).manifest() is None


def test_empty_and_repeated_responses_are_not_shown_and_are_counted(sampled):
    config, run_dir = sampled
    source = run_dir.stage("sample", 0)
    source.write_shard(
        "0000000",
        [
            rollout("p0", 0, "bam dom"),
            rollout("p0", 1, " bam dom "),
            rollout("p0", 2, "  "),
            rollout("p0", 3, "fen gat"),
            rollout("p0", -1, "fen gat", gold=True),
            *(rollout("p1", k, "kos") for k in range(4)),  # a greedy sampler's pool
        ],
    )
    source.finish(config, inputs={}, rows=9, seconds=0.0)
    manifest = run_stage(annotate, config, 0)
    judgements = list(run_dir.stage("annotate", 0).read(Judgement))
    assert [row.candidate_ids for row in judgements] == [("000/p0/gold", "000/p0/0")]
    assert Counter(manifest.dropped) == Counter(
        {"duplicate response": 5, "empty response": 1, "fewer than two distinct candidates": 1}
    )


def test_drops_are_counted_over_a_restart(sampled):
    config, run_dir = sampled
    source = run_dir.stage("sample", 0)
    source.write_shard("0000000", [rollout("p0", k, text) for k, text in enumerate(["bam", "bam", "dom"])])
    judge_one_shard(config, run_dir)
    source.write_shard("0000001", [rollout("p1", k, text) for k, text in enumerate(["fen", "", "dom"])])
    source.finish(config, inputs={}, rows=6, seconds=0.0)
    assert run_stage(annotate, config, 0).dropped == {"duplicate response": 1, "empty response": 1}


def test_a_second_call_judges_nothing_again(sampled, monkeypatch):
    config, run_dir = sampled
    source = run_dir.stage("sample", 0)
    source.write_shard("0000000", rows("p0", 0))
    source.finish(config, inputs={}, rows=4, seconds=0.0)
    first = run_stage(annotate, config, 0)

    def forbidden(*_args, **_kwargs):
        raise AssertionError("asked again")

    monkeypatch.setattr(annotate, "build_annotator", forbidden)
    assert run_stage(annotate, config, 0) == first


def test_one_iteration_has_one_judge(sampled, monkeypatch):
    """A rubric that was edited between two calls: shards of the old one are judged anew, those of the new one stay."""
    config, run_dir = sampled
    source, stage = run_dir.stage("sample", 0), run_dir.stage("annotate", 0)
    source.write_shard("0000000", rows("p0", 0))
    judge_one_shard(config, run_dir)
    (before,) = {row.judge for row in stage.read(Judgement)}
    monkeypatch.setattr(OracleAnnotator, "identity", property(lambda self: "an edited rubric"))
    source.write_shard("0000001", rows("p1", 3))
    source.finish(config, inputs={}, rows=8, seconds=0.0)
    manifest = run_stage(annotate, config, 0)
    judges = Counter(row.judge for row in stage.read(Judgement))
    assert judges == {manifest.details["judge"]: 2}
    assert before not in judges


def test_another_judge_than_the_last_iterations_is_told(sampled, capsys):
    """A rubric's file may have been edited: the configuration only names it."""
    config, run_dir = sampled
    run_dir.stage("annotate", 0).finish(config, inputs={}, rows=0, seconds=0.0, details={"judge": "rubric=#1"})
    annotate._tell_another_judge(run_dir, 1, identity="rubric=#1")
    annotate._tell_another_judge(run_dir, 0, identity="rubric=#2")
    assert not capsys.readouterr().err
    annotate._tell_another_judge(run_dir, 1, identity="rubric=#2")
    assert "another judge than the one before it: rubric=#2, not rubric=#1" in " ".join(capsys.readouterr().err.split())
