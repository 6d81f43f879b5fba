"""The annotate stage with a judge behind real HTTP: what is bought, what is found out about the judge, what is lost."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import statistics
import subprocess
import threading
import time
import traceback
from collections import Counter, defaultdict
from contextlib import closing

import pytest

from dno_jax.annotation.ledger.database import Database
from dno_jax.annotation.ledger.store import VerdictStore
from dno_jax.annotation.quality.warnings import warnings
from dno_jax.config import RunConfig, parse_config
from dno_jax.data.pools import PromptFile
from dno_jax.errors import DnoError
from dno_jax.fake_judge import FakeJudge
from dno_jax.records import Judgement, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.stages import annotate, overlap, pair
from tests.pairs import read_pairs
from tests.running import idle_runtime, run_stage
from tests.stages.judged import judged_tree, paid, sampled_run, worth

PAIRWISE = {"annotation": {"openai": {"form": "pairwise"}}}


def with_annotation(config, **changes):
    return config.model_copy(update={"annotation": config.annotation.model_copy(update=changes)})


def texts_of(config):
    return {row.rollout_id: row.text for row in RunDir(config.run_dir).stage("sample", 0).read(Rollout)}


def stage_pairs(config):
    return read_pairs(RunDir(config.run_dir).stage("pair", 0))


def made_pairs(config):
    run_dir = RunDir(config.run_dir)
    rollouts = list(run_dir.stage("sample", 0).read(Rollout))
    return pair.new_pairs(run_dir.stage("annotate", 0).read(Judgement), rollouts, config, iteration=0)


@pytest.mark.parametrize("form", ["listwise", "pairwise", "logprob"])
def test_every_pair_follows_the_planted_worth(tmp_path, form):
    reward = {"reward": "score"} if form == "listwise" else {}
    with FakeJudge(prefers="marker") as server:
        config = sampled_run(
            tmp_path, server.url, prompts=12, annotation={"openai": {"form": form}}, pairing=reward | {"margin": 0.0}
        )
        manifest = run_stage(annotate, config, 0)
        assert server.duplicates == 0
        assert server.requests == 12 * (1 if form == "listwise" else 2 * 6)
    assert manifest.details["states"] == {"ok": 12}
    texts, made = texts_of(config), made_pairs(config)
    assert len(made.pairs) == 12 * 6
    for found in made.pairs:
        assert worth(texts[found.chosen_id]) > worth(texts[found.rejected_id])


@pytest.mark.parametrize(
    "openai", [{"form": "pairwise"}, {"form": "logprob"}, {"form": "pairwise", "schedule": "tournament"}], ids=str
)
def test_a_judge_that_always_says_first_makes_no_pair_and_is_named(tmp_path, openai):
    with FakeJudge(prefers="marker", first_bias=1.0) as server:
        config = sampled_run(tmp_path, server.url, prompts=12, annotation={"openai": openai})
        figures = run_stage(annotate, config, 0).details["quality"]
    assert figures["first_wins"]["value"] == figures["flip_rate"]["value"] == figures["tie_rate"]["value"] == 1.0
    for row in RunDir(config.run_dir).stage("annotate", 0).read(Judgement):
        assert row.state == "ok"
        assert {win for line in row.wins for win in line} == {0.5}
    with pytest.raises(DnoError, match=r"no pair passed the rules \(dropped: tie"):
        run_stage(pair, config, 0)
    (row,) = RunDir(config.run_dir).read_metrics()
    assert (row["stage"], row["iteration"], row["first_wins"]) == ("annotate", 0, 1.0)
    named = " ".join(warnings(figures, config.annotation.quality))
    assert "max_first_rate_error" in named
    assert "It moves order-flip rate and tie rate too" in named  # a cause has one warning
    manifest = RunDir(config.run_dir).stage("annotate", 0).require()
    assert manifest.details["warnings"] == row["warnings"] == warnings(figures, config.annotation.quality)


@pytest.mark.parametrize(
    ("openai", "bias"),
    [
        # 60 to 40: of each 10 pairs it reads 8
        pytest.param({"form": "pairwise"}, {"first_bias": 0.2}, marks=pytest.mark.soak),
        ({"form": "listwise"}, {"first_bonus": 2.0}),
        # 70 to 30, and nothing cancels it
        pytest.param({"form": "pairwise", "both_orders": False}, {"first_bias": 0.4}, marks=pytest.mark.soak),
        # shifts probabilities, and turns few decisions
        pytest.param({"form": "logprob"}, {"first_bias": 0.2, "noise": 0.5}, marks=pytest.mark.soak),
    ],
    ids=["both orders", "list", "one order", "probabilities"],
)
def test_a_judge_that_likes_the_first_still_finds_the_order_on_average_and_is_named(tmp_path, capfd, openai, bias):
    with FakeJudge(prefers="marker", **bias) as server:
        config = sampled_run(tmp_path, server.url, prompts=160, annotation={"openai": openai})
        figures = run_stage(annotate, config, 0).details["quality"]
    first = figures["first_wins"]
    assert first["low"] > 0.55
    said = " ".join(capfd.readouterr().err.split())
    assert f"P(first shown wins) is {first['value']:.2f}" in said
    assert "the place in the prompt sways the judge" in said
    texts, by_worth = texts_of(config), defaultdict(list)
    for row in RunDir(config.run_dir).stage("annotate", 0).read(Judgement):
        rates = [sum(line) for line in row.wins] if row.scores is None else row.scores
        worths = [worth(texts[name]) for name in row.candidate_ids]
        for planted, rate in zip(worths, rates, strict=True):
            by_worth[planted].append(rate)
        if openai == {"form": "pairwise"}:  # what it leaves unread is right in one order: right or a tie in both
            for i, j in itertools.permutations(range(4), 2):
                assert worths[i] < worths[j] or row.wins[i][j] in (0.5, 1.0)
    means = [statistics.mean(rates) for _, rates in sorted(by_worth.items())]
    assert means == sorted(means)
    assert min(b - a for a, b in itertools.pairwise(means)) > 0.3  # of 1 or more without the bias
    run_stage(pair, config, 0)
    right = [worth(texts[row.chosen_id]) > worth(texts[row.rejected_id]) for row in stage_pairs(config)]
    assert len(right) > 150
    assert sum(right) / len(right) > 0.75


def test_repeats_and_labelled_pairs_measure_the_judge(tmp_path, monkeypatch):
    asked, judge_pools = [], annotate.judge_pools

    async def noted(annotator, pools, **options):
        asked.append([pool.prompt.prompt_id for pool in pools])
        return await judge_pools(annotator, pools, **options)

    monkeypatch.setattr(annotate, "judge_pools", noted)
    labels = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"q{i}", "first": "good q=0.9", "second": "bad q=0.1", "preference": 1.0} for i in range(9)]
    rows.append({"prompt": "wrong", "first": "good q=0.9", "second": "bad q=0.1", "preference": 0.0})
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quality = {"repeat": 0.5, "calibration": str(labels)}
    with FakeJudge(prefers="marker") as server:
        config = sampled_run(tmp_path, server.url, prompts=24, annotation={"quality": quality} | PAIRWISE["annotation"])
        figures = run_stage(annotate, config, 0).details["quality"]
        assert figures["repeat_agreement"]["value"] == 1.0
        again = figures["repeat_agreement"]["prompts"]
        assert 4 <= again <= 20
        assert server.requests == (24 + again) * 12 + 10 * 2
        assert server.duplicates == 0  # a repetition has a seed of its own
        assert set(asked[0]) == {f"calibration/{line}" for line in range(1, 11)}  # before anything else is paid for
    assert figures["calibration_agreement"]["value"] == pytest.approx(0.9)
    assert (figures["calibration_missing"]["value"], figures["calibration_missing"]["n"]) == (0.0, 10)
    assert figures["scores"]["mean"].keys() == {"student", "gold"}


def test_the_run_stops_before_the_call_that_would_pass_the_limit_and_goes_on_when_it_is_raised(tmp_path):
    prices = {"judge": {"input": 1000.0, "output": 1000.0}}
    with FakeJudge(prefers="marker") as server:
        config = sampled_run(
            tmp_path,
            server.url,
            prompts=16,
            annotation={"prices": prices, "max_usd": 6.0, "openai": {"max_tokens": 256}},
            pairing={"reward": "score"},
        )
        with pytest.raises(DnoError, match=r"max_usd=6 leaves no room.*Raise annotation.max_usd"):
            run_stage(annotate, config, 0)
        receipt = paid(config)
        bought = server.requests
        assert 0 < bought < 16
        assert receipt["usd"] <= 6.0
        assert receipt["models"]["judge"]["requests"] == bought + server.counts.forms["probe"]
        assert receipt["models"]["judge"]["tokens_out"] == server.counts.completion_tokens  # the probes' among them
        assert RunDir(config.run_dir).stage("annotate", 0).manifest() is None
        manifest = run_stage(annotate, with_annotation(config, max_usd=1000.0), 0)
        assert manifest.details["states"] == {"ok": 16}
        assert (server.requests, server.duplicates) == (16, 0)


def test_a_full_disk_stops_the_stage_cleanly_and_nothing_is_lost(tmp_path, monkeypatch):
    connect = Database._connect

    def small(database):
        connection = connect(database)
        connection.execute("PRAGMA max_page_count = 9")
        return connection

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with FakeJudge(prefers="marker") as server:
        config = sampled_run(tmp_path, server.url, prompts=40, pairing={"reward": "score"})
        with monkeypatch.context() as patch:
            patch.setattr(Database, "_connect", small)
            patch.setattr(os, "fsync", full)
            with pytest.raises(DnoError, match=r"sqlite: .*full; see to|jsonl?: .*No space left.*; see to"):
                run_stage(annotate, config, 0)
            assert not any(thread.name == "verdict store" for thread in threading.enumerate())  # it is closed
        with closing(VerdictStore(RunDir(config.run_dir).annotations_path)) as store:
            kept = sum(tally.verdicts for tally in store.tallies())
        assert kept < 40
        before = server.requests
        assert run_stage(annotate, config, 0).details["states"] == {"ok": 40}
        assert server.requests - before == 40 - kept


def test_a_disk_that_fills_up_costs_no_more_than_what_is_in_flight(tmp_path):
    """A disk of its own, as small as a mount allows."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], check=False, capture_output=True)
    if mount.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with FakeJudge(prefers="marker", delay=0.2) as server:
            config = sampled_run(disk, server.url, prompts=400, pairing={"reward": "score"})
            filled = disk / "filled"

            def fill_up() -> bool:
                if server.requests >= 40 and not filled.exists():
                    with filled.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                        while file.write(b"x" * 4096):
                            pass
                return False

            with pytest.raises(DnoError, match=r"full.*see to the disk|No space left"):
                run_stage(annotate, config, 0, abandoned=fill_up)
            assert 40 <= server.requests < 400
            filled.unlink()
            with closing(VerdictStore(RunDir(config.run_dir).annotations_path)) as store:
                lost = server.requests - sum(tally.verdicts for tally in store.tallies(state="ok"))
            assert 0 <= lost <= config.annotation.openai.max_concurrency
            assert run_stage(annotate, config, 0).details["states"] == {"ok": 400}
            assert (server.requests, server.duplicates) == (400 + lost, lost)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_receipts_hold_every_store_that_was_paid_through(tmp_path):
    other = {"store": str(tmp_path / "elsewhere.sqlite"), "prices": {"judge": {"input": 1.0, "output": 1.0}}}
    with FakeJudge(prefers="marker") as server:
        config = sampled_run(tmp_path / "run", server.url, prompts=4, pairing={"reward": "score"})
        run_stage(annotate, config, 0)
        own = paid(config)
        elsewhere = sampled_run(tmp_path / "run", server.url, prompts=4, annotation=other, pairing={"reward": "score"})
        RunDir(config.run_dir).stage("annotate", 0).manifest_path.unlink()
        for shard in RunDir(config.run_dir).stage("annotate", 0).path.glob("*.jsonl"):
            shard.unlink()
        run_stage(annotate, elsewhere, 0)
    found = json.loads(RunDir(config.run_dir).receipts_path.read_text())
    stores = {receipt["path"]: receipt for receipt in found["stores"].values()}
    assert stores.keys() == {str(tmp_path / "run" / "annotations.sqlite"), other["store"]}
    assert stores[str(tmp_path / "run" / "annotations.sqlite")] == own
    assert found["usd"] == stores[other["store"]]["usd"] > 0.0


