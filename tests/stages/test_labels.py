"""Held-out win rates beside pairs that people have labelled: what the judge gets wrong on those is taken out."""

from __future__ import annotations

import json

import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.console import PlainConsole
from dno_jax.errors import DnoError
from dno_jax.report.measured import matrix_table
from dno_jax.run_dir import RunDir
from dno_jax.stages.evaluate import _files
from tests.stages.test_compare import WORDS, make_run

PROMPT = "Say something about colour 1"


def label_file(path, *, wrong_first=2, wrong_second=4, each=20):
    """Of pairs of a brief and a long answer people prefer what the oracle prefers, but for a few of either side."""
    brief, long = WORDS["brief"], WORDS["long"]
    rows = [(brief, long, 1.0 if x >= wrong_first else 0.0) for x in range(each)]
    rows += [(long, brief, 0.0 if x >= wrong_second else 1.0) for x in range(each)]
    told = [{"prompt": f"{PROMPT} {x}", "first": a, "second": b, "preference": p} for x, (a, b, p) in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return str(path)


def evaluated(folder, path, **changes):
    quality = {"calibration": path, "min_calibration_agreement": None}
    run = make_run(folder, "one", WORDS["brief"], annotation={"quality": quality}, **changes)
    return run.stage("evaluate", 0).require().details


def shown(details):
    console = PlainConsole(width=300)
    with console.capture() as captured:
        console.print(matrix_table(details))
    return captured.get()


def test_win_rates_stand_beside_what_people_would_have_said(tmp_path):
    details = evaluated(tmp_path, label_file(tmp_path / "labels.jsonl"))
    labels, raw = details["labels"], details["win_rates"]["0"]
    # The judge is always for the brief answer. The first is brief in 18 of the 22 pairs where people prefer the first,
    # the second in 16 of the 18 where they prefer the second.
    assert labels["sensitivity"]["value"] == pytest.approx(18 / 22, abs=1e-4)
    assert labels["specificity"]["value"] == pytest.approx(16 / 18, abs=1e-4)
    assert labels["why"] == ""
    found = labels["corrected"]["0"]
    expected = (raw["rate"] + 16 / 18 - 1) / (18 / 22 + 16 / 18 - 1)
    assert found["value"] == pytest.approx(min(max(expected, 0.0), 1.0), abs=1e-3)
    assert found["low"] <= found["value"] <= found["high"]
    text = shown(details)
    assert "corrected for the judge's errors (sensitivity 82 [" in text
    assert f"policy 1 beats 0 in {100 * found['value']:.0f} [" in text


def test_labels_that_say_too_little_are_said_to(tmp_path):
    details = evaluated(tmp_path, label_file(tmp_path / "labels.jsonl", wrong_first=10, wrong_second=10))
    assert details["labels"]["corrected"] == {}
    assert "win rates are not corrected for the judge's errors: of 40 labels" in shown(details)


def test_without_labels_nothing_is_said_of_them(tmp_path):
    run = make_run(tmp_path, "one", WORDS["brief"])
    details = run.stage("evaluate", 0).require().details
    assert "labels" not in details
    assert "corrected" not in shown(details)


def test_other_labels_make_another_evaluation(tmp_path):
    path = label_file(tmp_path / "labels.jsonl")
    evaluated(tmp_path, path)
    config = RunDir(str(tmp_path / "runs" / "one")).load_config()
    before = _files(config)
    assert set(before) == {"labelled pairs"}
    label_file(tmp_path / "labels.jsonl", wrong_first=5)
    assert _files(config) != before
    (tmp_path / "labels.jsonl").unlink()
    with pytest.raises(DnoError, match=r"labels\.jsonl: cannot be read \(No such file"):
        _files(config)


def test_the_file_is_read_before_anything_is_sampled(tmp_path):
    from dno_jax.stages.preflight import _check_judges

    (tmp_path / "labels.jsonl").write_text('{"prompt": "x", "first": "a"}\n')
    evaluation = {"annotation": {"kind": "oracle", "quality": {"calibration": str(tmp_path / "labels.jsonl")}}}
    run = make_run(tmp_path, "one", WORDS["brief"], done=0)
    tree = run.load_config().model_dump(mode="json") | {"evaluation": evaluation}
    with pytest.raises(DnoError, match=r"labels\.jsonl:1: not a valid labelled pair"):
        _check_judges(parse_config(RunConfig, tree, place="test"))
