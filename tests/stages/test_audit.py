"""The sampler's log-probabilities beside the trainer's, and in their place."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from etils import epath

from dno_jax.addresses import Purpose, order
from dno_jax.config import RunConfig, parse_config
from dno_jax.console import console
from dno_jax.errors import DnoError
from dno_jax.records import ReferenceScore, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime import sampler
from dno_jax.runtime import scoring as rows
from dno_jax.stages import audit, pair, sample, score, train
from tests.configured import deep_merge
from tests.pairs import read_pairs
from tests.running import prepare, run_stage, sample_and_annotate
from tests.small import small_tree, write_prompts

# Truncated and sharpened: what is recorded is of temperature 1 and the whole vocabulary all the same.
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "audit_prompts": 2, "as_reference": True}


def changed(config, **changes):
    return parse_config(RunConfig, deep_merge(config.model_dump(mode="json"), changes), place="test")


def rollouts_of(run_dir, t=0):
    return {row.rollout_id: row for row in run_dir.stage("sample", t).read(Rollout)}


def scores_of(run_dir, t=0):
    return {row.pair_id: row for row in run_dir.stage("score", t).read(ReferenceScore)}


def copy_of(config, path, *, without=()):
    """The same run in a folder of its own, without the folders of some stages of iteration 0."""
    shutil.copytree(config.run_dir, path)
    copied = changed(config, run_dir=str(path))
    for name in without:
        shutil.rmtree(RunDir(path).stage(name, 0).path)
    return copied, RunDir(path)


def paired(config, t=0):
    sample_and_annotate(config, t)
    run_stage(pair, config, t)


@pytest.fixture
def steps(monkeypatch):
    """A list that grows by one at every batch that is scored."""
    calls, real = [], rows.score_step
    monkeypatch.setattr(rows, "score_step", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


@pytest.fixture(scope="module")
def plain(small_folder, tmp_path_factory):
    """Iteration 0 of a run without teacher up to its pairs; tests copy it. The audit's line comes with it."""
    tree, folder = small_tree(small_folder), tmp_path_factory.mktemp("plain")
    changes = {
        "run_dir": str(folder / "run"),
        "prompts": {"path": str(write_prompts(folder / "prompts.jsonl", 12, gold=False)), "held_out_path": None},
        "sampling": {**SAMPLING, "shard_prompts": 8},
    }
    config = parse_config(RunConfig, deep_merge(tree, changes), place="test")
    prepare(config)
    with console.capture() as captured:
        paired(config)
    return config, RunDir(config.run_dir), captured.get()


@pytest.fixture(scope="module")
def trained(plain, tmp_path_factory):
    """The same with its training, and the pairs of iteration 1, of which some are replayed."""
    config, run_dir = copy_of(plain[0], tmp_path_factory.mktemp("trained") / "run")
    run_stage(score, config, 0)
    run_stage(train, config, 0)
    paired(config, 1)
    return config, run_dir


def first_audited(run_dir, count, t=0):
    """Ids of the prompts that are audited, by the rule in words: of each shard, the first in the order of draws."""
    found = []
    for name in run_dir.stage("sample", t).shard_names():
        ids = sorted({row.prompt_id for row in run_dir.stage("sample", t).read_shard(Rollout, name)})
        found += [ids[index] for index in order(Purpose.AUDITED_PROMPTS, names=ids)[:count]]
    return found


