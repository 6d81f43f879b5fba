"""`dno export` and `dno status` away from where a run was made: other devices, a Hub, a directory of `dno sft`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dno_jax.cli import main as cli
from dno_jax.config import SftConfig, parse_config
from dno_jax.model import hf
from dno_jax.model.hf import hub as hub_module
from dno_jax.run_dir import RunDir
from tests.model.loopback_hub import Hub, serving
from tests.model.test_hub import TOKEN, files_of, hub  # noqa: F401
from tests.small import small_tree

pytestmark = pytest.mark.compiles


@pytest.fixture
def dno(monkeypatch, capsys):
    """Run the command line; return (exit status, what it said)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dno", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out + captured.err

    return run


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run directory with policy 0 in it, its base from the Hub; the Hub's files, and its commit."""
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("imported")
    with pytest.MonkeyPatch.context() as patch, serving(Hub()) as served:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setenv("HF_ENDPOINT", served.url)
        patch.setenv("HF_TOKEN", TOKEN)
        hub_module._snapshot.cache_clear()
        tree = small_tree(folder, run_dir="run")
        base = Path(tree["model"]["path"])
        commit = served.add("acme/tiny", files_of(base))
        tree["model"]["path"] = "acme/tiny"
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(tree))
        patch.setattr(sys, "argv", ["dno", "import", str(config)])
        with pytest.raises(SystemExit):
            cli.main()
        hub_module._snapshot.cache_clear()
    return folder, base, commit


@pytest.fixture
def elsewhere(imported, tmp_path):
    """A copy of it whose configuration is for the 512 devices of a pod."""
    folder, _, commit = imported
    shutil.copytree(folder / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    assert tree["model"]["path"] == f"acme/tiny@{commit}"
    tree["mesh"] = {"data": 16, "fsdp": 16, "expert": 1, "tensor": 2}
    tree["model"]["attention"] = "cudnn"
    config.write_text(yaml.safe_dump(tree))
    return tmp_path / "run"


def test_a_pods_policy_is_exported_here_and_pushed(elsewhere, imported, hub, dno, tmp_path):  # noqa: F811
    """Fetched at the commit that the run noted, though the branch has moved on; the token is left nowhere."""
    _, base, commit = imported
    assert json.loads((elsewhere / "policies" / "SOURCE.json").read_text())["path"] == f"acme/tiny@{commit}"
    assert hub.add("acme/tiny", files_of(base)) == commit
    hub.add("acme/tiny", {**files_of(base), "config.json": b"{}"})
    code, said = dno("export", elsewhere, tmp_path / "out", "--policy", "0", "--push", "me/new")
    assert code == 0, said
    pushed = hub.files[hub.repos["me/new"]["main"]]
    assert f"as commit {hub.repos['me/new']['main']}" in said
    assert pushed == files_of(tmp_path / "out")
    assert b"base_model: acme/tiny" in pushed["README.md"]
    assert commit.encode() in pushed["README.md"]
    np.testing.assert_array_equal(hf.load(tmp_path / "out")[1]["embed"], hf.load(base)[1]["embed"])
    assert TOKEN not in said
    places = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in places if TOKEN.encode() in path.read_bytes()]


def test_a_base_that_lies_elsewhere_is_asked_for(elsewhere, imported, dno, tmp_path):
    config = elsewhere / "config.yaml"
    config.write_text(config.read_text().replace("acme/tiny@", "/pod/models/tiny-"))
    code, said = dno("export", elsewhere, tmp_path / "out", "--policy", "0")
    assert code == 2
    assert "not on this machine" in said
    assert "--base" in said
    wrong = shutil.copytree(imported[1], tmp_path / "wrong")
    (wrong / "config.json").write_text((wrong / "config.json").read_text() + "\n")
    code, said = dno("export", elsewhere, tmp_path / "out", "--policy", "0", "--base", wrong)
    assert (code, "not the checkpoint that policy 0" in said) == (2, True)
    code, said = dno("export", elsewhere, tmp_path / "out", "--policy", "0", "--base", imported[1])
    assert code == 0, said
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture
def fine_tuned(imported, tmp_path):
    """A directory as `dno sft` leaves it."""
    run_dir = RunDir(tmp_path / "sft")
    tree = {"run_dir": str(run_dir.path), "model": {"path": str(imported[1])}, "data": {"path": "/x.jsonl"}}
    run_dir.create(parse_config(SftConfig, tree, place="test"))
    return run_dir


def test_a_fine_tuning_has_a_status_and_an_export(fine_tuned, imported, dno, tmp_path, hub):  # noqa: F811
    place = fine_tuned.path
    code, said = dno("status", place)
    assert (code, "next: dno sft" in said) == (0, True)
    fine_tuned.append_metrics({"stage": "sft", "iteration": 0, "step": 7, "loss": 1.25})
    code, said = dno("status", place)
    assert (code, "begun" in said, "1.2500" in said) == (0, True, True)
    code, said = dno("export", place, tmp_path / "out")
    assert (code, "not finished" in said) == (2, True)
    shutil.copytree(imported[1], fine_tuned.export_path)
    (Path(fine_tuned.export_path) / "README.md").write_text("its own card")
    code, said = dno("status", place)
    assert (code, "done" in said) == (0, True)
    code, said = dno("export", place, tmp_path / "out", "--policy", "1")
    assert (code, "has one model" in said) == (2, True)
    code, said = dno("export", place, tmp_path / "out", "--dtype", "bfloat16", "--push", "me/sft")
    assert code == 0, said
    assert (tmp_path / "out" / "README.md").read_text() == "its own card"
    assert json.loads((tmp_path / "out" / "config.json").read_text())
    assert hub.files[hub.repos["me/sft"]["main"]] == files_of(tmp_path / "out")


def test_a_push_that_is_refused_is_refused_before_the_work(elsewhere, hub, dno, tmp_path):  # noqa: F811
    hub.gated.add("them/theirs")
    for name, words in (("them/theirs", "You have no right"), ("nobody", "expected the id of a repository")):
        code, said = dno("export", elsewhere, tmp_path / "out", "--policy", "0", "--push", name)
        assert (code, words in said) == (2, True), said
        assert not (tmp_path / "out").exists()
