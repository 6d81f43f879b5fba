"""A run's report is written after every stage: only what is new is read and made, and the page is what it would be."""

from __future__ import annotations

import shutil

import pytest

from dno_jax.data.pairs import PairFile
from dno_jax.data.prompts import load_prompts
from dno_jax.errors import DnoError
from dno_jax.report import plots
from dno_jax.report.kept import Kept
from dno_jax.report.page import write_report
from dno_jax.stage_dir import StageDir
from tests.report.parsed import Page

ORDER = ("sample", "annotate", "pair", "score", "train", "evaluate")


@pytest.fixture
def reads(monkeypatch):
    """Every file of samples, verdicts or pairs that is read, as "iteration/folder/file"."""
    found = []
    read_shard, init = StageDir.read_shard, PairFile.__init__

    def noted_shard(self, kind, name):
        found.append("/".join((self.path / name).parts[-4 if self.path.name[0] in "pj" else -3 :]))
        return read_shard(self, kind, name)

    def noted_pairs(self, path):
        found.append(str(path))
        init(self, path)

    monkeypatch.setattr(StageDir, "read_shard", noted_shard)
    monkeypatch.setattr(PairFile, "__init__", noted_pairs)
    return found


def test_it_is_the_page_that_would_be_written_from_nothing_and_reads_what_is_new(copied, reads, monkeypatch):
    config, run_dir = copied
    held_out = load_prompts(config.prompts.held_out_path)
    stages = [run_dir.stage(name, t) for t in range(2) for name in ORDER]
    manifests = [stage.manifest_path.read_text() for stage in stages]
    for stage in stages:
        stage.manifest_path.unlink()
    kept, read, draws = Kept(), {}, plots.installed()

    def written(**options):
        write_report(run_dir, config, pictures=False, held_out=held_out, **options)
        return run_dir.report_path.read_bytes()

    for stage, manifest in zip(stages, manifests, strict=True):
        stage.manifest_path.write_text(manifest)
        monkeypatch.setattr(plots, "installed", lambda s=stage: draws and s.stage == "evaluate")  # they take longest
        reads.clear()
        page = written(kept=kept)
        read[stage.stage, stage.iteration] = list(reads)
        assert page == written(), stage.path
        reads.clear()
        assert written(kept=kept) == page
        assert stage.stage == "sample" or reads == [], stage.path  # while verdicts come in it is looked at again
    for t in range(2):
        assert read["score", t] == read["train", t] == []
        for stage in ("annotate", "pair"):
            assert read[stage, t]
            assert all(f"00{t}/" in path for path in read[stage, t])
        assert read["evaluate", t]
        assert all("evaluation/" in path for path in read["evaluate", t])
    assert len(Page(page.decode()).prompts) == 12 + 6
    reads.clear()
    write_report(run_dir, config, pictures=False, held_out=held_out[:3], kept=kept)  # others: they are read again
    assert reads
    assert [row["m"] for row in Page(run_dir.report_path.read_text()).prompts][3:6] == [[], [], []]


def test_what_could_not_be_read_is_tried_again(copied, tmp_path):
    config, run_dir = copied
    held_out, kept = load_prompts(config.prompts.held_out_path), Kept()
    path = run_dir.stage("sample", 1).path / "0000000.jsonl"
    for damage in (True, False):
        if damage:
            path.rename(tmp_path / path.name)
        else:
            (tmp_path / path.name).rename(path)
        write_report(run_dir, config, pictures=False, held_out=held_out, kept=kept)
        found = Page(run_dir.report_path.read_text())
        assert damage == any("0000000 of 1 shards missing" in said for said in found.words)
        assert len(found.prompts) == (12 if damage else 18)


def test_what_the_last_page_was_not_made_of_is_let_go():
    kept, made = Kept(), []

    def make(name):
        return kept.once(name, lambda: made.append(name) or name)

    for _ in range(2):
        assert (make("a"), make("b")) == ("a", "b")
        kept.turn()
    assert made == ["a", "b"]
    make("a")
    kept.turn()
    make("b")
    assert made == ["a", "b", "b"]
    with pytest.raises(DnoError):
        kept.once("c", lambda: (_ for _ in ()).throw(DnoError("not there")))
    assert kept.once("c", lambda: 3) == 3


def test_a_picture_is_drawn_anew_where_its_numbers_or_what_draws_it_changed(copied, monkeypatch):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    config, run_dir = copied
    shutil.rmtree(run_dir.report_files_path, ignore_errors=True)  # others may have written it
    drawn = []
    monkeypatch.setattr(plots, "svg", lambda spec: drawn.append(spec["description"].split(".")[0]) or "<svg></svg>")
    write_report(run_dir, config)
    count = len(drawn)
    assert count >= 15
    write_report(run_dir, config)
    assert len(drawn) == count
    stage = run_dir.stage("evaluate", 1)
    details = stage.require().details
    rates = details["win_rates"] | {"0": details["win_rates"]["0"] | {"rate": 0.71}}
    stage.finish(config, inputs={}, rows=1, seconds=stage.require().seconds, details=details | {"win_rates": rates})
    write_report(run_dir, config)
    assert drawn[count:] == ["Win rate by policy"]
    monkeypatch.setattr(plots, "version", lambda: "another")
    write_report(run_dir, config)
    assert len(drawn) == 2 * count + 1


def test_what_draws_is_made_once_and_anew_where_its_file_is_damaged(tmp_path, monkeypatch):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    class Converter:
        def javascript_bundle(self, vl_version):
            made.append(vl_version)
            return "draw();\n"

    monkeypatch.setattr(
        plots, "_module", lambda name, real=plots._module: Converter() if name == "vl_convert" else real(name)
    )

    def library():
        plots.library.cache_clear()
        return plots.library()

    try:
        assert library() == library() == "draw();\n"
        assert len(made) == 1
        (path,) = (tmp_path / "dno_jax").iterdir()
        path.write_text(path.read_text().replace("draw", "dra"))
        assert library() == "draw();\n"
        assert len(made) == 2
        path.write_bytes(b"\xff")
        assert library() == library() == "draw();\n"
        assert len(made) == 3
        path.unlink()
        (tmp_path / "dno_jax").rmdir()
        (tmp_path / "dno_jax").write_text("a file where the folder should be")
        assert library() == "draw();\n"
    finally:
        plots.library.cache_clear()
