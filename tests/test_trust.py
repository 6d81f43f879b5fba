"""What lies in a run directory is held to what was written down of it."""

import json
import re

import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.data.pair_table import PairTable
from dno_jax.data.pairs import NEW, REPLAYED, write_pairs
from dno_jax.data.pools import PromptFile
from dno_jax.errors import DnoError
from dno_jax.files import digest_of
from dno_jax.records import Message, Prompt, ReferenceScore
from dno_jax.run_dir import RunDir
from dno_jax.stages import redo
from tests.damage import DAMAGES


def config(root):
    tree = {"run_dir": str(root), "model": {"path": "m"}, "prompts": {"path": "p"}, "annotation": {"kind": "openai"}}
    return parse_config(RunConfig, tree, place="test")


def scores(*ids):
    return [ReferenceScore(pair_id=name, chosen_logprob=-1.0, rejected_logprob=-2.0) for name in ids]


@pytest.fixture
def stage(tmp_path):
    """A finished stage of two shards, and one more in a folder of its own."""
    stage = RunDir(tmp_path).stage("score", 1)
    stage.write_shard("0000000", scores("a", "b"))
    stage.write_shard("0000010", scores("c"))
    stage.sub("initial").write_shard("0000000", scores("d"))
    stage.finish(config(tmp_path), inputs={}, rows=3, seconds=0.1, details={"mean": float("nan")})
    return stage


def again(stage):
    """The same folder, as another process sees it."""
    return RunDir(stage.root).stage(stage.stage, stage.iteration)


def test_a_whole_stage_is_read(stage):
    assert [row.pair_id for row in again(stage).read(ReferenceScore)] == ["a", "b", "c"]
    assert [row.pair_id for row in again(stage).sub("initial").read(ReferenceScore)] == ["d"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["0000000", "initial/0000000"])
def test_a_damaged_shard_is_not_read(stage, name, damage):
    DAMAGES[damage](stage.path / f"{name}.jsonl")
    folder = again(stage).sub("initial") if "/" in name else again(stage)
    with pytest.raises(DnoError, match=r"iterations/001/reference.*--from score:1") as told:
        list(folder.read(ReferenceScore))
    assert "\n" not in str(told.value)


def test_lines_that_somebody_took_out_are_noticed(stage):
    path = stage.path / "0000000.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(DnoError, match=r"0000000\.jsonl: not as the stage wrote it"):
        list(again(stage).read(ReferenceScore))


def test_a_shard_of_another_stage_is_noticed(stage):
    stage.write_shard("0000020", scores("e"))
    with pytest.raises(DnoError, match=r"0000020 not its own"):
        again(stage).shard_names()


def test_a_damaged_shard_of_an_unfinished_stage_is_named(stage):
    stage.manifest_path.unlink()
    (stage.path / "0000010.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DnoError, match=r"0000010\.jsonl: .* remove the file, and the stage writes it again"):
        list(again(stage).read(ReferenceScore))


@pytest.mark.parametrize(
    "edit",
    [
        lambda said: said | {"rows": 409},
        lambda said: said | {"dropped": {"nothing": 1}},
        lambda said: said | {"outputs": dict.fromkeys(said["outputs"], "0" * 64)},
    ],
)
def test_a_manifest_that_was_edited_is_refused(stage, edit):
    said = edit(json.loads(stage.manifest_path.read_text()))
    stage.manifest_path.write_text(json.dumps(said))
    with pytest.raises(DnoError, match=rf"MANIFEST\.json: edited since .* it says {said['rows']} rows.*--from score:1"):
        again(stage).manifest()


def test_how_a_manifest_is_laid_out_does_not_matter_and_old_ones_have_no_seal(stage):
    said = json.loads(stage.manifest_path.read_text())
    stage.manifest_path.write_text(json.dumps(dict(reversed(said.items()))))
    assert again(stage).manifest().rows == 3
    del said["seal"]
    stage.manifest_path.write_text(json.dumps(said | {"rows": 4}))
    assert again(stage).manifest().rows == 4


@pytest.mark.parametrize("text", ["", "  \n", "{", "[]", '{"stage": "score"}', "\0" * 512])
@pytest.mark.parametrize("name", ["MANIFEST.json", "STARTED.json"])
def test_an_empty_or_torn_note_gets_a_message(stage, name, text):
    (stage.path / name).write_text(text)
    use = again(stage).manifest if name == "MANIFEST.json" else lambda: again(stage).changed(config(stage.root))
    with pytest.raises(DnoError, match=rf"{name}.*--from score:1") as told:
        use()
    assert str(told.value).count("\n") < 10


def test_an_empty_configuration_gets_a_message(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(config(run_dir.path))
    for text in ("", "a: [", "- 1\n", "\0\0"):
        run_dir.config_path.write_text(text)
        for use in (run_dir.load_config, lambda: redo.check(config(run_dir.path), run_dir)):
            run_dir.stage("score", 0).start(config(run_dir.path))
            with pytest.raises(DnoError, match=re.escape(str(run_dir.config_path))):
                use()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_prompts_are_not_judged(tmp_path, damage):
    path = RunDir(tmp_path).prompts_path(0)
    path.parent.mkdir(parents=True)
    rows = [Prompt(prompt_id=name, messages=(Message(role="user", content="hello there"),)) for name in "ab"]
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    digest = digest_of(path)
    assert list(PromptFile(path, digest=digest).read(["b"])) == ["b"]
    DAMAGES[damage](path)
    with pytest.raises(DnoError, match=r"prompts\.jsonl: .*the same prompts are written anew"):
        PromptFile(path, digest=digest)


def test_pairs_are_as_many_as_were_noted(tmp_path):
    stage = RunDir(tmp_path).stage("pair", 0)
    for name in (NEW, REPLAYED):
        write_pairs(stage.path / f"{name}.parquet", [])
    stage.finish(config(tmp_path), inputs={}, rows=0, seconds=0.1)
    assert len(PairTable.load(again(stage))) == 0
    said = json.loads(stage.manifest_path.read_text())
    stage.manifest_path.write_text(json.dumps(said | {"rows": 474, "seal": ""}))  # an earlier version's
    with pytest.raises(DnoError, match=r"says 474 pairs, and the files have 0; .*--from pair:0"):
        PairTable.load(again(stage))
    stage.manifest_path.write_text(json.dumps(said))
    (stage.path / "new.parquet").unlink()
    with pytest.raises(DnoError, match=r"new\.parquet: cannot be read \(it is missing\).*--from pair:0"):
        PairTable.load(again(stage))
