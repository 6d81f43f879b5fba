"""`dno status` of trainings, and where an iteration's wall time went."""

import io
import os

import pytest
from rich.console import Console

from dno_jax.config import RunConfig, parse_config
from dno_jax.report.training import ITERATION, note_shares, training_table
from dno_jax.run_dir import RunDir
from dno_jax.stages.sample import _growth
from tests.config.test_kinds import TREE


@pytest.fixture
def run(tmp_path):
    config = parse_config(RunConfig, {**TREE, "run_dir": str(tmp_path)}, place="test")
    return config, RunDir(tmp_path)


def finish(run, name, *, end, seconds, iteration=0, **details):
    config, run_dir = run
    stage = run_dir.stage(name, iteration)
    stage.finish(config, inputs={}, rows=1, seconds=seconds, details=details)
    os.utime(stage.manifest_path, (end, end))


def shown(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_an_iterations_time_by_stage_and_what_no_stage_covers(run):
    config, run_dir = run
    # Sampling and annotation beside each other, 20 s apart from the rest, of 200 s.
    spans = {"sample": (0, 60), "annotate": (10, 80), "pair": (80, 90), "score": (110, 120), "train": (120, 180),
             "evaluate": (180, 200)}  # fmt: skip
    for name, (begin, end) in spans.items():
        finish(run, name, end=1_000_000 + end, seconds=float(end - begin))
    found = note_shares(run_dir, config, 0)
    assert found["wall_seconds"] == pytest.approx(200, abs=0.01)
    assert found["share_waiting"] == pytest.approx(0.1, abs=1e-4)
    assert found["share_train"] == pytest.approx(0.3, abs=1e-4)
    assert found["share_annotate"] == pytest.approx(0.35, abs=1e-4)
    note_shares(run_dir, config, 0)  # resumed: it is the same iteration
    (row,) = [row for row in run_dir.read_metrics() if row["stage"] == ITERATION]
    assert row["share_waiting"] == 0.1
    finish(run, "evaluate", end=1_000_210, seconds=30.0)  # redone
    note_shares(run_dir, config, 0)
    (row,) = [row for row in run_dir.read_metrics() if row["stage"] == ITERATION]
    assert row["wall_seconds"] == 210


def test_the_table_shows_speed_padding_and_health(run):
    _, run_dir = run
    assert training_table(run_dir) is None
    for step in range(5):
        run_dir.append_metrics({
            "iteration": 0, "stage": "train", "step": step, "loss": 0.69 - 0.01 * step, "padding": 0.25, "mfu": 0.405,
            "tokens_per_second": 1.0 if step == 0 else 1234.0, "tflops_per_second": 88.0, "kl": 0.5 + step,
            "skipped": float(step == 2), "alarms": 1.0, "chosen_shift": -0.125,
        })  # fmt: skip
    run_dir.append_metrics({"iteration": 0, "stage": ITERATION, "step": 0, "share_train": 0.5, "share_waiting": 0.125})
    said = shown(training_table(run_dir))
    for figure in ("0.6500", "1,234", "88", "40.5%", "25.0%", "4.5", "-0.125", "50%", "12%"):
        assert figure in said, (figure, said)


def test_a_training_without_a_known_peak_has_no_mfu(run):
    _, run_dir = run
    run_dir.append_metrics({"iteration": 0, "stage": "sft", "step": 0, "loss": 1.5, "tokens_per_second": 10.0})
    assert "%" not in shown(training_table(run_dir))


def test_responses_that_grow_much_longer_are_told(run, capsys):
    _, run_dir = run
    finish(run, "sample", end=0, seconds=1.0, mean_tokens=100.0)
    assert _growth(run_dir, 1, {"mean_tokens": 120.0}) == {"length_growth": 1.2}
    assert capsys.readouterr().err == ""
    assert _growth(run_dir, 1, {"mean_tokens": 190.0}) == {"length_growth": 1.9}
    assert "190 tokens on average, 1.9 times" in capsys.readouterr().err
    assert _growth(run_dir, 0, {"mean_tokens": 190.0}) == {}