def test_statistics_are_by_token_by_response_and_by_root_of_tokens():
    def response(name, tokens, logprob):
        return Rollout(
            rollout_id=name, prompt_id="p", sample=0, source="policy", policy=0, text="", token_ids=(5,) * tokens,
            prompt_token_ids=(1,), logprob=logprob, finish="length",
        )  # fmt: skip

    drawn = [response("short", 1, -2.0), response("long", 16, -30.0), response("same", 4, -8.0)]
    found = audit.statistics(drawn, [-2.5, -29.2, -8.0])
    assert (found["responses"], found["tokens"]) == (3, 21)
    assert found["mean"] == pytest.approx((0.5 + 0.8 / 16) / 3)
    assert found["max"] == pytest.approx(0.5)
    assert found["mean_sum"] == pytest.approx((0.5 + 0.8) / 3)
    assert found["max_sum"] == pytest.approx(0.8)
    assert found["error"] == pytest.approx(0.5)  # against 0.8 / 4
    assert found["worst"] == {"rollout_id": "short", "tokens": 1, "sampler": -2.0, "trainer": -2.5}
    assert found["worst_sum"]["rollout_id"] == "long"
    silent = audit.statistics([*drawn, response("none", 3, None)], [-2.5, -29.2, -8.0, -1.0])
    assert math.isnan(silent["error"])
    assert silent["worst"]["rollout_id"] == "none"


def test_sampler_and_trainer_agree_and_the_manifest_says_so(plain):
    _, run_dir, said = plain
    found = run_dir.stage("sample", 0).require().details["audit"]
    own = [row for row in rollouts_of(run_dir).values() if row.prompt_id in first_audited(run_dir, 2)]
    assert found["responses"] == len(own) == 4 * len(first_audited(run_dir, 2)) > 0
    assert found["tokens"] == sum(len(row.token_ids) for row in own)
    # A hundred roundings of float32 in a log-probability of some ten nats.
    assert found["error"] < 1e-5
    assert found["max"] <= found["max_sum"] < 1e-4
    assert found["worst"]["rollout_id"] in {row.rollout_id for row in own}
    assert (found["bound"], found["dtype"]) == (audit.AUDIT_BOUNDS["float32"], "float32")
    assert said.count("audit     0: ") == 1
    assert f"{found['responses']} responses, {found['tokens']} tokens" in said


def test_a_wrong_logprob_stops_the_run_and_a_rerun_only_audits(plain, tmp_path, monkeypatch):
    config, run_dir = copy_of(plain[0], tmp_path / "run", without=["pair"])
    stage = run_dir.stage("sample", 0)
    stage.manifest_path.unlink()
    good = {name: (stage.path / f"{name}.jsonl").read_text() for name in stage.shard_names()}
    audited = first_audited(run_dir, 2)
    shards = {name: stage.read_shard(Rollout, name) for name in good}
    name, wrong = next((name, row) for name in good for row in shards[name] if row.prompt_id == audited[1])
    assert wrong.logprob is not None
    path = Path(stage.path / f"{name}.jsonl")
    lines = [json.loads(line) for line in good[name].splitlines()]
    for line in lines:
        line["logprob"] += 0.5 * (line["rollout_id"] == wrong.rollout_id)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def no_sampling(*args, **kwargs):
        raise AssertionError("sampled again")

    monkeypatch.setattr(sampler, "generate", no_sampling)
    with pytest.raises(DnoError) as error:
        run_stage(sample, config, 0)
    tokens = len(wrong.token_ids)
    shown = f"rollout {wrong.rollout_id!r} of {tokens} tokens (log pi_t: sampler {wrong.logprob + 0.5:.6g}, trainer "
    for submesh in (shown, "in float32", "sampling.audit_bound=0.0001 times sqrt(tokens)", "model.attention=xla"):
        assert submesh in str(error.value)
    trainer = re.search(r"trainer (-[\d.]+)\)", str(error.value))
    assert trainer is not None
    assert float(trainer[1]) == pytest.approx(wrong.logprob, abs=1e-3)
    assert stage.manifest() is None
    assert set(stage.shard_names()) == set(good)

    wide = changed(config, sampling={"audit_bound": 1.0, "as_reference": False})
    assert run_stage(sample, wide, 0).details["audit"]["error"] == pytest.approx(0.5 / math.sqrt(tokens), abs=1e-4)
    # Within a bound so wide, and still no reference: training's first step would stop.
    with pytest.raises(DnoError, match=r"as_reference cannot hold: .* differ by 0\.5\d* nats .* at most 0\.01"):
        score.reference_identity(*runtime_and_update(changed(wide, sampling={"as_reference": True})))
    stage.manifest_path.unlink()
    path.write_text(good[name])
    assert run_stage(sample, config, 0).details["audit"]["error"] < 1e-5


