"""Ids on the Hub, against a Hub on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dno_jax.config.base import hub_id, model_place
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.hf import hub as hub_module
from dno_jax.runtime.pinning import pinned
from tests.model.checkpoints import same
from tests.model.loopback_hub import Hub, serving
from tests.model.test_as_brought import write

TOKEN = "hf_" + "secret" * 5
OTHERS = {
    "pytorch_model.bin": b"x",
    "consolidated.safetensors": b"x",
    "original/model.safetensors": b"x",
    "onnx/model.onnx": b"x",
    "notes.txt": b"x",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, an empty cache, and a token that must be seen nowhere else."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_module._snapshot.cache_clear()
    with serving(Hub()) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served
    hub_module._snapshot.cache_clear()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One file, and two shards with an index."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {"one": write(folder / "one"), "two": write(folder / "two", shards=2)}


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("kind", ["one", "two"])
def test_only_what_is_needed_is_fetched(hub, checkpoints, kind):
    commit = hub.add("acme/tiny", {**files_of(checkpoints[kind]), **OTHERS, "tokenizer.json": b"{}"})
    small = hf.folder("acme/tiny")
    assert small.name == commit
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]
    assert hf.read_config(small) == hf.read_config(checkpoints[kind])
    same(hf.load(hf.folder("acme/tiny", weights=True))[1], hf.load(checkpoints[kind])[1])
    assert hub.fetched() == {*files_of(checkpoints[kind]), "tokenizer.json"}
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_a_revision_is_that_and_a_commit_stays(hub, checkpoints):
    tree = files_of(checkpoints["one"])
    old = hub.add("acme/tiny", tree)
    tagged = hub.add("acme/tiny", {**tree, "README.md": b"two"}, revision="v2")
    assert hf.folder("acme/tiny@v2").name == tagged
    hub.add("acme/tiny", {**tree, "README.md": b"three"})
    assert hf.folder(f"acme/tiny@{old}").name == old
    with pytest.raises(DnoError, match=r"acme/tiny@v9: the repository has no revision 'v9'.*Invalid rev id"):
        hf.folder("acme/tiny@v9")


def test_without_the_hub_the_cache_serves(hub, checkpoints, monkeypatch):
    from huggingface_hub import constants

    commit = hub.add("acme/tiny", files_of(checkpoints["two"]))
    hf.folder("acme/tiny", weights=True)
    hub_module._snapshot.cache_clear()
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hf.folder("acme/tiny", weights=True).name == hf.folder(f"acme/tiny@{commit}").name == commit
    assert len(hub.asked) == asked
    with pytest.raises(DnoError, match=r"acme/other: the Hub cannot be reached, and it is not whole in the cache"):
        hf.folder("acme/other")


def test_half_a_snapshot_is_no_checkpoint(hub, checkpoints, monkeypatch):
    from huggingface_hub import constants

    hub.add("acme/tiny", files_of(checkpoints["two"]))
    hf.folder("acme/tiny")
    hub_module._snapshot.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hf.folder("acme/tiny").is_dir()
    with pytest.raises(DnoError, match="it is not whole in the cache"):
        hf.folder("acme/tiny", weights=True)


def test_refusals_carry_the_hubs_words_and_what_to_do(hub):
    hub.gated.add("acme/gated")
    with pytest.raises(DnoError, match=r"acme/gated: the repository is gated: .*HF_TOKEN.*Access to model acme/gated"):
        hf.folder("acme/gated")
    with pytest.raises(DnoError, match=r"acme/none: no folder of that name is here, and the Hub shows no repository"):
        hf.folder("acme/none")
    hub.gated.add("acme/echo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.model.loopback_hub.GATED", f"{{}} \x1b[31mno, {TOKEN}\x1b[0m " + "x" * 5000)
        with pytest.raises(DnoError) as caught:
            hf.folder("acme/echo")
    text = str(caught.value)
    assert TOKEN not in text
    assert "\x1b" not in text
    assert len(text) < 1000


def test_a_folder_of_that_name_comes_first(hub, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_place("acme/tiny") == "acme/tiny"
    (tmp_path / "acme").mkdir()
    write(tmp_path / "acme" / "tiny")
    assert model_place("acme/tiny") == str(tmp_path / "acme" / "tiny")
    assert hf.folder("acme/tiny", weights=True) == Path("acme/tiny")
    assert not hub.asked
    for path in ("./acme/none", "runs/a/b", "/acme/none", "acme"):
        assert hub_id(path) is None


def test_a_run_keeps_its_commit(hub, checkpoints, make_config, tmp_path):
    """The configuration of the run directory names it; the branch moves on."""
    from dno_jax.run_dir import RunDir

    tree = files_of(checkpoints["one"])
    first = hub.add("acme/tiny", tree)
    config = make_config(model={"path": "acme/tiny"})
    assert config.model.path == "acme/tiny"
    run = pinned(config)
    assert run.model.path == f"acme/tiny@{first}"
    run_dir = RunDir(run.run_dir)
    run_dir.create(run)
    hub.add("acme/tiny", {**tree, "README.md": b"new"})
    hub_module._snapshot.cache_clear()
    assert pinned(config).model.path == f"acme/tiny@{first}"
    second = pinned(make_config(model={"path": "acme/tiny@main"}))
    assert second.model.path != f"acme/tiny@{first}"
    assert pinned(run_dir.load_config()) == run
    with pytest.raises(DnoError, match=r"model\.path: acme/none: "):
        pinned(make_config(model={"path": "acme/none"}))


def test_an_export_is_pushed_and_comes_back(hub, checkpoints, tmp_path, monkeypatch):
    (tmp_path / "me" / "new").mkdir(parents=True)  # a folder here is no reason not to push
    monkeypatch.chdir(tmp_path)
    hub_module.create("me/new")
    assert hub.private == {"me/new": True}
    path = checkpoints["two"]
    commit = hub_module.push(path, "me/new")
    assert hub.files[commit] == files_of(path)
    # One file takes the place of the shards, of which none stays.
    commit = hub_module.push(checkpoints["one"], "me/new")
    assert hub.files[commit] == files_of(checkpoints["one"])
    (tmp_path / "me" / "new").rmdir()
    same(hf.load(hf.folder("me/new", weights=True))[1], hf.load(checkpoints["one"])[1])
    hub.gated.add("them/theirs")
    with pytest.raises(DnoError, match=r"them/theirs: the Hub refuses \(status 403\); sign in .*You have no right"):
        hub_module.create("them/theirs")
    for name in ("no-owner", "/tmp/x", "a/b@main"):
        with pytest.raises(DnoError, match="expected the id of a repository, owner/name"):
            hub_module.create(name)


def test_the_card_names_the_repository_and_its_commit(hub, checkpoints):
    from dno_jax.model.hf.card import model_card

    commit = hub.add("acme/tiny", files_of(checkpoints["one"]))
    text = model_card(hf.folder("acme/tiny"), facts=None)
    assert "base_model: acme/tiny" in text
    assert f"`{commit}`" in text