def test_a_run_directory_that_is_moved_has_paid_once(tmp_path):
    prices = {"judge": {"input": 1.0, "output": 1.0}}
    with FakeJudge(prefers="marker") as server:
        config = sampled_run(tmp_path / "run", server.url, prompts=4, annotation={"prices": prices})
        run_stage(annotate, config, 0)
        before = json.loads(RunDir(config.run_dir).receipts_path.read_text())
        (tmp_path / "run").rename(tmp_path / "moved")
        stage = RunDir(str(tmp_path / "moved")).stage("annotate", 0)
        stage.manifest_path.unlink()
        run_stage(annotate, config.model_copy(update={"run_dir": str(tmp_path / "moved")}), 0)
        assert (server.requests, server.duplicates) == (4, 0)
    after = json.loads(RunDir(str(tmp_path / "moved")).receipts_path.read_text())
    assert after["usd"] == before["usd"] > 0.0
    assert [receipt["path"] for receipt in after["stores"].values()] == [str(tmp_path / "moved" / "annotations.sqlite")]


@pytest.mark.parametrize("expired", [0.0, 0.3])
def test_batches_answer_at_their_price_and_what_they_leave_is_asked_live(tmp_path, monkeypatch, expired):
    monkeypatch.setattr("dno_jax.annotation.transport.batch.FIRST_POLL_SECONDS", 0.05)
    openai = {"batch": True, "form": "pairwise"}
    prices = {"judge": {"input": 100.0, "output": 100.0}}
    with FakeJudge(prefers="marker", batch_delay=0.1, batch_expired=expired) as server:
        config = sampled_run(tmp_path, server.url, prompts=12, annotation={"openai": openai, "prices": prices})
        manifest = run_stage(annotate, config, 0)
        assert manifest.details["states"] == {"ok": 12}
        assert server.counts.batches == 1
        assert (server.requests, server.duplicates) == (144, 0)
        live = 144 - server.counts.batch_lines
        assert (live == 0) if expired == 0.0 else (10 < live < 100)
    receipt = paid(config)["models"]["judge"]
    full = (receipt["tokens_in"] + receipt["tokens_out"]) * 100.0 / 1e6
    assert receipt["requests"] == 144 + server.counts.forms["probe"]
    if expired == 0.0:
        assert receipt["usd"] == pytest.approx(full / 2, rel=2e-3)  # what the probe said was asked live
    else:
        assert full / 2 < receipt["usd"] < full


