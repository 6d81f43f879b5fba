"""The whole loop with a judge behind real HTTP on loopback, and the ways in which that judge can fail."""

import os
import socket
from pathlib import Path

import pytest

from dno_jax import iteration
from dno_jax.config import RunConfig, TeacherSection, parse_config
from dno_jax.errors import DnoError
from dno_jax.fake_judge import FakeJudge
from dno_jax.records import Judgement, Rollout
from dno_jax.run_dir import RunDir
from tests.configured import deep_merge
from tests.pairs import read_pairs
from tests.small import small_tree, write_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("openai")


def config_for(folder, url, run_dir, **openai):
    changes = {
        "run_dir": str(folder / run_dir),
        "iterations": 1,
        "annotation": {
            "kind": "openai",
            "openai": {"base_url": url, "model": "judge", "api_key_env": None, "timeout": 5.0, **openai},
        },
        "pairing": {"reward": "score", "positive_floor": 3, "margin": 1, "student_margin": 1},
    }
    return parse_config(RunConfig, deep_merge(small_tree(folder), changes), place="test")


def test_the_loop_runs_to_the_end_and_pairs_follow_the_scores(folder):
    with FakeJudge() as server:
        config = config_for(folder, server.url, "plain")
        result = iteration.run(config)
        asked = server.requests
        assert iteration.run(config) == result
        assert server.requests == asked == 12 + 4 * 2
        assert server.duplicates == 0
    run_dir = RunDir(config.run_dir)
    judgements = {row.prompt_id: row for row in run_dir.stage("annotate", 0).read(Judgement)}
    assert len(judgements) == 12
    pairs = read_pairs(run_dir.stage("pair", 0))
    assert {pair.kind for pair in pairs} & {"student>student", "student>gold", "gold>student"}
    for pair in pairs:
        judgement = judgements[pair.prompt_id]
        scores = dict(zip(judgement.candidate_ids, judgement.scores, strict=True))
        assert (pair.chosen_reward, pair.rejected_reward) == (scores[pair.chosen_id], scores[pair.rejected_id])
    assert run_dir.stage("evaluate", 0).require().details["win_rates"]["0"]["comparisons"] == 8


def test_faults_leave_a_run_that_goes_on_to_the_same_labels(folder, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.01)
    with FakeJudge() as server:
        expected = config_for(folder, server.url, "faultless")
        iteration.run(expected)
    with FakeJudge(fraction=0.5, faults=("500", "garbage", "wrong_ids", "close"), seed=1) as server:
        config = config_for(folder, server.url, "faulty", max_tries=1)
        refusals: list[str] = []
        for _ in range(40):
            try:
                iteration.run(config)
                break
            except DnoError as error:
                refusals.append(str(error))
        else:
            pytest.fail(f"never finished: {refusals[-1]}")
        assert refusals
        for refusal in refusals:
            assert "no verdict" in refusal or "does not take a request" in refusal, refusal
        assert server.duplicates == 0
    labels = [
        sorted((p.chosen_id, p.rejected_id) for p in read_pairs(RunDir(c.run_dir).stage("pair", 0)))
        for c in (expected, config)
    ]
    assert labels[0] == labels[1]


def test_a_tolerated_share_of_failures_is_dropped_and_counted(folder, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.01)
    with FakeJudge(fraction=0.3, faults=("refusal",), seed=2) as server:
        base = config_for(folder, server.url, "tolerant")
        config = base.model_copy(update={"annotation": base.annotation.model_copy(update={"max_failed": 0.9})})
        iteration.run(config)
    run_dir = RunDir(config.run_dir)
    states = [row.state for row in run_dir.stage("annotate", 0).read(Judgement)]
    refused = states.count("refused")
    assert 0 < refused < 12
    assert run_dir.stage("annotate", 0).require().dropped["verdict refused"] == refused
    assert run_dir.stage("pair", 0).require().dropped["verdict refused"] == refused
    named = {pair.prompt_id for pair in read_pairs(run_dir.stage("pair", 0))}
    assert not named & {row.prompt_id for row in run_dir.stage("annotate", 0).read(Judgement) if row.state != "ok"}


def test_a_missing_key_stops_before_anything_is_written(folder, monkeypatch):
    monkeypatch.delenv("DNO_TEST_KEY", raising=False)
    config = config_for(folder, "http://127.0.0.1:9/v1", "keyless", api_key_env="DNO_TEST_KEY")
    with pytest.raises(DnoError, match="DNO_TEST_KEY"):
        iteration.run(config)
    assert not os.path.exists(config.run_dir)


def test_an_unreachable_judge_is_named_and_the_samples_are_kept(folder, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.01)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    config = config_for(folder, f"http://127.0.0.1:{port}/v1", "unreachable", max_tries=2)
    with pytest.raises(DnoError, match=str(port)):
        iteration.run(config)
    run_dir = RunDir(config.run_dir)
    assert run_dir.stage("sample", 0).manifest() is not None
    assert run_dir.stage("annotate", 0).shard_names() == []
    with FakeJudge(port=port) as server:  # the judge comes back: the same command goes on
        iteration.run(config)
        assert server.duplicates == 0


def test_the_key_reaches_no_file_though_the_server_tells_it(folder, monkeypatch, capfd):
    secret = "sk-test-0123456789abcdef-do-not-keep"
    monkeypatch.setenv("DNO_TEST_KEY", secret)
    with FakeJudge(api_key=secret, echoes_key=True) as server:
        config = config_for(folder, server.url, "keyed", api_key_env="DNO_TEST_KEY")
        config = config.model_copy(update={"report": config.report.model_copy(update={"tensorboard": True})})
        iteration.run(config)
    files = [path for path in Path(config.run_dir).rglob("*") if path.is_file()]
    assert {"annotations.sqlite", "receipts.json", "tensorboard"} <= {
        path.relative_to(config.run_dir).parts[0] for path in files
    }
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in "".join(capfd.readouterr())


def test_a_teacher_writes_the_gold_that_students_are_compared_with(folder):
    with FakeJudge() as server:
        config = config_for(folder, server.url, "taught")
        write_prompts(folder / "without_gold.jsonl", 12, gold=False)
        prompts = config.prompts.model_copy(update={"path": str(folder / "without_gold.jsonl")})
        teacher = TeacherSection(model="teacher", base_url=server.url, api_key_env=None)
        annotation = config.annotation.model_copy(update={"teacher": teacher})
        config = config.model_copy(update={"prompts": prompts, "annotation": annotation})
        iteration.run(config)
    run_dir = RunDir(config.run_dir)
    gold = [row for row in run_dir.stage("sample", 0).read(Rollout) if row.source == "gold"]
    assert len(gold) == run_dir.stage("teach", 0).require().rows == 12
    assert any("gold" in row.kind for row in read_pairs(run_dir.stage("pair", 0)))
