"""report.html as it is written: one file, its numbers those of the tables, and others' words no part of its code."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import re

import pytest

from dno_jax.display import printable
from dno_jax.errors import DnoError
from dno_jax.report import page as page_module
from dno_jax.report import plots
from dno_jax.report import samples as samples_module
from dno_jax.report.kept import Kept
from dno_jax.report.packing import browser
from dno_jax.report.page import write_report
from dno_jax.report.samples import Answer, Asked, Place, Reading
from dno_jax.report.summary import iteration_table, policy_table, stage_statuses, status_table
from dno_jax.report.tables import plain
from dno_jax.report.training import training_table
from tests.report.parsed import Page
from tests.report.synthetic import HOSTILE, build


def page_of(config, run_dir, *, pictures=False):
    return Page(write_report(run_dir, config, pictures=pictures).read_text())


@pytest.fixture(scope="module")
def page(whole):
    return page_of(*whole, pictures=True)


def test_the_page_is_whole_and_asks_for_nothing(whole, page):
    _, run_dir = whole
    assert page.stack == []
    assert len(page.ids) == len(set(page.ids))
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "data", "srcset", "poster", "style"):
            assert value.startswith("#") or value == "data:,", (tag, name, value)
        assert not name.startswith("on"), (tag, name)
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert policy.split("script-src ")[1].split(";")[0].split() == [
        f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
        for code in (*page.libraries, *page.code)
    ]
    assert not re.search(r"https?:|url\(|@import", run_dir.report_path.read_text().split("</style>")[0])
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon|innerHTML|eval\(|new Function", page.code[-1])
    linked = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")}
    assert linked <= set(page.ids)
    described = {value for _, name, value in page.attributes if name in ("aria-labelledby", "aria-describedby")}
    assert described <= set(page.ids)


def test_its_tables_are_those_of_the_terminal(whole, page):
    config, run_dir = whole
    shown = {tuple(map(tuple, table)) for table in page.tables}
    for renderable in (policy_table(run_dir, iterations=config.iterations), iteration_table(run_dir, config),
                       training_table(run_dir), status_table(stage_statuses(run_dir, config))):  # fmt: skip
        for table in plain(renderable)[0]:
            kept = table.without_empty_columns()
            if "judge" not in table.title:
                assert (kept.columns, *kept.rows) in shown, table.title
    assert any("70 % [45, 75]" in row for table in page.tables for row in table)


def test_every_figure_has_its_numbers_in_the_page_and_beside_it(whole, page):
    _, run_dir = whole
    names = {path.name.removesuffix(".csv") for path in run_dir.report_files_path.iterdir() if path.suffix == ".csv"}
    assert {"win_rates", "lengths", "matrix", "funnel", "kinds", "margins", "scores", "tokens", "cut", "loss",
            "logprobs", "rewards", "grad_norm", "kl", "judge", "seconds", "audit"} <= names  # fmt: skip
    for name in names:
        assert f"figure-{name}" in page.ids
        rows = list(csv.reader((run_dir.report_files_path / f"{name}.csv").read_text().splitlines()))
        own = next(table for table in page.tables if table[0] == rows[0] and len(table) <= len(rows))
        assert len(own) > 1
    rates = list(csv.DictReader((run_dir.report_files_path / "win_rates.csv").read_text().splitlines()))
    assert [(row["policy"], row["against"], float(row["win rate"])) for row in rates] == [
        ("1", "policy 0", 0.6), ("2", "policy 0", 0.7), ("2", "the previous policy", 0.6), ("1", "the teacher", 0.52),
        ("2", "the teacher", 0.52),
    ]  # fmt: skip


def test_samples_stand_side_by_side_with_scores_and_what_was_trained_on(whole, page):
    _, run_dir = whole
    rows = {row["i"]: row for row in page.prompts}
    assert len(page.prompts) == 12 + 6
    held_out = rows["h0"]
    assert [one["w"] for one in held_out["a"]] == ["policy 0", "policy 1", "policy 2", "the teacher"]
    verdict = json.loads(
        (run_dir.stage("evaluate", 1).path / "judgements" / "0000000.jsonl").read_text().split("\n")[0]
    )
    wins = verdict["wins"]
    assert [one["s"] for one in held_out["a"]] == [round((sum(row) - 0.5) / 3, 3) for row in wins]
    trained = rows["p1"]
    assert (trained["p"], len(trained["a"]), trained["m"][0][0]) == ("iteration 1", 4, "user")
    assert sorted(one["s"] for one in trained["a"]) == [0, 1, 2, 3]
    assert [one["s"] for one in trained["a"] if one.get("c")] == [3]
    assert [one["s"] for one in trained["a"] if one.get("r")] == [0]
    assert [one["n"] for one in trained["a"] if one.get("f")] == [1]
    assert trained["j"] == ["The first is shorter, the second is right."]


def test_words_of_others_are_no_code(hostile):
    config, run_dir = hostile
    page = page_of(config, run_dir, pictures=True)
    raw = run_dir.report_path.read_text()
    assert page.stack == []
    assert len(page.code) == 1
    assert len(page.libraries) == int(plots.installed())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\U000e0041]", raw)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not [value for _, name, value in page.attributes if name == "href" and "javascript" in value]
    said = "\n".join(page.words)
    assert printable("<b>run\x1b[31m") in said
    assert HOSTILE[0] in said  # in the judge's name, as words
    texts = {one["t"] for row in page.prompts for one in row["a"]} | {row["m"][0][1] for row in page.prompts}
    assert {printable(text) for text in HOSTILE} <= texts
    assert any(text.endswith("996,000 more characters") for text in texts)
    for kind, _, text in page.scripts:
        if kind == "application/json":
            json.loads(text)
            assert "<" not in text
    for path in run_dir.report_files_path.iterdir():
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", path.read_text()), path


@pytest.mark.parametrize("damage", ["begun", "no weights", "no shards", "torn", "edited", "nothing"])
def test_a_run_that_is_half_there_says_what_is_missing(damage, copied, tmp_path):
    config, run_dir = copied
    stages = {name: run_dir.stage(name, 1) for name in ("sample", "pair", "train", "evaluate")}
    if damage == "begun":
        for name in ("train", "evaluate"):
            stages[name].manifest_path.unlink()
        run_dir.export_path.rmdir()
        expected = "The run is unfinished: train of iteration 1 is not done; 1 stages come after it."
    elif damage == "no weights":
        run_dir.policy(1).rmdir()
        expected = "The weights of policy 1 are gone"
    elif damage == "no shards":
        (stages["sample"].path / "0000000.jsonl").unlink()
        expected = "0000000 of 1 shards missing"
    elif damage == "torn":
        stages["pair"].manifest_path.write_text("{")
        expected = "not a valid Manifest"
    elif damage == "edited":
        path = stages["evaluate"].manifest_path
        path.write_text(path.read_text().replace('"rows": 1', '"rows": 2'))
        expected = "edited since the stage wrote it"
    else:
        for path in run_dir.path.glob("iterations/*"):
            path.rename(tmp_path / path.name)
        expected = "The run is unfinished: sample of iteration 0 is not done"
    page = page_of(config, run_dir)
    assert page.stack == []
    assert any(expected in said for said in page.words), page.words
    if damage != "nothing":
        assert page.prompts
        assert any(row[:5] == ["1", "policy 0", "0.6", "0.45", "0.75"] for table in page.tables for row in table)


def test_what_is_up_to_date_is_left_alone(whole, page):
    config, run_dir = whole
    paths = [run_dir.report_path, *run_dir.report_files_path.iterdir()]
    before = [path.stat().mtime for path in paths]
    write_report(run_dir, config)
    assert [path.stat().mtime for path in paths] == before


def test_a_fault_of_the_report_costs_the_run_nothing_else(whole, monkeypatch, capsys):
    def fault(*_, **__):
        raise RuntimeError("\x1b[31m")

    monkeypatch.setattr(page_module, "read_facts", fault)
    page_module.refresh(whole[1], whole[0])
    assert "report.html is not up to date (RuntimeError: \\x1b[31m)" in capsys.readouterr().err
    monkeypatch.setattr(page_module, "read_facts", lambda *_: (_ for _ in ()).throw(DnoError("full")))
    with pytest.raises(DnoError, match="full"):
        page_module.refresh(whole[1], whole[0])


def test_figures_that_an_earlier_version_did_not_note_are_left_out_alone(copied):
    config, run_dir = copied
    stage = run_dir.stage("evaluate", 1)
    details = stage.require().details | {"lengths": {"0": {"mean_words": 3.0}}}
    stage.finish(config, inputs={}, rows=1, seconds=1.0, details=details)
    page = page_of(config, run_dir)
    assert any("The figure of lengths is left out: KeyError" in said for said in page.words)
    assert "figure-win_rates" in page.ids


def asked(count, size):
    many = [Asked(f"p{i}", "iteration 0", [("user", "why?")], answers=[
        Answer(f"policy {t}", n, hashlib.sha256(f"{i}{t}{n}".encode()).hexdigest() * size, 9, "stop")
        for t in range(3) for n in range(3)]) for i in range(count)]  # fmt: skip
    return [Place("iteration 0", lambda: Reading(many), kept=Kept())]


def test_texts_are_cut_until_they_fit():
    many = asked(210, 40)
    uncut = browser(many)
    assert (len(uncut.chunks), uncut.prompts, uncut.note) == (3, 210, "")
    small = browser(many, most_bytes=sum(map(len, uncut.chunks)) // 3)
    assert sum(map(len, small.chunks)) <= sum(map(len, uncut.chunks)) // 3
    assert small.prompts == 210
    assert "texts are cut after" in small.note
    rows = [row for chunk in small.chunks for row in json.loads(gzip.decompress(base64.b64decode(chunk)))]
    assert len(rows) == 210
    assert all({one["w"] for one in row["a"]} == {"policy 0", "policy 1", "policy 2"} for row in rows)
    none = browser(many, most_bytes=1)  # it shows what it must
    assert none.prompts == 210


def test_of_more_prompts_than_a_page_holds_some_are_shown_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "_MOST_PROMPTS", 6)
    config, run_dir = build(tmp_path, prompts=300, samples=1, iterations=1)
    page = page_of(config, run_dir)
    places = [row["p"] for row in page.prompts]
    assert places.count("held out") == 3
    assert 0 < places.count("iteration 0") < 300
    assert any("prompts the first 256 are here" in said for said in page.words)


def test_held_out_prompts_whose_file_is_gone_keep_their_answers(copied, tmp_path):
    config, run_dir = copied
    gone = config.prompts.model_copy(update={"held_out_path": str(tmp_path / "gone.jsonl")})
    page = page_of(config.model_copy(update={"prompts": gone}), run_dir)
    row = next(row for row in page.prompts if row["i"] == "h0")
    assert row["m"] == []
    assert [one["w"] for one in row["a"]] == ["policy 0", "policy 1", "policy 2"]
    assert any("Held-out prompts are shown by their ids alone" in said for said in page.words)


def test_plots_are_drawn_of_the_figures_own_rows(whole):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    _, run_dir = whole
    page = page_of(*whole)
    specs = {name.removeprefix("spec-"): json.loads(text) for _, name, text in page.scripts if name.startswith("spec-")}
    assert {"win_rates", "matrix", "loss", "tokens", "kinds"} <= set(specs)
    for name, spec in specs.items():
        rows = list(csv.reader((run_dir.report_files_path / f"{name}.csv").read_text().splitlines()))
        assert [[str(cell) for cell in row.values()] for row in spec["datasets"]["rows"]] == [
            [cell or "None" for cell in row] for row in rows[1:]
        ]
        assert spec["description"]
        assert (run_dir.report_files_path / f"{name}.svg").read_text().startswith("<svg")
    assert not any("Plots are left out" in said for said in page.words)


def test_without_what_draws_them_the_numbers_are_there_open(whole, monkeypatch):
    monkeypatch.setattr(plots, "installed", lambda: False)
    page = page_of(*whole)
    assert len(page.code) == 1
    assert any(
        'Plots are left out, their numbers are here: pip install "dno_jax[report]"' in said for said in page.words
    )
    assert sum(tag == "details" and name == "open" for tag, name, _ in page.attributes) >= 15


def test_what_an_evaluation_says_of_all_players_is_shown(copied):
    config, run_dir = copied
    stage = run_dir.stage("evaluate", 1)
    rate = {"value": 0.64, "low": 0.55, "high": 0.72, "n": 60, "prompts": 6}
    comparison = {
        "players": ["0", "1", "2", "gold"], "policies": ["0", "1", "2"],
        "rates": [[0.5, 0.4, 0.3, None], [0.6, 0.5, 0.4, 0.51], [0.7, 0.6, 0.5, 0.52], [None, 0.49, 0.48, 0.5]],
        "pairs": [{"player": "2", "opponent": "0", **rate, "value": 0.7, "ties": 0.1}],
        # As a run writes them: the earlier player first.
        "length_controlled": [{"player": "0", "opponent": "2", **rate}, {"player": "1", "opponent": "2", **rate}],
        "neighbours": [{"player": "2", "opponent": "1", "rate": 0.6, "low": 0.48, "high": 0.7, "different": False}],
        "nash": {"shares": {"0": 0.0, "1": 0.25, "2": 0.75}, "gap": 0.02, "gaps": {"0": 0.4, "1": 0.2, "2": 0.0}},
        "choice": {"best": "2", "alike": ["1"], "flattery": 0.013},
        "cycles": {"observed": 1, "triples": 4, "expected": 0.31, "p": 0.4},
        "stop": "policy 2 does not beat policy 1: the interval includes 50 %",
    }  # fmt: skip
    details = stage.require().details
    right = {"value": 0.625, "low": 0.5, "high": 0.75, "n": 40, "prompts": 40}
    labels = {"sensitivity": right, "specificity": right, "why": "", "corrected": {"1": rate | {"value": 0.66}}}
    guard = {
        "questions": 40,
        "not_asked": [1],
        "accuracy": {"0": right, "2": right | {"value": 0.55}},
        "warnings": ["sums are forgotten"],
    }
    more = {"comparison": comparison, "judge": "<b>another</b>", "warnings": ["6 held-out prompts are few"]}
    more |= {"guard": guard, "labels": labels, "win_rates": {"1": rate | {"rate": 0.61}}}
    suite = run_dir.path / "suites" / "alpaca_eval" / "policy-002"
    suite.mkdir(parents=True)
    (suite / "results.json").write_text(
        '{"policy": 2, "win_rate": 12.5, "standard_error": 1.25, "length_controlled_winrate": 13.5, "n_total": 805, '
        '"avg_length": 1500}'
    )
    stage.finish(config, inputs={}, rows=1, seconds=1.0, details=details | more)
    page = page_of(config, run_dir)
    said = "\n".join(page.words)
    for sentence in (
        "warning: 6 held-out prompts are few",
        "warning: sums are forgotten",
        "judged by <b>another</b>",
        "does not beat policy 1",
        "not told apart from it: policy 1",
        "about 1.3 points",
        "1 of 4 triples",
        "would show 0.3",
        "Not asked the guard's questions, their weights being gone: policy 1.",
        "corrected for the judge's errors (sensitivity 62 [50, 75] % of 40, specificity 62 [50, 75] % of 40 labels): "
        "policy 2 beats 1 in 66 [55, 72] %",
    ):
        assert sentence in said
    assert "Not measured: win rates at equal length" not in said
    rows = {tuple(row) for table in page.tables for row in table}
    assert ("policy 2", "policy 0", "0.7", "0.55", "0.72") in rows
    assert ("the teacher", "policy 1", "0.49", "", "") in rows
    assert ("policy 2", "policy 0", "0.36", "0.28", "0.45", "6") in rows
    assert ("policy 2", "policy 1", "0.66", "0.55", "0.72", "0.61") in rows
    assert ("policy 2", "policy 1", "0.6", "0.48", "0.7", "no") in rows
    assert ("policy 2", "0.55", "0.5", "0.75", "40") in rows
    assert ("alpaca_eval", "policy 2", "12.5", "1.25", "13.5", "805", "1,500") in rows
    assert ("policy 2", "0.75", "0") in rows or ("policy 2", "0.75", "0.0") in rows


def test_what_was_not_compared_is_said(page):
    assert any(said.startswith("Not measured: win rates at equal length, cycles, and the Nash") for said in page.words)