def test_a_batch_under_way_is_not_bought_again_live(tmp_path, monkeypatch):
    monkeypatch.setattr("dno_jax.annotation.transport.batch.FIRST_POLL_SECONDS", 0.05)
    prices = {"judge": {"input": 100.0, "output": 100.0}}
    with FakeJudge(prefers="marker", batch_delay=1.0) as server:
        config = sampled_run(
            tmp_path, server.url, prompts=12, annotation={"openai": {"batch": True}, "prices": prices, "max_usd": 10.0}
        )
        with pytest.raises(DnoError, match="sampling stopped"):
            run_stage(annotate, config, 0, abandoned=lambda: server.counts.batches > 0)
        assert not RunDir(config.run_dir).stage("annotate", 0).shard_names()
        # as little money as there may be, and no batches any more: what was sent is owed, and comes
        live = config.annotation.openai.model_copy(update={"batch": False})
        manifest = run_stage(annotate, with_annotation(config, openai=live, max_usd=0.5), 0)
        assert manifest.details["states"] == {"ok": 12}
        assert (server.counts.batch_lines, server.duplicates, server.requests) == (12, 0, 12)
    receipt = paid(config)["models"]["judge"]
    assert receipt["requests"] == 12 + server.counts.forms["probe"]


def test_labelled_pairs_are_given_up_with_the_run_and_those_in_flight_kept(tmp_path):
    pairs = [
        {"prompt": f"Q{n}", "first": f"a q=0.1 {n}", "second": f"b q=0.9 {n}", "preference": 0} for n in range(100)
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    quality = {"calibration": str(tmp_path / "labels.jsonl")}
    with FakeJudge(prefers="marker", delay=0.2) as server:
        annotation = {"openai": {"max_concurrency": 4}, "quality": quality}
        config = sampled_run(tmp_path, server.url, prompts=8, annotation=annotation)
        with pytest.raises(DnoError, match="sampling stopped"):
            run_stage(annotate, config, 0, abandoned=lambda: server.requests >= 4)
        asked = server.requests
        assert 4 <= asked < 60
        with closing(VerdictStore(RunDir(config.run_dir).annotations_path)) as store:
            assert sum(tally.verdicts for tally in store.tallies(state="ok")) == asked
        run_stage(annotate, config, 0)
        assert (server.requests, server.duplicates) == (108, 0)


def test_shards_are_batched_by_the_number_of_their_questions(tmp_path):
    def grouped(**openai):
        sampling = {"num_samples": 5, "shard_prompts": 64}
        annotation = {"openai": openai}
        tree = judged_tree(tmp_path, "http://127.0.0.1:9/v1", sampling=sampling, annotation=annotation)
        return annotate.shards_a_group(parse_config(RunConfig, tree, place="test"), 0)

    assert grouped(batch=True) == 256
    assert grouped(batch=True, form="pairwise") == 8  # of 30 questions a pool
    assert grouped(batch=True, form="pairwise", schedule="tournament") == 25
    assert grouped(form="pairwise") == 1


def test_the_key_is_told_nowhere_though_the_server_tells_it(tmp_path, monkeypatch, capfd, caplog):
    key = "sk-planted-0123456789abcdef"
    monkeypatch.setenv("DNO_TEST_KEY", key)
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("dno_jax.annotation.transport.batch.FIRST_POLL_SECONDS", 0.05)
    caplog.set_level("DEBUG")
    errors = []

    def judged(name, *, raises, max_tries=8, prompts=12, batch=False, **server_fields):
        with FakeJudge(prefers="marker", echoes_key=True, batch_delay=0.0, **server_fields) as server:
            openai = {"api_key_env": "DNO_TEST_KEY", "max_tries": max_tries, "batch": batch}
            config = sampled_run(
                tmp_path / name, server.url, prompts=prompts, annotation={"openai": openai}, pairing={"reward": "score"}
            )
            if raises is None:
                run_stage(annotate, config, 0)
                return
            with pytest.raises(DnoError, match=raises) as caught:
                run_stage(annotate, config, 0)
            errors.append(caught.value)

    retried = ("500", "garbage", "malformed", "too_few", "html", "no_choices", "cut_json", "truncated")
    judged("finished", api_key=key, fraction=0.4, faults=retried, raises=None)
    judged("batch", batch=True, raises=None)
    judged("refused", refusals=0.5, raises="pools have no verdict")
    judged("unread", fraction=1.0, faults=("garbage",), max_tries=1, prompts=4, raises="unparsable")
    judged("failed", fraction=1.0, faults=("400",), max_tries=1, prompts=4, raises="HTTP 400")
    judged("keyless", api_key="another", prompts=4, raises="HTTP 401")
    judged("unknown", models=("another",), prompts=4, raises="HTTP 404")

    said = capfd.readouterr()
    assert key not in said.out + said.err + caplog.text
    for error in errors:
        assert key not in "".join(traceback.format_exception(error))  # with what it came of
        while error is not None:
            assert key not in repr(error) + repr(vars(error))
            error = error.__cause__ or error.__context__
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".sqlite" for path in files) == 7
    stored = b""
    for path in files:
        content = path.read_bytes()
        assert key.encode() not in content, path
        stored += content
    assert b"as planted by [key]" in stored  # it was told


