import errno
import fcntl
import json
import os
import resource
import socket

import pytest
from etils import epath

from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.files import digest_of, write_atomically
from dno_jax.records import Message, Prompt, ReferenceScore, parse_lines
from dno_jax.run_dir import RunDir
from dno_jax.stages import redo


def config(root, **changes):
    tree = {"run_dir": str(root), "model": {"path": "m"}, "prompts": {"path": "p"}, "annotation": {"kind": "openai"}}
    return parse_config(RunConfig, tree | changes, place="test")


def scores(*ids):
    return [ReferenceScore(pair_id=name, chosen_logprob=-1.0, rejected_logprob=-2.0) for name in ids]


def test_shards_are_read_in_order_and_a_torn_one_is_not_seen(tmp_path):
    stage = RunDir(tmp_path).stage("score", 3)
    assert stage.shard_names() == []
    stage.write_shard("0000010", scores("c"))
    stage.write_shard("0000000", scores("a", "b"))
    (tmp_path / "iterations/003/reference/.0000020.jsonl.99.tmp").write_text('{"pair_')  # what kill -9 leaves
    assert stage.shard_names() == ["0000000", "0000010"]
    assert [row.pair_id for row in stage.read(ReferenceScore)] == ["a", "b", "c"]


def test_texts_may_have_separators_that_are_no_line_breaks(tmp_path):
    """U+2028, U+2029 and U+0085 stand raw in JSON, and Python's splitlines parts at them."""
    stage = RunDir(tmp_path).stage("score", 0)
    stage.write_shard("0000000", scores("a\u2028b", "c\u2029d\x85e"))
    assert [row.pair_id for row in stage.read(ReferenceScore)] == ["a\u2028b", "c\u2029d\x85e"]


def test_a_manifest_is_whole_and_names_what_it_was_made_from(tmp_path):
    run_dir = RunDir(tmp_path)
    upstream, stage = run_dir.stage("pair", 0), run_dir.stage("score", 0)
    with pytest.raises(DnoError, match="'pair' of iteration 0 is not finished"):
        upstream.require()
    upstream.write_shard("new", scores("a"))
    made_by = config(tmp_path)
    upstream.finish(made_by, inputs={}, rows=1, seconds=0.1)
    inputs = stage.input_digest(upstream.manifest_path)
    assert list(inputs) == ["iterations/000/pairs/MANIFEST.json"]
    assert stage.finished(made_by, inputs) is None
    stage.write_shard("0000000", scores("a"))
    made = stage.finish(made_by, inputs=inputs, rows=1, seconds=1.0, dropped={"x": 2}, details={"y": [1]})
    assert stage.finished(made_by, inputs) == made
    assert made.outputs == {"0000000": digest_of(tmp_path / "iterations/000/reference/0000000.jsonl")}
    assert made.versions["jax"]
    with pytest.raises(
        DnoError, match=r"(?s)another configuration:\n  reference\.kind: 'previous' -> 'initial'\n.*--from score:0"
    ):
        stage.finished(config(tmp_path, reference={"kind": "initial"}), inputs)
    assert stage.finished(config(tmp_path, loss={"beta": 0.5}), inputs) == made  # score does not read it
    upstream.write_shard("new", scores("a", "b"))
    upstream.finish(made_by, inputs={}, rows=2, seconds=0.1)
    with pytest.raises(DnoError, match=r"pairs/MANIFEST\.json"):
        stage.finished(made_by, stage.input_digest(upstream.manifest_path))


