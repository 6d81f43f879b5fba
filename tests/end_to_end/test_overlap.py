"""Sampling and annotation side by side, or on two machines: who waits for whom, who stops whom, and what is kept.

The sampler is played: it needs no model.
"""

import signal
import sys
import threading
import time

import pytest
import yaml

from dno_jax.annotation.transport.routes import Unreachable
from dno_jax.cli import main as cli
from dno_jax.errors import DnoError
from dno_jax.fake_judge import FakeJudge
from dno_jax.records import Judgement
from dno_jax.run_dir import RunDir
from dno_jax.stages import annotate, overlap
from tests.running import idle_runtime, run_stage
from tests.stages.judged import judged_tree, sampled_run

LIST_WISE = {"pairing": {"reward": "score"}}


@pytest.fixture
def play(monkeypatch):
    """Have a function stand in for sampling. Its shards are there; its manifest is written when it returns."""

    def install(config, sampler):
        manifest = RunDir(config.run_dir).stage("sample", 0).manifest_path
        text = manifest.read_text()
        manifest.unlink()

        def run(*_args, after_shard):
            sampler(after_shard)
            manifest.write_text(text)

        monkeypatch.setattr(overlap.sample, "run", run)

    return install


def test_a_refused_key_stops_before_anything_is_sampled(tmp_path, play):
    sampled = []
    with FakeJudge(prefers="marker", api_key="another") as server:
        config = sampled_run(tmp_path, server.url, prompts=4, **LIST_WISE)
        play(config, sampled.append)
        with pytest.raises(DnoError, match="HTTP 401"):
            overlap.sample_and_annotate(idle_runtime(config), 0)
    assert not sampled


def test_an_interrupt_while_it_is_waited_for_lets_annotation_end(tmp_path, play, monkeypatch, capfd):
    stored = []

    def annotating(*_args, abandoned, **_kwargs):
        threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        while not abandoned():
            time.sleep(0.01)
        time.sleep(0.5)  # the verdicts in flight
        stored.append(True)

    with FakeJudge(prefers="marker") as server:
        config = sampled_run(tmp_path, server.url, prompts=4, **LIST_WISE)
        play(config, lambda after_shard: None)
        monkeypatch.setattr(annotate, "run", annotating)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            with pytest.raises(KeyboardInterrupt):
                overlap.sample_and_annotate(idle_runtime(config), 0)
        finally:
            signal.signal(signal.SIGINT, before)
    assert stored
    assert "stopping when the verdicts in flight are there" in capfd.readouterr().err


def test_what_stops_the_judge_is_said_at_once_and_stops_sampling(tmp_path, play, monkeypatch, capfd):
    failed = threading.Event()

    def refused(*_args, **_kwargs):
        failed.set()
        raise DnoError("HTTP 401: no such key")

    def sampler(after_shard):
        assert failed.wait(60)
        said = ""
        while "HTTP 401: no such key" not in said:
            said += capfd.readouterr().err
        for _ in range(2):
            after_shard()
        pytest.fail("sampling went on")

    with FakeJudge(prefers="marker") as server:
        config = sampled_run(tmp_path, server.url, prompts=4, **LIST_WISE)
        play(config, sampler)
        monkeypatch.setattr(annotate, "run", refused)
        with pytest.raises(DnoError, match="HTTP 401"):
            overlap.sample_and_annotate(idle_runtime(config), 0)


