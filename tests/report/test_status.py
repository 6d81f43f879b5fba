"""`dno status` for programs and for those who wait, and the line after an iteration."""

from __future__ import annotations

import io
import json
import threading
from types import SimpleNamespace

import pytest

from dno_jax import iteration
from dno_jax.cli import looking
from dno_jax.console import Meter, PlainConsole
from dno_jax.data.prompts import load_prompts
from dno_jax.errors import DnoError
from dno_jax.report import status
from dno_jax.report.kept import Kept
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime


def unfinish(run_dir, *names, iteration=1):
    for name in names:
        run_dir.stage(name, iteration).manifest_path.unlink()


def test_a_finished_run_in_one_object(whole, capsys):
    _, run_dir = whole
    looking.status(str(run_dir.path), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["finished"], found["next"], found["stages_done"], found["stages_left"]) == (True, None, 12, 0)
    assert (found["policy"], found["best"], found["usd"], found["in_use_by"]) == (2, 2, None, None)
    assert found["win_rates"]["0"]["rate"] == pytest.approx(0.7)
    assert found["training"] == {"iteration": 1, "stage": "train", "step": 7, "loss": pytest.approx(0.62)}
    assert [row["seconds"] for row in found["stages"] if row["stage"] == "sample"] == [1.25, 2.25]


def test_an_unfinished_run_has_the_same_keys_and_says_what_is_left(copied):
    _, run_dir = copied
    keys = status.facts(run_dir).keys()
    unfinish(run_dir, "evaluate", "train", "score")
    run_dir.receipts_path.write_text('{"usd": 12.5, "stores": {}}')
    with run_dir.held():
        found = status.facts(run_dir)
    assert found.keys() == keys
    assert found["in_use_by"].startswith("process ")
    assert found["next"] == {"iteration": 1, "stage": "score", "shards": 0}
    assert found["stages_left"] == 3
    assert found["seconds_left"] == pytest.approx(1.25 + 1.25 + 0.5)  # as iteration 0 took
    assert status.line(found) == (
        "score of iteration 1 (of 2); policy 1 beats policy 0 in 60 % [45, 75]; 12.0 words (12.0 at the start); "
        "$12.50; about 3 s left"
    )
    run_dir.stage("score", 1).finish(run_dir.load_config(), inputs={}, rows=1, seconds=1.0)
    assert status.line(status.facts(run_dir)).startswith("train of iteration 1 (of 2); step 7, loss 0.6200; policy 1")
    unfinish(run_dir, "sample", "train", "evaluate", iteration=0)
    assert status.facts(run_dir)["seconds_left"] is None  # nothing to go by


def test_nothing_begun_is_a_state_too(copied, tmp_path):
    _, run_dir = copied
    (run_dir.path / "iterations").rename(tmp_path / "away")
    run_dir.metrics_path.unlink()
    found = status.facts(run_dir)
    assert (found["training"], found["policy"], found["win_rates"]) == (None, None, {})
    assert status.line(found) == "sample of iteration 0 (of 2)"
    with pytest.raises(DnoError, match="no run directory"):
        status.facts(RunDir(tmp_path / "nowhere"))


