"""What a person gets wrong about a judge, by `dno annotate`: named, exit status 2, no traceback, nothing lost."""

import contextlib
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dno_jax.annotation.ledger.store import VerdictStore
from dno_jax.cli import main as cli
from dno_jax.fake_judge import FakeJudge
from dno_jax.records import Judgement
from dno_jax.run_dir import RunDir
from tests.stages.judged import sampled_run

KEY = "sk-planted-0123456789abcdef"


@pytest.fixture
def dno(capfd, monkeypatch):
    """Run `dno ...` in this process; return its exit status and what it said, without the key."""
    monkeypatch.setenv("DNO_TEST_KEY", KEY)
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.01)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dno", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = " ".join("".join(capfd.readouterr()).split())
        assert "Traceback" not in said
        assert KEY not in said
        return caught.value.code or 0, said

    return run


@pytest.fixture
def sampled(tmp_path):
    """Write a sampled run and its configuration, whose judge wants a key; return both."""

    def write(server, *, prompts=4, **openai):
        openai = {"api_key_env": "DNO_TEST_KEY", "max_concurrency": 4, **openai}
        config = sampled_run(
            tmp_path / "run",
            server.url,
            prompts=prompts,
            annotation={"openai": openai},
            pairing={"reward": "score"},
        )
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return RunDir(config.run_dir), path

    return write


def assert_nothing_judged(run_dir):
    assert run_dir.stage("annotate", 0).shard_names() == []
    for path in Path(run_dir.path).rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_no_key(dno, sampled, monkeypatch):
    with FakeJudge(api_key=KEY) as server:
        run_dir, path = sampled(server)
        monkeypatch.delenv("DNO_TEST_KEY")
        status, said = dno("annotate", path)
        assert server.log == []
    assert status == 2
    assert "annotation.openai: the environment variable DNO_TEST_KEY is not set" in said
    assert_nothing_judged(run_dir)


def test_a_wrong_key_is_tried_once(dno, sampled):
    with FakeJudge(api_key="another") as server:
        run_dir, path = sampled(server)
        status, said = dno("annotate", path)
        assert server.counts.outcomes == {"401": 1}
    assert status == 2
    assert "answered HTTP 401" in said
    assert "put a key that may use this model into the environment variable DNO_TEST_KEY" in said
    assert_nothing_judged(run_dir)


def test_a_model_that_does_not_exist_is_tried_once(dno, sampled):
    with FakeJudge(models=("judge-70b",)) as server:
        run_dir, path = sampled(server)
        status, said = dno("annotate", path)
        assert server.counts.outcomes == {"404": 1}
    assert status == 2
    assert "HTTP 404: The model `judge` does not exist" in said
    assert "fix annotation.openai.model" in said
    assert_nothing_judged(run_dir)


def test_a_rubric_without_placeholders(dno, sampled, tmp_path):
    rubric = tmp_path / "mine.yaml"
    rubric.write_text(
        "name: mine\nversion: '1'\nmin_score: 1\nmax_score: 6\n"
        "system: Grade them. {{ fence_rule }}\nuser: '{{ conversation }}, by {{ reply_shape }}'\n"
    )
    with FakeJudge() as server:
        run_dir, path = sampled(server, rubric=str(rubric))
        status, said = dno("annotate", path)
        assert server.log == []
    assert status == 2
    assert f"annotation.openai.rubric '{rubric}': the template never shows candidates" in said
    assert_nothing_judged(run_dir)


def test_a_limit_without_a_price(dno, sampled):
    with FakeJudge() as server:
        run_dir, path = sampled(server)
        status, said = dno("annotate", path, "annotation.max_usd=5")
        assert server.log == []
    assert status == 2
    assert "max_usd=5, and annotation.prices has no 'judge'" in said
    assert_nothing_judged(run_dir)


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="needs sqlite's shell")
def test_a_damaged_store_is_recovered_by_sqlite_and_only_the_rest_is_asked_again(dno, sampled, tmp_path):
    with FakeJudge(prefers="marker") as server:
        run_dir, path = sampled(server, prompts=40)
        assert dno("annotate", path)[0] == 0
        shutil.rmtree(run_dir.stage("annotate", 0).path)
        with open(run_dir.annotations_path, "r+b") as file:  # pages of verdicts
            file.seek(Path(run_dir.annotations_path).stat().st_size * 2 // 3)
            file.write(b"\x5a" * 8192)
        status, said = dno("annotate", path)
        assert status == 2
        assert f"`sqlite3 {run_dir.annotations_path} .recover | sqlite3 " in said
        assert server.requests == 40  # nothing was bought in its place
        # As docs/annotation.md has it; .recover itself is not built into every shell.
        recovered, whole = tmp_path / "recovered.sqlite", "sed 's/^ROLLBACK; -- due to errors$/COMMIT;/'"
        command = f"sqlite3 {run_dir.annotations_path} .dump | {whole} | sqlite3 {recovered}"
        subprocess.run(command, shell=True, check=False, stderr=subprocess.DEVNULL)
        for file in run_dir.annotations_path.parent.glob("annotations.sqlite*"):
            file.unlink()
        shutil.move(recovered, run_dir.annotations_path)
        assert dno("annotate", path)[0] == 0
        assert 40 < server.requests < 70  # what could not be read is asked again, and nothing else
    assert len(list(run_dir.stage("annotate", 0).read(Judgement))) == 40


def test_a_full_disk_stops_it_and_the_next_run_goes_on(dno, sampled):
    prompts = 60
    with FakeJudge(prefers="marker") as server:
        run_dir, path = sampled(server, prompts=prompts)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, hard))  # sqlite's journal comes to it first
        try:
            status, said = dno("annotate", path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert status == 2
        assert "annotations.sqlite: " in said
        assert "see to the disk (full, or failing), then start again: what was committed is kept" in said
        with contextlib.closing(VerdictStore(run_dir.annotations_path)) as store:
            kept = sum(tally.verdicts for tally in store.tallies())
        assert 4 < kept < prompts
        assert server.requests <= kept + 4  # of those that were under way, no more
        assert dno("annotate", path)[0] == 0
        assert server.duplicates <= 4
    assert [row.state for row in run_dir.stage("annotate", 0).read(Judgement)] == ["ok"] * prompts
