"""Pairs that somebody has compared: of files, and of a run's own judge; no device takes part."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from dno_jax.data.labelled import read_labelled, read_verdicts
from dno_jax.data.pools import pools_of
from dno_jax.errors import DnoError
from dno_jax.records import Judgement, Message, Prompt, Rollout
from dno_jax.run_dir import RunDir
from tests.stages.judged import sampled_run, worth


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TURN = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("row", "texts", "target"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, ("a", "b"), 1.0),
        ({"chosen": [TURN, {"role": "assistant", "content": "a"}],
          "rejected": [TURN, {"role": "assistant", "content": "b"}]}, ("a", "b"), 1.0),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 5}, ("b", "a"), 1.0),
        ({"instruction": "x", "completions": [{"response": "a", "overall_score": 4}, {"response": "b", "score": 4}]},
         ("a", "b"), 0.5),
        ({"prompt": "x", "assistant_prefix": "Well, ", "candidates": [{"text": "a", "score": 1},
                                                                      {"text": "b", "score": 3}]},
         ("Well, b", "Well, a"), 1.0),
    ],
)  # fmt: skip
def test_pairs_in_other_peoples_forms(tmp_path, row, texts, target):
    found = read_labelled(write(tmp_path / "pairs.jsonl", row))
    (pair,) = found.pairs
    assert (pair.texts, pair.target, pair.weight) == (texts, target, 1.0)
    assert pair.messages == (Message(role="user", content="x"),)
    assert "1 pairs of 1 prompts from 1 rows" in found.line


def test_every_two_responses_with_points_are_a_pair_and_a_prompt_may_come_again(tmp_path):
    given = [{"text": text, "score": score} for text, score in (("a", 1), ("b", 3), ("c", 2), ("d", None))]
    again = {"prompt": "x", "chosen": "e", "rejected": "f"}
    path = write(tmp_path / "pairs.jsonl", {"prompt": "x", "candidates": given}, again, again, {"prompt": "y"})
    found = read_labelled(path, temperature=2.0)
    expected = {("b", "a"): 2.0, ("c", "a"): 1.0, ("b", "c"): 1.0, ("e", "f"): 1.0}
    assert {pair.texts: pair.target for pair in found.pairs} == pytest.approx(
        {texts: 1 / (1 + math.exp(-difference / 2)) for texts, difference in expected.items()}
    )
    assert len(found.pairs) == 5
    assert len({pair.prompt_id for pair in found.pairs}) == 1
    assert "left out: 1 x fewer than two responses with points" in found.line


@pytest.fixture
def judged(tmp_path):
    """A run of two prompts whose judge gives wins, and of which one pool has no verdict; a text comes twice."""
    config = sampled_run(tmp_path / "run", "nowhere", prompts=3)
    run_dir = RunDir(config.run_dir)
    run_dir.create(config)
    sampled, stage = run_dir.stage("sample", 0), run_dir.stage("annotate", 0)
    (shard,) = sampled.shard_names()
    rows = sampled.read_shard(Rollout, shard)
    first = [row for row in rows if row.prompt_id == "p00000"]
    rows.append(first[1].model_copy(update={"rollout_id": "000/p00000/9", "sample": 9}))
    sampled.write_shard(shard, rows)
    sampled.finish(config, inputs={}, rows=len(rows), seconds=0.0)
    prompts = {name: Prompt(prompt_id=name, messages=(Message(role="user", content="?"),))
               for name in ("p00000", "p00001", "p00002")}  # fmt: skip
    verdicts = []
    for pool in pools_of(rows, prompts, dropped=Counter()):
        points = [worth(candidate.text) for candidate in pool.candidates]
        wins = [[1 / (1 + math.exp(b - a)) for b in points] for a in points]
        fields = {"prompt_id": pool.prompt.prompt_id, "candidate_ids": pool.candidate_ids, "judge": "j"}
        if pool.prompt.prompt_id == "p00002":
            verdicts.append(Judgement(**fields, state="failed", detail="nobody answered"))
        else:
            verdicts.append(Judgement(**fields, state="ok", wins=tuple(map(tuple, wins))))
    stage.write_shard(shard, verdicts)
    stage.finish(config, inputs={}, rows=len(verdicts), seconds=0.0)
    return run_dir, first[1].text


def test_the_verdicts_of_a_run_are_read_as_its_judge_gave_them(judged):
    run_dir, twice = judged
    found = read_verdicts(run_dir)
    assert len(found.pairs) == 12  # every two of four texts, of two prompts
    for pair in found.pairs:
        better, worse = map(worth, pair.texts)
        assert better > worse
        assert pair.target == pytest.approx(1 / (1 + math.exp(worse - better)))
        assert pair.weight == (2.0 if twice in pair.texts else 1.0)  # as many pairs of samples
    assert {pair.messages[0].content for pair in found.pairs} == {"Question 0?", "Question 1?"}
    assert found.line.endswith("12 pairs of 2 prompts, iterations 0; left out: 1 x duplicate response, "
                               "1 x pool without a verdict")  # fmt: skip
    assert np.unique([pair.weight for pair in found.pairs]).tolist() == [1.0, 2.0]
    with pytest.raises(DnoError, match=r"iteration 3 is not judged \(judged are 0\)"):
        read_verdicts(run_dir, (3,))


def test_a_run_that_is_not_there_or_not_judged_is_named(tmp_path):
    with pytest.raises(DnoError, match=r"no run directory"):
        read_verdicts(RunDir(str(tmp_path / "gone")))
    config = sampled_run(tmp_path / "run", "nowhere", prompts=1)
    RunDir(config.run_dir).create(config)
    with pytest.raises(DnoError, match=r"0 pairs of 0 prompts.*nothing to train on"):
        read_verdicts(RunDir(config.run_dir))