def test_a_judge_that_comes_back_while_there_is_sampling_is_asked_again(tmp_path, play, monkeypatch, capfd):
    calls, real = [], annotate.run

    def down_at_first(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise Unreachable("the judge is down")
        return real(*args, **kwargs)

    def sampler(_):
        while not RunDir(config.run_dir).stage("annotate", 0).shard_names():
            assert not threading.Event().wait(0.01)

    with FakeJudge(prefers="marker") as server:
        config = sampled_run(tmp_path, server.url, prompts=4, **LIST_WISE)
        play(config, sampler)
        monkeypatch.setattr(overlap, "_OUTAGE_SECONDS", 0.01)
        monkeypatch.setattr(annotate, "run", down_at_first)
        overlap.sample_and_annotate(idle_runtime(config), 0)
    assert len(calls) == 2
    assert "the judge is down; sampling continues" in capfd.readouterr().err


def test_an_interrupt_buys_no_more_and_keeps_what_was_in_flight(tmp_path, play):
    with FakeJudge(prefers="marker", delay=0.2) as server:
        openai = {"max_concurrency": 2}
        config = sampled_run(tmp_path, server.url, prompts=20, annotation={"openai": openai}, **LIST_WISE)

        def interrupted(_):
            while not server.requests:
                threading.Event().wait(0.01)
            raise KeyboardInterrupt

        play(config, interrupted)
        with pytest.raises(KeyboardInterrupt):
            overlap.sample_and_annotate(idle_runtime(config), 0)
        assert 0 < server.requests < 10
        sampled = RunDir(config.run_dir).stage("sample", 0)
        sampled.finish(config, inputs={}, rows=80, seconds=0.0)
        run_stage(annotate, config, 0)
        assert (server.requests, server.duplicates) == (20, 0)


@pytest.fixture
def judged(tmp_path):
    """Iteration 0 of a run, judged by an oracle."""
    config = sampled_run(tmp_path, "http://127.0.0.1:9/v1", prompts=8, annotation={"kind": "oracle"})
    run_stage(annotate, config, 0)
    return config


def test_verdicts_of_another_machine_are_of_these_samples_by_this_judge(judged):
    overlap.wait_for_annotation(idle_runtime(judged), 0)
    oracle = judged.annotation.oracle.model_copy(update={"target_words": 7})
    other = judged.model_copy(update={"annotation": judged.annotation.model_copy(update={"oracle": oracle})})
    with pytest.raises(DnoError, match=r"annotation\.oracle\.target_words: 30 -> 7"):
        overlap.wait_for_annotation(idle_runtime(other), 0)
    RunDir(judged.run_dir).stage("sample", 0).finish(judged, inputs={}, rows=32, seconds=1.0)
    with pytest.raises(DnoError, match=r"made from other inputs .*rollouts/MANIFEST\.json"):
        overlap.wait_for_annotation(idle_runtime(judged), 0)


def test_it_is_said_once_what_is_waited_for(judged, monkeypatch, capfd):
    manifest = RunDir(judged.run_dir).stage("annotate", 0).manifest_path
    text = manifest.read_text()
    manifest.unlink()

    def poll(ready):
        assert not ready()
        assert not ready()
        manifest.write_text(text)
        assert ready()

    monkeypatch.setattr(overlap, "wait_until", poll)
    overlap.wait_for_annotation(idle_runtime(judged), 0)
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("2 of 2 shards are judged; waiting for") == 1
    assert "`dno annotate CONFIG --iteration 0`" in said


def test_the_commands_of_the_host_refuse_another_configuration(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(judged_tree(tmp_path, "http://127.0.0.1:9/v1", annotation={"kind": "oracle"})))

    def dno(*arguments):
        monkeypatch.setattr(sys, "argv", ["dno", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code

    config = sampled_run(tmp_path, "http://127.0.0.1:9/v1", prompts=4, annotation={"kind": "oracle"})
    RunDir(config.run_dir).create(config)
    assert dno("annotate", path, f"annotation.store={tmp_path / 'own.sqlite'}") in (0, None)
    capsys.readouterr()
    for command in ("annotate", "pair"):
        assert dno(command, path, "annotation.oracle.target_words=7") == 2
        assert "annotation.oracle.target_words: 30 -> 7" in capsys.readouterr().err
    assert len(list(RunDir(config.run_dir).stage("annotate", 0).read(Judgement))) == 4