def test_an_iteration_says_what_it_reached_and_an_earlier_one_is_silent(whole):
    _, run_dir = whole
    assert status.standing(run_dir, 1) == (
        "iteration 1 (of 2) is done; policy 2 beats policy 0 in 70 % [45, 75]; 12.0 words (12.0 at the start)"
    )
    assert status.standing(run_dir, 0) == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_without_a_terminal_says_a_line_a_change_and_ends_with_the_run(as_json, copied, capsys, monkeypatch):
    config, run_dir = copied
    details = run_dir.stage("evaluate", 1).require().details
    unfinish(run_dir, "evaluate")
    looks = []

    def sleep(_):
        looks.append(1)
        if len(looks) == 3:
            run_dir.stage("evaluate", 1).finish(config, inputs={}, rows=1, seconds=0.5, details=details)

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep))  # its own alone: other threads sleep too
    looking.status(str(run_dir.path), watch=True, every=0.1, as_json=as_json)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 2
    assert len(looks) == 3
    if as_json:
        assert [json.loads(line)["finished"] for line in lines] == [False, True]
    else:
        assert lines[0].startswith("evaluate of iteration 1 (of 2)")
        assert lines[1].startswith("finished; policy 2 beats policy 0 in 70 % [45, 75]")
    assert "\x1b" not in captured.out
    assert captured.err == ""  # that is for what goes wrong


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_watching_on_a_terminal_is_whole_and_inert(width, colour, hostile, monkeypatch):
    _, run_dir = hostile
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, width=width, height=80, color_system=colour)
    monkeypatch.setattr(status, "results", console)
    status.watch(run_dir, every=0.1)
    said = out.getvalue()
    assert "finished; policy 1 beats policy 0" in said
    assert "policies on held-out prompts" in said
    assert "\x1b[31m" not in said or colour  # of the run's name; colours are the console's own
    assert "\x1b]0;" not in said


def test_what_contradicts_itself_is_refused(whole):
    _, run_dir = whole
    with pytest.raises(DnoError, match="--verify"):
        looking.status(str(run_dir.path), verify=True, watch=True)


def test_the_report_command_says_where_the_page_is(hostile, capsys):
    _, run_dir = hostile
    looking.report(str(run_dir.path))
    said = capsys.readouterr().out
    assert said.strip().endswith("run\\x1b[31m/report.html")
    assert run_dir.report_path.exists()


def test_a_meter_asks_for_its_word_once_a_second_at_most(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dno_jax.console.time.monotonic", lambda: now[0])
    asked = []

    def paid():
        asked.append(now[0])
        return f"${len(asked)}.00"

    with Meter("annotate  0", total=40, unit="pools", aside=paid) as meter:
        for _ in range(40):
            now[0] += 0.3
            meter.advance(1)
    assert len(asked) == 10
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("annotate  0 $9.00: 34/40 pools") or "pools" in lines[0]
    assert lines[-1].startswith("annotate  0 $10.00: 40/40 pools (3.3/s)")


def test_a_lock_is_seen_while_it_is_held(tmp_path):
    folder = RunDir(tmp_path)
    assert folder.holder() is None
    with folder.held():
        found = []
        thread = threading.Thread(target=lambda: found.append(RunDir(tmp_path).holder()))
        thread.start()
        thread.join()
        assert found[0].startswith("process ")
    assert folder.holder() is None


def test_the_loop_writes_the_report_after_stages_and_says_what_an_iteration_reached(copied, monkeypatch, capsys):
    """Whatever the stages do: here they find that they are done."""
    config, run_dir = copied
    run_dir.report_path.unlink(missing_ok=True)
    seen = []

    def stage(name):
        def act(*_, **__):
            seen.append((name, run_dir.report_path.exists()))
            return run_dir.stage(name, 1).manifest()

        return act

    monkeypatch.setattr(iteration, "sample_and_annotate", stage("sample"))
    for name in ("pair", "score", "train", "evaluate"):
        monkeypatch.setattr(getattr(iteration, name), "run", stage(name))
    monkeypatch.setattr(iteration.pruning, "prune", lambda *_: None)
    held_out = load_prompts(config.prompts.held_out_path)
    found = {"config": config, "run_dir": run_dir, "prompts": SimpleNamespace(split=SimpleNamespace(held_out=held_out))}
    runtime = object.__new__(type("Here", (Runtime,), found))  # nothing is to be computed
    iteration.run_iteration(runtime, 1, Kept())
    assert seen == [("sample", False), ("pair", True), ("score", True), ("train", True), ("evaluate", True)]
    said = capsys.readouterr().err
    assert said.count("iteration 1 (of 2) is done; policy 2 beats policy 0 in 70 % [45, 75]") == 1
    assert run_dir.report_path.exists()