def test_an_ensemble_averages_the_preferences_of_its_judges(tmp_path):
    with FakeJudge(prefers="marker") as server, FakeJudge(prefers="longest") as other:
        reached = {"api_key_env": None, "timeout": 5.0}
        members = [
            {"model": "points", "base_url": server.url, **reached},
            {"model": "pairs", "form": "pairwise", "base_url": other.url, **reached},
        ]
        config = sampled_run(tmp_path, server.url, prompts=8, annotation={"kind": "ensemble", "ensemble": members})
        manifest = run_stage(annotate, config, 0)
        assert run_stage(annotate, config, 0) == manifest
        assert (server.requests, other.requests) == (8, 8 * 12)
    texts = texts_of(config)
    for row in RunDir(config.run_dir).stage("annotate", 0).read(Judgement):
        own = [texts[name] for name in row.candidate_ids]
        for i, j in itertools.permutations(range(4), 2):
            by_worth = (worth(own[i]) > worth(own[j])) + 0.5 * (worth(own[i]) == worth(own[j]))
            by_length = (len(own[i]) > len(own[j])) + 0.5 * (len(own[i]) == len(own[j]))
            assert row.wins[i][j] == pytest.approx((by_worth + by_length) / 2)


def test_runs_share_a_store_by_its_path(tmp_path):
    shared = str(tmp_path / "verdicts.sqlite")
    with FakeJudge(prefers="marker") as server:
        for name in ("one", "two"):
            config = sampled_run(
                tmp_path / name, server.url, prompts=8, annotation={"store": shared}, pairing={"reward": "score"}
            )
            run_stage(annotate, config, 0)
        assert server.requests == 8
    assert paid(config)["models"] == {}  # the second run paid nothing


