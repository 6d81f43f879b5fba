"""A training whose numbers run away stops where they do."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax import iteration
from dno_jax.config import LossSection
from dno_jax.errors import DnoError
from dno_jax.parallel.sharding import TRAIN
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import train as stage
from dno_jax.stages.checkpoints import read_checkpoint
from dno_jax.stages.train import Training, check_step_zero, train
from dno_jax.training.batches import TrainingRow
from dno_jax.training.objectives import preference_loss


def test_a_loss_that_is_no_number_stops_training_before_a_state_is_saved(make_config):
    config = make_config(
        optimizer={"learning_rate": 1e37, "schedule": "constant", "warmup_ratio": 0.0},
        training={"batch_size": 8, "save_every": 1, "num_epochs": 6},
    )
    runtime = Runtime.start(config)
    states = RunDir(config.run_dir).path / "states"
    states.parent.mkdir(parents=True)
    rows = [TrainingRow(((5, 6), (5, 6)), ((7 + n, 2), (20 + n, 2)), name=f"pair-{n}") for n in range(8)]
    step = runtime.programs.step_config(preference_loss(LossSection(), config.reference))
    params = read_checkpoint(config.model.path, shardings=runtime.programs.param_shardings(TRAIN))
    with pytest.raises(DnoError, match="training stops, and nothing of this step is kept") as told:
        train(runtime, params, rows, step, Training("train", 0, states, max_length=config.max_length))
    said = str(told.value)
    assert said.count("\n") < 10
    assert all(row.name in said for row in rows)
    lines = runtime.run_dir.metrics_path.read_text().splitlines()
    logged = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    failed = logged[-1]["step"]
    assert f"train of iteration 0, step {failed}: the loss is" in said
    assert None in (logged[-1]["loss"], logged[-1]["grad_norm"])
    kept = [int(path.name) for path in states.iterdir() if path.name.isdecimal()]
    assert max(kept, default=0) <= failed  # the state after step n - 1 is called n
    assert "optimizer.learning_rate=1e+36" in said


@pytest.mark.parametrize(("before", "said"), [({}, "none has changed"), ({"jax": "0.1.2"}, r"jax 0\.1\.2 -> ")])
def test_step_zero_says_what_has_changed_since_the_scores_and_not_to_hide_it(make_config, before, said):
    config = make_config()
    scored = RunDir(config.run_dir).stage("score", 1)
    scored.finish(config, inputs={}, rows=0, seconds=0.1)
    manifest = scored.require()
    text = manifest.model_copy(update={"versions": manifest.versions | before, "seal": ""}).model_dump_json()
    scored.manifest_path.write_text(text)
    check_step_zero({"max_abs_log_ratio": 0.0, "loss": 0.7}, dtype="float32", scored=scored)
    for ratio in (3.0, float("nan")):
        with pytest.raises(DnoError, match=rf"(?s)step 0: .*{said}.*before scoring again.*--from score:1") as told:
            check_step_zero({"max_abs_log_ratio": ratio, "loss": 0.7}, dtype="float32", scored=scored)
        assert str(told.value).count("\n") < 10


@pytest.fixture
def trained(make_config):
    """Train 8 steps from the small checkpoint on pairs of which one step's are poisoned; return where and what came."""

    def run(*, bad=(), **training):
        section = {"batch_size": 8, "save_every": 3, **training}
        config = make_config(training=section, optimizer={"schedule": "constant"})
        runtime = Runtime.start(config)
        states = RunDir(config.run_dir).path / "states"
        states.parent.mkdir(parents=True, exist_ok=True)
        rows = [TrainingRow(((5, 6), (5, 6)), ((7 + n, 2), (20 + n, 2)), name=f"pair-{n}") for n in range(48)]
        step = runtime.programs.step_config(preference_loss(LossSection(), config.reference))
        params = read_checkpoint(config.model.path, shardings=runtime.programs.param_shardings(TRAIN))
        real, place = stage.train_step, Training("train", 0, states, max_length=config.max_length)
        taken = []

        def poisoned(state, batch, rate, **options):
            taken.append(int(state.step))
            weight = jnp.where(taken[-1] in bad, jnp.nan, 1.0) * batch.weight
            return real(state, batch.replace(weight=weight), rate, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "train_step", poisoned)
            result = train(runtime, params, rows, step, place)
        return result, runtime.run_dir

    return run


