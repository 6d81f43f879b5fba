"""`dno config`: every field as a person reads it, from the models themselves."""

from __future__ import annotations

import sys

import pytest

from dno_jax.cli import main as cli
from dno_jax.config import RewardConfig, RunConfig, SftConfig
from dno_jax.config.fields import described


@pytest.mark.parametrize("kind", [RunConfig, SftConfig, RewardConfig])
def test_every_field_has_a_kind_and_a_description(kind):
    fields = list(described(kind))
    assert len({field.name for field in fields}) == len(fields)
    for field in fields:
        is_section = any(other.name.startswith((f"{field.name}.", f"{field.name}[")) for other in fields)
        assert is_section or field.description, field.name
        assert "\n" not in field.description
        assert is_section or field.kind in ("decides", "contents", "rounds", "costs"), field.name
        assert (field.kind == "decides") <= bool(field.stages), field.name


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dno", "config", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["loss.beta"], ["loss.beta = 0.1"]),
        (["mesh"], ["mesh.data = -1", "    rounds: devices along it; -1: all that are left; rows are split over it"]),
        (["annotation.openai"], ["annotation.openai.max_tokens = 2048", "annotation.openai.base_url = null",
                                 "    decides annotate, evaluate: tokens of the longest reply"]),
        (["annotation.table"], ["annotation.table = null", "annotation.table.answers (has to be given)"]),
        (["annotation.prices"], ["annotation.prices = {}", "annotation.prices.NAME.batch = 0.5"]),
        (["annotation.ensemble"], ["annotation.ensemble = []", "annotation.ensemble[].form = listwise"]),
        (["outer"], ["    decides pair, score, train, evaluate: one of last, average, proximal, optimistic, "
                     "extragradient, lookahead; "
                     "which policies there are, and which are returned"]),
        (["run_dir"], ["run_dir (has to be given)"]),
        ([], ["seed = 0", "evaluation.annotation.openai.form = listwise"]),
        (["--sft"], ["data.path (has to be given)"]),
        (["--reward"], ["pairs.path = null", "    contents reward: a run directory in place of `path`: every pair of "
                        "every pool that its judge has compared"]),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_listed(monkeypatch, capsys, arguments, lines):
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    for line in lines:
        assert line in out.splitlines()
    prefix = arguments[0] if arguments and arguments[0] not in ("--sft", "--reward") else ""
    names = [line.partition(" ")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert all(f"{name}".startswith(prefix) for name in names)


@pytest.mark.parametrize("name", ["annotatoin", "loss.bet", "loss.beta.x", ""])
def test_an_unknown_section_names_the_known_ones(monkeypatch, capsys, name):
    code, _, err = run(monkeypatch, capsys, name)
    assert code == 2
    assert "known: run_dir, seed, iterations, model" in err