def test_annotation_streams_behind_sampling(tmp_path, monkeypatch):
    """A sampler that closes a shard only when the judge has been asked about all that are closed."""
    with FakeJudge(prefers="marker") as server:
        config = sampled_run(tmp_path, server.url, prompts=16, pairing={"reward": "score"})
        stage = RunDir(config.run_dir).stage("sample", 0)
        shards = {name: list(stage.read_shard(Rollout, name)) for name in stage.shard_names()}
        shutil.rmtree(stage.path)
        asked = []

        def sample_slowly(*_, **__):
            for number, (name, rollouts) in enumerate(shards.items(), start=1):
                stage.write_shard(name, rollouts)
                deadline = time.monotonic() + 60.0
                while server.requests < 4 * number and time.monotonic() < deadline:
                    time.sleep(0.01)
                asked.append(server.requests)
            stage.finish(config, inputs={}, rows=64, seconds=0.0)

        monkeypatch.setattr(overlap.sample, "run", sample_slowly)
        overlap.sample_and_annotate(idle_runtime(config), 0)
    assert asked == [4, 8, 12, 16]
    assert RunDir(config.run_dir).stage("annotate", 0).require().details["states"] == {"ok": 16}


def test_pools_held_are_those_in_work(tmp_path, monkeypatch):
    """Prompts and rollouts of a shard are read when it is judged, and let go of."""
    read = Counter()
    original = PromptFile.read

    def counted(self, prompt_ids):
        read.update(prompt_ids)
        return original(self, prompt_ids)

    monkeypatch.setattr(PromptFile, "read", counted)
    with FakeJudge(prefers="marker") as server:
        config = sampled_run(tmp_path, server.url, prompts=12, pairing={"reward": "score"})
        run_stage(annotate, config, 0)
    assert set(read.values()) == {1}