def test_a_changed_configuration_is_refused_by_name(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    first = config(run_dir.path)
    redo.check(first, run_dir)
    run_dir.create(first)
    run_dir.stage("train", 0).start(first)
    redo.check(config(run_dir.path, mesh={"fsdp": 2}), run_dir)
    with pytest.raises(DnoError, match=r"(?s)train of iteration 0 .*\n  loss\.beta: 0\.1 -> 0\.5\n.*--from train:0"):
        redo.check(config(run_dir.path, loss={"beta": 0.5}), run_dir)
    redo.check(config(run_dir.path, sampling={"temperature": 0.5}), run_dir)  # nothing has been sampled yet


def test_a_directory_of_the_version_before_is_refused(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(config(run_dir.path))
    run_dir.format_path.unlink()
    for use in (lambda: run_dir.create(config(run_dir.path)), run_dir.load_config):
        with pytest.raises(DnoError, match=r"another version of dno_jax \(format 1; this one writes and reads 2\)"):
            use()


@pytest.mark.parametrize("content", [b"", b"# x\n", b"null", b"- a", b"words", b"\xff\xfe", b"a: 1\na: 2", b"\0"])
@pytest.mark.parametrize("has_format", [False, True])
def test_a_configuration_that_is_none_is_called_damaged(tmp_path, content, has_format):
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(config(run_dir.path))
    run_dir.config_path.write_bytes(content)
    if not has_format:
        run_dir.format_path.unlink()
    for use in (run_dir.kind, run_dir.load_config):
        with pytest.raises(DnoError, match=r"config.yaml: damaged \(.+\); restore it from a copy"):
            use()


def test_a_directory_is_held_by_one_at_a_time(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    holder = f"in use by process {os.getpid()} on {socket.gethostname()};"
    with run_dir.held():
        with pytest.raises(DnoError, match=holder), RunDir(tmp_path / "run").held():
            pass
        run_dir.create(config(run_dir.path))  # what annotates beside it may
        with RunDir(tmp_path / "other").held():
            pass
    with pytest.raises(ZeroDivisionError), run_dir.held():
        raise ZeroDivisionError
    with run_dir.held():
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with RunDir(tmp_path).held(), RunDir(tmp_path).held():
        assert (tmp_path / ".lock").read_text() == ""  # nobody says to hold it


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("file:///run", "run_dir file:///run: expected a directory of a file system, gs://BUCKET/PATH or s3://"),
        ("az://bucket/run", "run_dir az://bucket/run: expected a directory"),
        ("gs://bucket", "expected a bucket's name and a path inside of it"),
        ("gs:///run", "expected a bucket's name"),
        ("s3://bucket/a/../b", r"'\.\.' is no name of a folder"),
        ("s3://bucket//b", "'' is no name of a folder"),
        ("gs://bucket/a*", "no name of a folder"),
        ("gs://me:hunter2@bucket/run", "which may hold a key"),
        ("s3://bucket/run?X-Amz-Signature=hunter2", "which may hold a key"),
        ("s3://bucket/run#hunter2", "which may hold a key"),
        ("s3:/me:hunter2@bucket/run", "s3:/ with one slash; expected s3://BUCKET/PATH"),
        ("/here/gs:/bucket/run", "gs:/ with one slash; expected gs://BUCKET/PATH, or a directory without gs:/"),
    ],
)
def test_a_url_that_is_no_place_for_a_run_is_refused(path, said):
    with pytest.raises(DnoError, match=said) as caught:
        RunDir(path)
    assert "hunter2" not in str(caught.value)


def test_a_bucket_is_worked_on_in_a_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("DNO_SCRATCH", str(tmp_path))
    run_dir = RunDir("gs://bucket/runs/mine/")
    assert run_dir.path.parent.parent == epath.Path(tmp_path)
    assert run_dir.path.name == "mine"  # what wandb and suites call it
    assert run_dir.shown(run_dir.export_path) == "gs://bucket/runs/mine/export"
    assert RunDir("gs://bucket/runs/mine").path == run_dir.path
    assert RunDir("gs://bucket/other/mine").path != run_dir.path
    assert RunDir("s3://bucket/runs/mine").path != run_dir.path
    monkeypatch.delenv("DNO_SCRATCH")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert RunDir("gs://bucket/runs/mine").path.is_relative_to(tmp_path / "cache" / "dno_jax" / "runs")
    assert RunDir(tmp_path).shown(RunDir(tmp_path).path / "a") == str(tmp_path / "a")


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DnoError, match="cannot be written"):
        RunDir(tmp_path / "file" / "run").create(config(tmp_path))
    with RunDir(tmp_path / "file" / "run").held():  # it is left to open() to say so
        pass
    with pytest.raises(DnoError, match=r"no config\.yaml"):
        RunDir(tmp_path / "empty").load_config()


def test_metrics_forget_the_steps_that_are_taken_again(tmp_path):
    run_dir = RunDir(tmp_path)
    for step in range(4):
        run_dir.append_metrics({"iteration": 0, "stage": "train", "step": step})
    run_dir.append_metrics({"iteration": 1, "stage": "train", "step": 0})
    with run_dir.metrics_path.open("a") as file:
        file.write('{"iteration": 1, "st')  # a line that a crash cut short
    run_dir.forget_metrics(iteration=0, stage="train", from_step=2)
    assert [(row["iteration"], row["step"]) for row in run_dir.read_metrics()] == [(0, 0), (0, 1), (1, 0)]


def test_malformed_rows_are_named_by_file_and_line():
    good = Prompt(prompt_id="p", messages=(Message(role="user", content="hi"),)).model_dump_json()
    assert len(list(parse_lines(Prompt, [good, "", good], place="f"))) == 2
    for bad, message in [
        ("{", "f:2: not a valid Prompt"),
        (json.dumps({"prompt_id": "p"}), "messages"),
        (json.dumps({"prompt_id": "p", "messages": [{"role": "robot", "content": "x"}]}), r"messages\.0\.role"),
        (json.dumps({"prompt_id": "p", "messages": [{"role": "assistant", "content": "x"}]}), "ends with the user's"),
        (json.dumps({"prompt_id": "p", "messages": [{"role": "user", "content": " "}]}), "empty"),
        (json.dumps({"prompt_id": "p", "messages": [{"role": "user", "content": "x"}], "extra": 1}), "extra"),
    ]:
        with pytest.raises(DnoError, match=message):
            list(parse_lines(Prompt, [good, bad], place="f"))


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path):
    write_atomically(tmp_path / "there.jsonl", "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DnoError, match=r"there.jsonl: cannot be written \(File too large\); see to the disk"):
            write_atomically(tmp_path / "there.jsonl", "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text() == "before"