def runtime_and_update(config):
    from dno_jax.runtime.runtime import Runtime
    from dno_jax.runtime.scheme import update_of

    runtime = Runtime.start(config)
    return runtime, update_of(config, runtime.run_dir, 0)


def test_no_audit_leaves_no_figures_and_everything_is_scored(plain, tmp_path, steps):
    config, run_dir = copy_of(plain[0], tmp_path / "run", without=["pair"])
    run_dir.stage("sample", 0).manifest_path.unlink()
    shutil.rmtree(run_dir.stage("annotate", 0).path)
    off = changed(config, sampling={"audit_prompts": 0, "as_reference": False})
    paired(off)
    assert not steps
    assert "audit" not in run_dir.stage("sample", 0).require().details
    manifest = run_stage(score, config, 0)  # the option comes too late for these samples
    assert steps
    assert (manifest.details["source"], manifest.details["sampled"]) == ("scored", 0)


def test_the_samplers_record_is_the_reference_and_nothing_is_scored(plain, tmp_path, steps):
    config, run_dir = copy_of(plain[0], tmp_path / "run")
    manifest = run_stage(score, config, 0)
    assert not steps
    taken, drawn = scores_of(run_dir), rollouts_of(run_dir)
    pairs = read_pairs(run_dir.stage("pair", 0))
    assert len(pairs) == len(taken) == manifest.details["sampled"] > 5
    for made in pairs:
        assert taken[made.pair_id].chosen_logprob == drawn[made.chosen_id].logprob
        assert taken[made.pair_id].rejected_logprob == drawn[made.rejected_id].logprob
    assert run_stage(score, config, 0) == manifest

    scoring = changed(config, sampling={"as_reference": False})
    with pytest.raises(DnoError, match="reference scores of another source; remove the folder to score again"):
        run_stage(train, scoring, 0)
    other = run_stage(score, scoring, 0)
    assert steps
    assert (other.details["source"], other.details["sampled"]) == ("scored", 0)
    assert all(name.removeprefix("packed-").isdecimal() for name in run_dir.stage("score", 0).shard_names())
    scored = scores_of(run_dir)
    assert scored.keys() == taken.keys()
    for name, row in scored.items():
        assert row.chosen_logprob == pytest.approx(taken[name].chosen_logprob, abs=1e-4)
        assert row.rejected_logprob == pytest.approx(taken[name].rejected_logprob, abs=1e-4)
    assert scored != taken  # two programs: what was switched on is what is read

    del steps[:]
    assert run_stage(score, config, 0).outputs == manifest.outputs
    assert not steps


def test_an_interrupted_pass_of_the_other_kind_is_not_mixed_in(plain, tmp_path, steps):
    config, run_dir = copy_of(plain[0], tmp_path / "run")
    scoring, stage = changed(config, sampling={"as_reference": False}), run_dir.stage("score", 0)
    run_stage(score, scoring, 0)
    stage.manifest_path.unlink()
    done = len(steps)
    manifest = run_stage(score, config, 0)
    assert len(steps) == done
    assert stage.shard_names() == ["sampled"]
    assert len(list(stage.read(ReferenceScore))) == manifest.rows


