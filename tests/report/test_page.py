"""report.html as it is written: one file, its numbers those of the tables, and others' words no part of its code."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from dno_jax.display import printable
from dno_jax.report import plots
from dno_jax.report import samples as samples_module
from dno_jax.report.page import write_report
from dno_jax.report.samples import Answer, Asked, browser
from dno_jax.report.summary import iteration_table, policy_table, stage_statuses, status_table
from dno_jax.report.tables import plain
from dno_jax.report.training import training_table
from tests.report.synthetic import HOSTILE, build

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """A page as a browser takes it apart: what scripts there are, what is said where, which attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.scripts, self.tables, self.attributes, self.words, self.ids = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.attributes += [(tag, name, value or "") for name, value in found.items()]
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "script":
            self.scripts.append([found.get("type", ""), found.get("id", ""), ""])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack, tag
        assert self.stack.pop() == tag, (tag, self.stack[-3:])

    def handle_data(self, data):
        if not self.stack:
            return
        if self.stack[-1] == "script":
            self.scripts[-1][2] += data
        elif {"td", "th"} & set(self.stack[-1:]):
            self.tables[-1][-1][-1] += data
        elif self.stack[-1] != "style":
            self.words.append(data)

    @property
    def prompts(self):
        chunks = [text for kind, _, text in self.scripts if kind == "text/plain"]
        return [row for chunk in chunks for row in json.loads(gzip.decompress(base64.b64decode(chunk)))]

    @property
    def code(self):
        return [text for kind, _, text in self.scripts if kind == ""]


def page_of(config, run_dir, *, pictures=False):
    return Page(write_report(run_dir, config, pictures=pictures).read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return build(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(run):
    return page_of(*run, pictures=True)


def test_the_page_is_whole_and_asks_for_nothing(run, page):
    _, run_dir = run
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
        f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in page.code
    ]
    assert not re.search(r"https?:|url\(|@import", run_dir.report_path.read_text().split("</style>")[0])
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon|innerHTML|eval\(|new Function", page.code[-1])
    linked = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")}
    assert linked <= set(page.ids)
    described = {value for _, name, value in page.attributes if name in ("aria-labelledby", "aria-describedby")}
    assert described <= set(page.ids)


def test_its_tables_are_those_of_the_terminal(run, page):
    config, run_dir = run
    shown = {tuple(map(tuple, table)) for table in page.tables}
    for renderable in (policy_table(run_dir, iterations=config.iterations), iteration_table(run_dir, config),
                       training_table(run_dir), status_table(stage_statuses(run_dir, config))):  # fmt: skip
        for table in plain(renderable)[0]:
            kept = table.without_empty_columns()
            if "judge" not in table.title:
                assert (kept.columns, *kept.rows) in shown, table.title
    assert any("70 % [45, 75]" in row for table in page.tables for row in table)


def test_every_figure_has_its_numbers_in_the_page_and_beside_it(run, page):
    _, run_dir = run
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
        ("1", "policy 0", 0.6), ("1", "the teacher", 0.52), ("2", "policy 0", 0.7), ("2", "the previous policy", 0.6),
        ("2", "the teacher", 0.52),
    ]  # fmt: skip


def test_samples_stand_side_by_side_with_scores_and_what_was_trained_on(run, page):
    _, run_dir = run
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


def test_words_of_others_are_no_code(tmp_path):
    config, run_dir = build(tmp_path, hostile=True, prompts=14, held_out=14, iterations=1)
    page = page_of(config, run_dir, pictures=True)
    raw = run_dir.report_path.read_text()
    assert page.stack == []
    assert len(page.code) == (2 if plots.installed() else 1)
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
def test_a_run_that_is_half_there_says_what_is_missing(damage, tmp_path):
    config, run_dir = build(tmp_path)
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


def test_what_is_up_to_date_is_left_alone(run, page):
    config, run_dir = run
    paths = [run_dir.report_path, *run_dir.report_files_path.iterdir()]
    before = [path.stat().mtime for path in paths]
    write_report(run_dir, config)
    assert [path.stat().mtime for path in paths] == before


def asked(count, size):
    return [Asked(f"p{i}", "iteration 0", [("user", "why?")], answers=[
        Answer(f"policy {t}", n, hashlib.sha256(f"{i}{t}{n}".encode()).hexdigest() * size, 9, "stop")
        for t in range(3) for n in range(3)]) for i in range(count)]  # fmt: skip


def test_texts_are_cut_until_they_fit(monkeypatch):
    many = asked(210, 40)
    whole = browser(many)
    assert (len(whole.chunks), whole.prompts, whole.note) == (3, 210, "")
    small = browser(many, most_bytes=sum(map(len, whole.chunks)) // 3)
    assert sum(map(len, small.chunks)) <= sum(map(len, whole.chunks)) // 3
    assert small.prompts == 210
    assert "texts are cut after" in small.note
    rows = [row for chunk in small.chunks for row in json.loads(gzip.decompress(base64.b64decode(chunk)))]
    assert len(rows) == 210
    assert all({one["w"] for one in row["a"]} == {"policy 0", "policy 1", "policy 2"} for row in rows)
    none = browser(many, most_bytes=1)  # it shows what it must
    assert none.prompts == 210


def test_of_more_prompts_than_a_page_holds_some_are_shown_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "_MOST_PROMPTS", 6)
    config, run_dir = build(tmp_path, prompts=600, samples=1)
    page = page_of(config, run_dir)
    places = [row["p"] for row in page.prompts]
    assert places.count("held out") == 3
    assert 0 < places.count("iteration 0") < 300
    assert any("prompts the first 256 are among the samples" in said for said in page.words)


def test_held_out_prompts_whose_file_is_gone_keep_their_answers(tmp_path):
    config, run_dir = build(tmp_path)
    (tmp_path / "held_out.jsonl").unlink()
    page = page_of(config, run_dir)
    row = next(row for row in page.prompts if row["i"] == "h0")
    assert row["m"] == []
    assert [one["w"] for one in row["a"]] == ["policy 0", "policy 1", "policy 2"]
    assert any("Held-out prompts are shown by their ids alone" in said for said in page.words)


def test_plots_are_drawn_of_the_figures_own_rows(run):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    _, run_dir = run
    page = page_of(*run)
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


def test_without_what_draws_them_the_numbers_are_there_open(run, monkeypatch):
    monkeypatch.setattr(plots, "installed", lambda: False)
    page = page_of(*run)
    assert len(page.code) == 1
    assert any(
        'Plots are left out, their numbers are here: pip install "dno_jax[report]"' in said for said in page.words
    )
    assert sum(tag == "details" and name == "open" for tag, name, _ in page.attributes) >= 15