def test_steps_that_are_no_numbers_are_skipped_and_what_they_leave_is_as_if_they_had_not_been(trained, capsys):
    """6 steps, of which the last is skipped: the same as training that ended before it."""
    whole, run_dir = trained(bad=(5,), skip_nonfinite=2)
    assert whole.num_steps == 6
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(whole.params))
    rows = run_dir.read_metrics()
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 0, 1]
    assert rows[-1]["loss"] is None
    assert math.isfinite(whole.metrics["loss"])  # of the last step that was taken
    assert "step 5: the loss is nan" in capsys.readouterr().err
    # Adam has counted five steps, and the moments are of five.
    counts = {int(leaf) for leaf in jax.tree.leaves(whole.opt_state) if leaf.ndim == 0}
    assert counts == {5}


def test_one_more_than_may_be_skipped_stops_training(trained):
    with pytest.raises(DnoError, match=r"step 4: .* 2 steps were skipped before, as training\.skip_nonfinite allows"):
        trained(bad=(1, 2, 4), skip_nonfinite=2)


def test_steps_are_traced_on_request(trained, capsys):
    _, run_dir = trained(profile={"first": 2, "steps": 2})
    traces = list((run_dir.path / "profile" / "train_000").glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1
    assert "steps 2 to 3 are traced in" in capsys.readouterr().err


def test_every_step_tells_its_padding_time_and_arithmetic(trained):
    _, run_dir = trained()
    for row in run_dir.read_metrics():
        assert 0 <= row["padding"] < 1
        assert row["step_seconds"] > 0
        # 8 pairs of a prompt of 2 tokens, computed once, and two responses of 2.
        seconds, tokens = row["step_seconds"], row["tokens_per_second"] * row["step_seconds"]
        assert tokens == pytest.approx(8 * 8, rel=1e-4)  # each text with its prompt
        flops = row["tflops_per_second"] * 1e12 * seconds
        body, head = 2 * 32 * (8 * (2 * 4 + 2 * 2) + 3 * 64), 32 * 76
        seen = 2 * (2 * 10 - 3)  # two layers; 1 to 4 keys of each text's tokens, those of the prompt once
        assert flops == pytest.approx(8 * (6 * body * 6 + 12 * 4 * 8 * seen + 6 * head * 4), rel=1e-4)
        assert "mfu" not in row  # nobody knows a CPU's peak
        assert row["alarms"] >= 0


def test_a_run_in_bfloat16_trains_the_policies_that_lie_on_disk(make_config):
    """Policy 0 is rounded once, at its import, and step 0 shows a log-ratio of zero."""
    config = make_config(
        iterations=1,
        training={"batch_size": 8, "param_dtype": "bfloat16"},
        optimizer={"name": "adafactor", "min_factored": 16, "learning_rate": 1e-3},
        evaluation={"num_samples": 1},
    )
    iteration.run(config)
    run_dir = RunDir(config.run_dir)
    runtime = Runtime.reading(config)
    policies = [jax.tree.map(np.asarray, runtime.load_policy(run_dir.policy(t), TRAIN)) for t in range(2)]
    for policy in policies:
        for path, leaf in jax.tree.leaves_with_path(policy):
            if not path[-1].key.endswith("norm"):
                assert not np.any(leaf.view(np.uint32) & 0xFFFF), path
    brought = read_checkpoint(config.model.path, shardings=runtime.programs.param_shardings(TRAIN))
    assert np.any(np.asarray(brought["embed"]) != policies[0]["embed"])
    np.testing.assert_array_equal(policies[0]["embed"], brought["embed"].astype(jnp.bfloat16).astype(np.float32))
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, policies), strict=True))
    logged = [json.loads(line) for line in run_dir.metrics_path.read_text().splitlines()]
    (first,) = [row for row in logged if row["stage"] == "train" and row["step"] == 0]
    assert first["max_abs_log_ratio"] < 1e-3
