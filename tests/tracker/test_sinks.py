"""Sinks of curves: off unless asked for, and none of them stops a run."""

from __future__ import annotations

import sys
import types

import pytest

from dno_jax.config import ReportSection
from dno_jax.run_dir import RunDir
from dno_jax.tracker import Sinks, open_sinks
from dno_jax.tracker import wandb as wandb_sink


@pytest.fixture
def service(monkeypatch):
    """A stand-in for the package: what it is told, in order; `fail` names the call that fails."""
    told = []
    module = types.ModuleType("wandb")
    module.fail = ""

    def call(name):
        def act(*args, **options):
            if module.fail == name:
                raise ConnectionError("no route\x1b[31m to host")
            told.append((name, *args, options))
            return run

        return act

    run = types.SimpleNamespace(define_metric=call("define_metric"), log=call("log"))
    module.init, module.Settings = call("init"), dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(wandb_sink, "_runs", {})
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module, told


def test_nothing_is_opened_unasked(tmp_path, service):
    _, told = service
    for section, enabled in ((ReportSection(tensorboard=False), True), (ReportSection(wandb="p"), False)):
        sinks = open_sinks(section, RunDir(tmp_path), curve="train_000", enabled=enabled)
        sinks.write(0, {"train/loss": 1.0})
        sinks.close()
    assert ReportSection().wandb is None
    assert list(tmp_path.iterdir()) == []
    assert told == []


def test_a_run_directory_is_one_run_of_the_service(tmp_path, service):
    _, told = service
    section = ReportSection(tensorboard=False, wandb="mine")
    for curve in ("train_000", "train_001"):
        sinks = open_sinks(section, RunDir(tmp_path), curve=curve, first_step=3)
        sinks.write(3, {"train/loss": 0.5, "train/kl": 2.0})
        sinks.close()
    (begun,) = [row for row in told if row[0] == "init"]
    assert (begun[-1]["project"], begun[-1]["name"], begun[-1]["resume"]) == ("mine", tmp_path.name, "allow")
    assert begun[-1]["id"]
    assert [row[1] for row in told if row[0] == "log"] == [
        {f"{curve}/step": 3, f"{curve}/loss": 0.5, f"{curve}/kl": 2.0} for curve in ("train_000", "train_001")
    ]
    assert ("define_metric", "train_001/*", {"step_metric": "train_001/step"}) in told


@pytest.mark.parametrize("where", ["init", "define_metric", "log"])
def test_a_service_that_fails_is_told_once_and_left_out(where, tmp_path, service, capsys):
    module, _ = service
    module.fail = where
    sinks = open_sinks(ReportSection(wandb="mine"), RunDir(tmp_path), curve="train_000")
    for step in range(3):
        sinks.write(step, {"loss": 1.0})
    sinks.close()
    said = capsys.readouterr().err
    assert said.count("Weights & Biases is left out from here on (ConnectionError: no route\\x1b[31m to host)") == 1
    assert "\x1b" not in said
    assert len(list((tmp_path / "tensorboard" / "train_000").iterdir())) == 1  # the other one goes on
    assert "TensorBoard" not in said


def test_who_is_not_logged_in_is_not_asked(tmp_path, service, capsys, monkeypatch):
    _, told = service
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    open_sinks(ReportSection(tensorboard=False, wandb="mine"), RunDir(tmp_path), curve="train_000")
    assert "nobody is logged in" in capsys.readouterr().err
    assert told == []
    (tmp_path / ".netrc").write_text("machine wandb\n  login user\n  password x\n")
    open_sinks(ReportSection(tensorboard=False, wandb="mine"), RunDir(tmp_path), curve="train_000")
    assert [row[0] for row in told] == ["init", "define_metric"]


def test_a_package_that_is_absent_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_sinks(ReportSection(tensorboard=False, wandb="mine"), RunDir(tmp_path), curve="train_000")
    assert 'pip install "dno_jax[wandb]"' in capsys.readouterr().err


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    sinks = open_sinks(ReportSection(), RunDir(tmp_path), curve="train_000")
    sinks.write(0, {"loss": 1.0})
    sinks.close()
    assert "TensorBoard is left out from here on" in capsys.readouterr().err


def test_what_ends_a_program_is_not_kept_from_it():
    class Interrupted:
        def write(self, step, values):
            raise KeyboardInterrupt

        def close(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        Sinks({"one": Interrupted}).write(0, {})
