"""The whole loop on a small model, in this process, on 8 virtual devices."""

import math
from pathlib import Path

import numpy as np
import pytest

from dno_jax import iteration
from dno_jax.config import RunConfig, parse_config
from dno_jax.console import console
from dno_jax.data.pair_table import PairTable
from dno_jax.errors import DnoError
from dno_jax.records import Judgement, ReferenceScore, Rollout
from dno_jax.report.answers import answers_text, shown_answers
from dno_jax.report.summary import iteration_table, policy_table, stage_statuses, status_table, told_policy
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import stage_names
from dno_jax.stages import pair, sample, score, train
from dno_jax.stages.evaluate import read_responses
from dno_jax.training.checkpoint import policy_fingerprint
from tests.configured import deep_merge
from tests.pairs import read_pairs
from tests.running import export, prepare, run_iteration, run_stage, sample_and_annotate
from tests.small import small_tree


@pytest.fixture(scope="module")
def finished(small_folder, tmp_path_factory):
    """A finished run; tests read it and must not change it."""
    tree = deep_merge(small_tree(small_folder), {"run_dir": str(tmp_path_factory.mktemp("finished") / "run")})
    config = parse_config(RunConfig, tree, place="test")
    return config, RunDir(config.run_dir), iteration.run(config)


def files(run_dir):
    found = [path for path in Path(str(run_dir.path)).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def test_every_stage_leaves_rows_and_a_manifest(finished):
    config, run_dir, result = finished
    for t in range(2):
        for name in stage_names(config, t):
            manifest = run_dir.stage(name, t).require()
            assert manifest.stage == name
            assert manifest.rows > 0
        rollouts = list(run_dir.stage("sample", t).read(Rollout))
        assert len(rollouts) == 6 * (4 + 1)
        assert len({row.rollout_id for row in rollouts}) == len(rollouts)
        assert {row.policy for row in rollouts} == {t, None}
        for row in rollouts:
            assert row.is_gold or (row.token_ids[-1] == 2) == (row.finish == "stop")
            assert row.is_gold == (row.logprob is None)
    prompts = [{row.prompt_id for row in run_dir.stage("sample", t).read(Rollout)} for t in range(2)]
    assert not prompts[0] & prompts[1]
    assert result.best in (0, 1, 2)
    assert (run_dir.export_path / "model.safetensors").exists()
    assert "loss on [" in run_dir.template_path.read_text()


def test_what_the_judge_read_is_what_is_trained_on(finished):
    config, run_dir, _ = finished
    from dno_jax.model.text.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.load(config.model.path, config.model.chat_template)
    for row in run_dir.stage("sample", 0).read(Rollout):
        assert tokenizer.decode(row.token_ids).split() == row.text.split()


def test_pairs_name_rollouts_and_judgements_and_every_drop_is_counted(finished):
    _, run_dir, _ = finished
    for t in range(2):
        stage = run_dir.stage("pair", t)
        details, rollouts = stage.require().details, {r.rollout_id: r for r in run_dir.stage("sample", t).read(Rollout)}
        new = [row for row in read_pairs(stage) if row.iteration == t]
        replayed = [row for row in read_pairs(stage) if row.iteration != t]
        assert (len(new), len(replayed)) == (details["new"], details["replayed"])
        assert len(replayed) <= 0.3 * (len(new) + len(replayed)) + 1e-9
        silent = {row.prompt_id for row in rollouts.values() if not row.text.strip()}  # one more candidate each
        pools = {row.prompt_id: row for row in run_dir.stage("annotate", t).read(Judgement)}
        sizes = [len(row.candidate_ids) + (row.prompt_id in silent) for row in pools.values()]
        possible = sum(size * (size - 1) // 2 for size in sizes)
        assert len(new) + sum(stage.require().dropped.values()) == possible
        for made in new:
            assert rollouts[made.chosen_id].prompt_id == rollouts[made.rejected_id].prompt_id == made.prompt_id
            ids, wins = pools[made.prompt_id].candidate_ids, np.asarray(pools[made.prompt_id].wins)
            empty = made.prompt_id in silent  # it was shown to no judge, and loses to every text
            rate = (wins.sum(1) - 0.5 + empty) / (len(ids) - 1 + empty)
            assert made.chosen_reward == pytest.approx(rate[ids.index(made.chosen_id)], abs=1e-6)
            assert made.chosen_reward > made.rejected_reward
            assert made.target == 1.0
    assert [row for row in read_pairs(run_dir.stage("pair", 1)) if row.iteration == 0]


def test_training_starts_at_log_two_and_the_reference_is_the_previous_policy(finished):
    _, run_dir, _ = finished
    rows = [row for row in run_dir.read_metrics() if row["stage"] == "train"]
    for t in range(2):
        steps = [row for row in rows if row["iteration"] == t]
        assert [row["step"] for row in steps] == list(range(len(steps)))
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert steps[0]["max_abs_log_ratio"] < 1e-3
        assert steps[0]["accuracy"] <= 1.0
        for name in ("margin", "chosen_logprob", "rejected_logprob", "grad_norm", "tokens_per_second", "learning_rate"):
            assert math.isfinite(steps[-1][name])
        reference = run_dir.stage("score", t).require()
        assert reference.details["fingerprint"] == policy_fingerprint(run_dir.policy(t))
        assert reference.inputs[f"policies/{t:03d}"] == policy_fingerprint(run_dir.policy(t))
    fingerprints = {policy_fingerprint(run_dir.policy(t)) for t in range(3)}
    assert len(fingerprints) == 3


def test_sampled_logprobs_equal_the_trainers(finished):
    """The sampler's record (cached decoding) against the trainer's (teacher forcing), on responses in pairs."""
    _, run_dir, _ = finished
    rollouts = {row.rollout_id: row for row in run_dir.stage("sample", 0).read(Rollout)}
    scores = {row.pair_id: row for row in run_dir.stage("score", 0).read(ReferenceScore)}
    compared = 0
    for made in read_pairs(run_dir.stage("pair", 0)):
        for name, value in (
            (made.chosen_id, scores[made.pair_id].chosen_logprob),
            (made.rejected_id, scores[made.pair_id].rejected_logprob),
        ):
            if not rollouts[name].is_gold:
                compared += 1
                assert value == pytest.approx(rollouts[name].logprob, abs=1e-3)
    assert compared > 10


def test_a_finished_run_is_not_touched_again(finished):
    config, run_dir, result = finished
    before = files(run_dir)
    assert iteration.run(config) == result
    after = files(run_dir)
    # Rewritten whole, with the same bytes.
    rewritten = {".lock", "config.yaml", "template.txt", "prompts.jsonl", "report.html"}
    changed = {path for path in before if before[path] != after.get(path)}
    assert {path.rsplit("/", 1)[-1] for path in changed} <= rewritten
    assert before.keys() == after.keys()


def test_tables_show_what_the_manifests_say(finished):
    config, run_dir, result = finished
    with console.capture() as captured:
        for table in (
            status_table(stage_statuses(run_dir, config)),
            iteration_table(run_dir, config),
            policy_table(run_dir, iterations=2),
        ):
            console.print(table)
    text = captured.get()
    assert text.count("done") == 12
    details = run_dir.stage("evaluate", 1).require().details
    assert f"{100 * details['win_rates']['0']['rate']:.0f} %" in text
    assert f"* {result.best}" in text
    assert "next" not in text


def test_policy_0_and_the_best_are_read_side_by_side(finished):
    config, run_dir, result = finished
    found = shown_answers(run_dir, iterations=2, policy=result.best)
    assert found is not None
    card = (Path(result.export) / "README.md").read_text()
    with console.capture() as captured:
        console.print(answers_text(found))
    for policy, text in found.answers:
        rows = read_responses(run_dir, policy, num_samples=config.evaluation.num_samples)
        assert text in {row.text for row in rows if row.sample == 0}
        assert f"`policy {policy}`:\n\n```text\n{text.strip()}\n```" in card
        assert f"policy {policy}: {text.strip()[:40]}" in captured.get()


def test_evaluation_is_antisymmetric_and_knows_the_teacher(finished):
    _, run_dir, result = finished
    details = run_dir.stage("evaluate", 1).require().details
    matrix = np.asarray(details["matrix"])
    np.testing.assert_allclose(matrix + matrix.T, 1.0, atol=2e-4)
    assert set(details["win_rates"]) == {"0", "1", "gold"}
    assert details["win_rates"]["0"]["rate"] == pytest.approx(matrix[2, 0], abs=1e-4)
    assert details["win_rates"]["0"]["comparisons"] == 4 * 2
    assert details["best"] == result.best


def test_a_changed_configuration_is_refused_and_named(finished):
    config, _, _ = finished
    changed = config.model_copy(update={"loss": config.loss.model_copy(update={"beta": 0.3})})
    with pytest.raises(DnoError, match=r"loss\.beta: 0\.1 -> 0\.3"):
        iteration.run(changed)


def test_prompts_that_changed_under_a_run_are_refused(finished, make_config, tmp_path):
    config, _, _ = finished
    rows = Path(config.prompts.path).read_text().splitlines()
    changed = tmp_path / "prompts.jsonl"
    changed.write_text("\n".join(rows) + "\n")
    other = make_config(iterations=2, prompts={"path": str(changed)})
    prepare(other)
    before = RunDir(other.run_dir).prompts_path(0)
    run_stage(sample, other, 0)
    kept = before.read_text()
    changed.write_text("\n".join(rows[:-2]) + "\n")
    with pytest.raises(DnoError, match="the prompt file has changed since this iteration began"):
        run_stage(sample, other, 0)
    assert before.read_text() == kept


def test_missing_reference_scores_are_never_zeros(finished):
    _, run_dir, _ = finished
    pairs = PairTable.load(run_dir.stage("pair", 0))
    scores = list(run_dir.stage("score", 0).read(ReferenceScore))
    with pytest.raises(DnoError, match="has no reference score"):
        pairs.logprobs(scores[1:])
    with pytest.raises(DnoError, match="has no reference score"):
        pairs.logprobs([])


def test_step_zero_refuses_a_foreign_reference(make_config):
    config = make_config(iterations=1)
    prepare(config)
    sample_and_annotate(config, 0)
    run_stage(pair, config, 0)
    manifest = run_stage(score, config, 0)
    stage = RunDir(config.run_dir).stage("score", 0)
    for name in stage.shard_names():
        rows = stage.read_shard(ReferenceScore, name)
        stage.write_shard(name, [row.model_copy(update={"chosen_logprob": row.chosen_logprob - 3.0}) for row in rows])
    with pytest.raises(DnoError, match=r"not as the stage wrote it"):
        run_stage(train, config, 0)
    made = {"inputs": manifest.inputs, "rows": manifest.rows, "seconds": 0.0}
    stage.finish(config, **made, details=manifest.details)  # as a device that computes otherwise would have
    with pytest.raises(DnoError, match=r"(?s)step 0: .* differs from its reference by 3.*before scoring again"):
        run_stage(train, config, 0)
    stage.finish(config, **made, details=manifest.details | {"tokenizer": "another"})
    with pytest.raises(DnoError, match="reference scores of another tokenizer"):
        run_stage(train, config, 0)
    assert manifest.rows == len(list(stage.read(ReferenceScore)))
    assert policy_fingerprint(RunDir(config.run_dir).policy(1)) is None


def test_no_pair_is_an_error_with_the_funnel(finished, make_config):
    _, run_dir, _ = finished
    other = make_config(iterations=2, pairing={"degenerate_share": 1.0})
    target = RunDir(other.run_dir)
    for name in ("sample", "annotate"):
        stage, source = target.stage(name, 0), run_dir.stage(name, 0)
        for shard in source.shard_names():
            kind = Rollout if name == "sample" else Judgement
            rows = source.read_shard(kind, shard)
            if kind is Judgement:  # a judge that sees no difference anywhere
                rows = [row.model_copy(update={"wins": ((0.5,) * len(row.wins),) * len(row.wins)}) for row in rows]
            stage.write_shard(shard, rows)
        stage.finish(other, inputs={}, rows=1, seconds=0.0)
    with pytest.raises(DnoError, match=r"no pair passed the rules \(dropped: tie: \d+\)"):
        run_stage(pair, other, 0)
    assert target.stage("pair", 0).shard_names() == []
    assert target.stage("pair", 0).manifest() is None


def test_without_held_out_prompts_the_last_policy_is_returned_and_not_called_the_best(make_config, capsys):
    config = make_config(iterations=1, prompts={"held_out_path": None})
    result = iteration.run(config)
    assert result.best == 1
    run_dir = RunDir(config.run_dir)
    assert run_dir.stage("evaluate", 0).require().details["why"] == "the newest: no held-out prompts"
    assert told_policy(run_dir, iteration=0) == "policy 1 (the newest: no held-out prompts)"
    capsys.readouterr()
    console.print(policy_table(run_dir, iterations=1))
    said = capsys.readouterr().err
    assert "not measured" in said
    assert "best" not in said
    assert "*" not in said


@pytest.mark.soak
def test_bfloat16_compute_runs_the_loop_within_the_guard(make_config):
    config = make_config(iterations=1, model={"dtype": "bfloat16", "remat": "full"})
    iteration.run(config)
    run_dir = RunDir(config.run_dir)
    first = next(row for row in run_dir.read_metrics() if row["stage"] == "train")
    # Scoring and training are different programs: they round differently, by far less than the guard allows.
    assert first["max_abs_log_ratio"] < train.STEP_ZERO_TOLERANCE["bfloat16"]
    assert first["loss"] == pytest.approx(math.log(2), abs=0.02)


@pytest.mark.soak
def test_micro_batches_train_the_same_policy(make_config, tmp_path):
    other = make_config(training={"micro_batch_size": 8, "batch_size": 16})
    whole = make_config(run_dir=str(tmp_path / "whole"), training={"batch_size": 16})
    losses = []
    for changed in (other, whole):
        prepare(changed)
        run_iteration(changed, 0)
        rows = [row for row in RunDir(changed.run_dir).read_metrics() if row["stage"] == "train"]
        losses.append([row["loss"] for row in rows])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.soak
def test_meshes_agree_and_export_the_same_files(make_config, finished, tmp_path):
    config, run_dir, _ = finished
    other = make_config(iterations=2, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    prepare(other)
    run_iteration(other, 0)
    other_dir = RunDir(other.run_dir)
    one = {row.rollout_id: row for row in run_dir.stage("sample", 0).read(Rollout)}
    two = {row.rollout_id: row for row in other_dir.stage("sample", 0).read(Rollout)}
    assert one.keys() == two.keys()
    differing = [name for name in one if one[name].token_ids != two[name].token_ids]
    assert len(differing) <= 1, "more rows than rounding at the border of two tokens explains"
    export(other, policy=0, path=str(tmp_path / "two"))
    export(config, policy=0, path=str(tmp_path / "one"))
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    source = RunDir(config.run_dir).load_config().model.path
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == Path(source, "model.safetensors").read_bytes()