def test_training_begins_at_log_two_and_keeps_what_it_has_read(trained, steps):
    config, run_dir = trained
    first = next(row for row in run_dir.read_metrics() if row["stage"] == "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["max_abs_log_ratio"] < 1e-3
    before = run_dir.stage("score", 0).require()
    scoring = changed(config, sampling={"as_reference": False})
    assert run_stage(score, scoring, 0) == before
    assert not steps
    assert run_stage(train, scoring, 0) == run_dir.stage("train", 0).require()


def test_replayed_pairs_are_scored_under_the_policy_that_is_the_reference_now(trained, steps):
    config, run_dir = trained
    manifest = run_stage(score, config, 1)
    pairs = {row.pair_id: row for row in read_pairs(run_dir.stage("pair", 1))}
    replayed = {name for name, row in pairs.items() if row.iteration == 0}
    stage = run_dir.stage("score", 1)
    others = [name for name in stage.shard_names() if name != "sampled"]
    assert {row.pair_id for name in others for row in stage.read_shard(ReferenceScore, name)} == replayed != set()
    assert {row.pair_id for row in stage.read_shard(ReferenceScore, "sampled")} == pairs.keys() - replayed != set()
    assert len(steps) == math.ceil(len(replayed) / config.training.batch_size)
    assert manifest.details["sampled"] == len(pairs) - len(replayed)
    taken, old = scores_of(run_dir, 1), rollouts_of(run_dir, 0)
    assert any(abs(taken[name].chosen_logprob - old[pairs[name].chosen_id].logprob) > 0.01 for name in replayed)
    run_stage(score, changed(config, sampling={"as_reference": False}), 1)
    for name, row in scores_of(run_dir, 1).items():
        assert row.chosen_logprob == pytest.approx(taken[name].chosen_logprob, abs=1e-4)
        assert row.rejected_logprob == pytest.approx(taken[name].rejected_logprob, abs=1e-4)


def test_pairs_with_the_teacher_are_scored_and_the_mixtures_samples_are_not(make_config, steps):
    config = make_config(
        iterations=1,
        sampling={**SAMPLING, "source": "mixture", "mixture_weight": 0.3},
        pairing={"opponents": "mixture"},
        prompts={"held_out_path": None},
    )
    prepare(config)
    paired(config)
    run_dir = RunDir(config.run_dir)
    drawn, pairs = rollouts_of(run_dir), read_pairs(run_dir.stage("pair", 0))
    found = run_dir.stage("sample", 0).require().details["audit"]
    assert found["responses"] == 4 * 2 * 2  # samples, prompts, shards: the mixture's samples, and not the teacher's
    del steps[:]
    run_stage(score, config, 0)
    stage = run_dir.stage("score", 0)
    with_gold = {
        row.pair_id for row in pairs if {drawn[row.chosen_id].source, drawn[row.rejected_id].source} & {"gold"}
    }
    others = [name for name in stage.shard_names() if name != "sampled"]
    assert {row.pair_id for name in others for row in stage.read_shard(ReferenceScore, name)} == with_gold != set()
    assert {row.pair_id for row in stage.read_shard(ReferenceScore, "sampled")} == {
        p.pair_id for p in pairs
    } - with_gold
    assert len(with_gold) < len(pairs)
    assert len(steps) == math.ceil(len(with_gold) / config.training.batch_size)
    run_stage(train, config, 0)
    first = next(row for row in run_dir.read_metrics() if row["stage"] == "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_bfloat16_may_differ_more_and_the_guard_still_bounds_the_reference(make_config, tmp_path):
    rounded = {
        "mean": 1e-3, "max": 5e-3, "error": 0.07, "max_sum": 1.1, "worst": None,
        "worst_sum": {"rollout_id": "000/p/3", "tokens": 256, "sampler": -358.2, "trainer": -359.3},
    }  # fmt: skip
    rounded["worst"] = rounded["worst_sum"]
    coarse = {"dtype": "bfloat16"}
    audit.check(rounded, config=make_config(model=coarse), place=epath.Path(tmp_path))
    for changes, message in (
        ({"model": coarse, "sampling": {"as_reference": True}}, r"'000/p/3'.*at most 1 per response.*reference=false"),
        ({"model": coarse, "sampling": {"audit_bound": 0.01}}, r"sampling\.audit_bound=0\.01"),
        ({}, r"sampling\.audit_bound=0\.0001"),
    ):
        config = make_config(**changes)
        with pytest.raises(DnoError, match=message):
            audit.check(rounded, config=config, place=epath.Path(tmp_path))


def test_a_reference_that_nobody_audits_is_refused(make_config):
    with pytest.raises(DnoError, match=r"as_reference=true with audit_prompts=0: .* set audit_prompts to 1 or more"):
        make_config(sampling={"as_reference": True, "audit_prompts": 0})
