"""`dno annotations`: what judges were paid for, listed, exported and purged."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from contextlib import closing

import pytest

from dno_jax.annotation.ledger.store import Receipt, VerdictStore
from dno_jax.annotation.question import Verdict
from dno_jax.cli import main as cli
from dno_jax.config import RunConfig, parse_config
from dno_jax.run_dir import RunDir
from tests.small import small_tree

VERDICTS = {
    "a": ("openai gpt-1", Verdict("ok", (6.0, 1.0), raw="日本", tries=1, tokens_in=1200, tokens_out=30, usd=0.5)),
    "b": ("openai gpt-1", Verdict("refused", detail="no", tries=2, tokens_in=10, usd=0.25)),
    "c": ("openai gpt-2", Verdict("tie", (0.5, 0.5), tries=1)),
    "d": ("openai gpt-2", Verdict("refused", detail="no", tries=1)),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "annotations.sqlite"

    async def fill(store: VerdictStore) -> None:
        for key, (judge, verdict) in VERDICTS.items():
            paid = Receipt(".", judge.split()[1], requests=verdict.tries, usd=verdict.usd)
            await store.put(key, verdict, judge=judge, prompt_id="p", paid=paid)

    with closing(VerdictStore(path)) as store:
        asyncio.run(fill(store))
    return path


@pytest.fixture
def dno(monkeypatch, capsys):
    """Run `dno annotations`; return its exit status and what it said, each run of blanks as one."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dno", "annotations", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, " ".join((captured.out + captured.err).split())

    return run


def test_verdicts_are_counted_by_judge_and_state_with_what_they_took(path, dno):
    code, said = dno("list", path)
    assert code == 0
    assert "openai gpt-1 ok 1 1 1,200 30 0.5000" in said
    assert "openai gpt-1 refused 1 2 10 0 0.2500" in said
    assert "openai gpt-2 tie 1 1 0 0 0.0000" in said
    assert ". gpt-1 3 0 0 0 0.7500" in said
    code, said = dno("list", path, "--judge", "gpt-2", "--state", "refused")
    assert "openai gpt-2 refused 1" in said
    assert "openai gpt-2 tie" not in said
    assert "openai gpt-1" not in said


def test_an_export_holds_every_verdict_as_it_is(path, dno, tmp_path):
    out = tmp_path / "out" / "verdicts.jsonl"
    code, said = dno("export", path, out)
    assert (code, "4 verdicts exported" in said) == (0, True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["key"] for row in rows] == list(VERDICTS)
    for row in rows:
        judge, verdict = VERDICTS[row["key"]]
        assert (row["judge"], row["state"], row["raw"], row["usd"]) == (judge, verdict.state, verdict.raw, verdict.usd)
        assert row["scores"] == (None if verdict.scores is None else list(verdict.scores))
    assert "日本" in out.read_text()
    some = out.with_name("refused.jsonl")
    dno("export", path, some, "--state", "refused")
    assert len(some.read_text().splitlines()) == 2
    assert {file.name for file in out.parent.iterdir()} == {out.name, some.name}


def test_an_export_replaces_nothing_and_least_of_all_the_store(path, dno):
    before = path.read_bytes()
    code, said = dno("export", path, path)
    assert code == 2
    assert f"{path} exists: give another name" in said
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", [["list"], ["export", "out.jsonl"], ["purge", "--judge", "gpt-1", "--yes"]])
def test_another_database_is_left_as_it_is(dno, tmp_path, command):
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE mine (x)")
    before = other.read_bytes()
    name, *rest = command
    code, said = dno(name, other, *[tmp_path / word if word.endswith("jsonl") else word for word in rest])
    assert code == 2
    assert f"{other}: no store of verdicts; give a run directory" in said
    assert other.read_bytes() == before


def test_a_purge_counts_first_and_deletes_what_is_asked_for(path, dno):
    code, said = dno("purge", path, "--judge", "gpt-2", "--state", "refused")
    assert code == 0
    assert "1 verdicts would be deleted; add --yes" in said
    with closing(VerdictStore(path)) as store:
        assert len(list(store.rows())) == 4
    assert "1 verdicts deleted" in dno("purge", path, "--judge", "gpt-2", "--state", "refused", "--yes")[1]
    with closing(VerdictStore(path)) as store:
        assert [row["key"] for row in store.rows()] == ["a", "b", "c"]
        assert store.spent(".") == 0.75


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_directory_stands_for_its_store(path, dno, tmp_path, shared):
    tree = small_tree(tmp_path)
    if shared:
        tree["annotation"]["store"] = str(path)
    config = parse_config(RunConfig, tree, place="test")
    run_dir = RunDir(config.run_dir)
    run_dir.create(config)
    if not shared:
        assert dno("list", run_dir.path)[0] == 2  # its judge is not paid
        path.rename(run_dir.annotations_path)
    assert "openai gpt-1 ok 1" in dno("list", run_dir.path)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "none.sqlite"], "none.sqlite: no such file"),
        (["list", "."], "no run directory"),
        (["list", "annotations.sqlite", "--state", "good"], "--state is 'good'; expected one of ok, tie, refused"),
        (["purge", "annotations.sqlite", "--yes"], "say which: --judge, --state or both"),
        (["export", "text", "out.jsonl"], "not a sound database"),
    ],
)
def test_bad_input_is_named(path, dno, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no database " * 500)
    code, said = dno(*arguments)
    assert code == 2
    assert said.startswith("dno: ")
    assert message in said
    assert {file.name for file in tmp_path.iterdir()} <= {"annotations.sqlite", "text"}
