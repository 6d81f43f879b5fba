"""What a person gets wrong: each has a message that names it, exit status 2, no traceback, and nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dno_jax.cli import main as cli
from tests.running import prepare
from tests.small import small_tree, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


@pytest.fixture
def command(folder, tmp_path, capsys, monkeypatch):
    """Run `dno run` in this process on a small configuration with overrides; return what it said."""
    tree = small_tree(folder, run_dir="unused")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "run_dir": str(tmp_path / "run")}))

    def run(*overrides, verb="run"):
        monkeypatch.setattr(sys, "argv", ["dno", verb, str(path), *overrides])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr().err
        assert caught.value.code == 2, said
        assert "Traceback" not in said
        return said

    return run


def copy_of(folder, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder / "checkpoint", copy)
    return copy


def test_missing_checkpoint(command, tmp_path):
    said = command(f"model.path={tmp_path / 'absent'}")
    assert "absent" in said
    assert not (tmp_path / "run").exists()


def test_missing_weights(command, folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    (copy / "model.safetensors").unlink()
    assert "model.safetensors" in command(f"model.path={copy}")


def test_truncated_weights(command, folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in command(f"model.path={copy}")
    assert not list((tmp_path / "run").rglob("FINGERPRINT"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "gpt2"),
        ({"sliding_trapdoor": 7}, "sliding_trapdoor"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "rope"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unknown_architecture_or_key(command, folder, tmp_path, change, named):
    copy = copy_of(folder, tmp_path)
    tree = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(tree | change))
    assert named in command(f"model.path={copy}")
    assert not (tmp_path / "run").exists()


def test_no_chat_template(command, tmp_path):
    said = command("model.chat_template=tokenizer")
    assert "template" in said
    assert "raw" in said
    assert not (tmp_path / "run").exists()


def test_empty_prompt_file(command, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "empty.jsonl: holds no prompts" in command(f"prompts.path={tmp_path / 'empty.jsonl'}")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "babe dam"', "rows.jsonl:2: not valid JSON"),
        ("[1]", "rows.jsonl:2: expected a JSON object"),
        pytest.param("[" * 100_000, "rows.jsonl:2: not valid JSON: maximum recursion depth", id="deep"),
        pytest.param('{"messages": ' + "[" * 30 + "]" * 30 + "}", "messages: nested more than 20 deep", id="30"),
        pytest.param('{"prompt": ' + "1" * 5000 + "}", "rows.jsonl:2: not valid JSON: Exceeds the limit", id="long"),
        pytest.param('{"prompt": "' + "a" * 9_000_000, "rows.jsonl:2: a row of more than 8,388,608", id="endless"),
        ('{"prompt": ""}', "rows.jsonl:2: not a valid prompt"),
        ('{"question": "babe"}', "rows.jsonl:2"),
        (r'{"prompt": "a \ud800 cat"}', r"rows.jsonl:2: prompt: 'a \ud800 cat' holds '\ud800', half of a surrogate"),
        ('{"prompt": "bam", "prompt_id": "p"}', "prompt_id 'p' comes 2 times"),
    ],
)
def test_malformed_rows(command, tmp_path, line, named):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "bam", "prompt_id": "p"}\n' + line + "\n")
    assert named in command(f"prompts.path={tmp_path / 'rows.jsonl'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["path", "held_out_path"])
@pytest.mark.parametrize("contents", [None, '{"prompt": "b\u00e9"}'.encode("latin-1")], ids=["folder", "latin-1"])
def test_prompts_that_cannot_be_read(command, tmp_path, field, contents):
    path = tmp_path / "rows.jsonl"
    path.mkdir() if contents is None else path.write_bytes(contents)
    said = command(f"prompts.{field}={path}")
    assert f"{path}: cannot be read (" in said
    assert ("Is a directory" if contents is None else "can't decode byte 0xe9") in said
    assert "; expected UTF-8 JSON lines" in said
    assert not (tmp_path / "run").exists()


def test_prompt_longer_than_allowed(command, tmp_path):
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"prompt": "bam " * 40, "prompt_id": "long one"}) + "\n" + '{"prompt": "bam"}\n'
    )
    said = command(f"prompts.path={tmp_path / 'long.jsonl'}")
    assert "'long one' has 41 tokens" in said
    assert "too_long=drop" in said


def test_sequences_longer_than_the_context(command):
    said = command("sampling.max_new_tokens=60")
    assert "76 tokens exceed the model's context of 64" in said


def test_one_sample_a_prompt(command):
    assert "num_samples is 1" in command("sampling.num_samples=1")


def test_mesh_that_does_not_divide_the_devices(command):
    assert "does not divide the 8 cpu devices" in command("mesh.data=3")


def test_mesh_that_does_not_divide_the_model(command):
    said = command("mesh.data=1", "mesh.tensor=8")
    assert "cannot be split over tensor=8" in said
    assert "parameter embed" in said


def test_mesh_that_does_not_divide_the_batch(command):
    assert "training.micro_batch_size is 6" in command(
        "training.packing=off", "training.batch_size=12", "training.micro_batch_size=6"
    )


def test_slots_that_do_not_fit_in_memory(command, tmp_path):
    said = command("sampling.slots=1000000000")
    assert "sampling.slots is 1000000000" in said
    assert re.search(r"\d+ would fit: set sampling.slots to at most \d+", said)
    assert not (tmp_path / "run").exists()


def test_samples_that_would_all_be_equal(command):
    said = command("sampling.temperature=0")
    assert "temperature is 0 with num_samples=4: all samples of a prompt will be equal" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.num_samples=0", "num_samples is 0"),
        ("sampling.top_p=0", "top_p"),
        ('sampling.stop=["", "x"]', "stop has an empty string"),
        ('sampling.stop=["x", "\ufffd"]', "stop has '\ufffd': U+FFFD stands for bytes that are no text"),
        ("sampling.temperature=1.0e-38", "sampling.temperature: 1e-38 is too small to divide logits by"),
        ("annotation.self_judge.temperature=9.0e-7", "annotation.self_judge.temperature: 9e-07 is"),
        ("sampling.max_total_tokens=1", "max_total_tokens is 1"),
        ("sampling.repetition_penalty=0", "repetition_penalty"),
        ("sampling.kv_dtype=int4", "kv_dtype"),
    ],
)
def test_sampling_that_makes_no_sense(command, override, said):
    assert said in command(override)


@pytest.mark.parametrize(("stop", "name"), [("</s>", "</s>"), ("bam <s>", "<s>")])
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_stop_string_that_no_text_can_hold(command, tmp_path, stop, name, verb):
    said = command(f'sampling.stop=["bam", "{stop}"]', verb=verb)
    assert f"sampling.stop has '{stop}', which holds the control token '{name}': control tokens are not text" in said
    assert "name the token's id in eos_token_id of" in said
    assert not (tmp_path / "run").exists()


def test_a_server_gives_no_mixture(command):
    said = command("sampling.engine=openai", "sampling.source=mixture")
    assert "a server gives one policy's tokens" in said


def test_unknown_field(command):
    said = command("sampling.sampels=3")
    assert "'sampels' is unknown; known here: source, " in said
    assert "'dialect' is unknown; known here: model, " in command("sampling.server.dialect=tgi")
    assert "num_samples" in said


def test_unwritable_run_directory(command, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in command(f"run_dir={tmp_path / 'file' / 'run'}")


def test_unknown_criterion(command, tmp_path):
    assert "beauty" in command("annotation.oracle.criteria=[beauty, variety, brevity]")
    assert not (tmp_path / "run").exists()


def test_held_out_prompt_that_is_trained_on(command, folder, tmp_path):
    assert "is also in" in command(f"prompts.held_out_path={folder / 'prompts.jsonl'}")


def test_more_iterations_than_prompts(command):
    assert "need at least 99" in command("iterations=99", "prompts.held_out_path=null")


def test_half_of_the_process_flags(command):
    assert "go together" in command("--num-processes", "2")


def test_a_stage_before_its_turn(command):
    assert "stage 'annotate' of iteration 0 is not finished" in command(verb="pair")
    assert "stage 'pair' of iteration 0 is not finished" in command(verb="score")


def test_status_of_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dno", "status", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no run directory" in capsys.readouterr().err


def test_export_over_something_that_is_there(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "run").mkdir()
    from dno_jax.config import RunConfig, parse_config
    from dno_jax.run_dir import RunDir

    RunDir(tmp_path / "run").create(parse_config(RunConfig, small_tree(folder), place="test"))
    monkeypatch.setattr(sys, "argv", ["dno", "export", str(tmp_path / "run"), str(tmp_path / "there"), "--policy", "0"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--overwrite" in capsys.readouterr().err


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run directory with policy 0, in a folder of runs; its checkpoint beside it."""
    from dno_jax.config import RunConfig, parse_config

    folder = tmp_path_factory.mktemp("imported")
    prepare(parse_config(RunConfig, small_tree(folder, run_dir="runs/run"), place="test"))
    return folder


@pytest.fixture
def export(imported, tmp_path, capsys, monkeypatch):
    """Run `dno export` on a copy of that folder, from inside its run directory; return (exit status, what it said)."""
    copy = tmp_path / "copy"
    shutil.copytree(imported, copy)
    config = copy / "runs" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(imported), str(copy)))
    monkeypatch.chdir(config.parent)

    def run(target, *options):
        monkeypatch.setattr(sys, "argv", ["dno", "export", str(config.parent), str(target), "--policy", "0", *options])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return caught.value.code, said

    return run


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("../run", "would replace the run directory"),
        (".", "would replace the run directory"),
        ("..", "would replace the run directory"),
        ("../../link", "would replace the run directory"),
        ("../../..", "would replace the run directory"),
        ("../../checkpoint", "would replace model.path"),
        ("policies", "is the run's own"),
        ("policies/000/params", "is the run's own"),
        ("iterations/000/new", "is the run's own"),
        ("../../notes", "neither empty nor an exported checkpoint"),
        ("../../half", "neither empty nor an exported checkpoint"),
        ("../../prompts.jsonl", "Not a directory"),
    ],
)
def test_an_export_overwrites_nothing_but_exports(export, tmp_path, target, named):
    (tmp_path / "copy" / "link").symlink_to(tmp_path / "copy" / "runs")
    for name, file in (("notes", "todo.txt"), ("half", "config.json")):
        (tmp_path / "copy" / name).mkdir()
        (tmp_path / "copy" / name / file).write_text("kept")

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    code, said = export(target, "--overwrite")
    assert files() == before
    assert code == 2
    assert named in said
    assert f"{target}: " in said


def test_an_export_overwrites_an_empty_directory_and_an_export(export):
    Path("export").mkdir()
    for _ in range(2):
        code, said = export("export", "--overwrite")
        assert code in (0, None), said
        assert Path("export", "model.safetensors").exists()
    assert {path.name for path in Path().iterdir() if path.name.startswith(".")} <= {".lock"}  # the run's own
    code, said = export("export")
    assert code == 2
    assert "--overwrite" in said


@pytest.mark.parametrize("target", ["../../prompts.jsonl/x", "/proc/foo/bar", "long" * 99])
def test_an_export_to_where_nothing_can_be_written(export, target):
    before = sorted(Path().iterdir())
    code, said = export(target)
    assert code == 2
    assert f"{Path(target).resolve()}: the checkpoint cannot be written (" in said
    assert sorted(Path().iterdir()) == before


def test_an_export_to_the_working_directory(export, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, said = export(".", "--overwrite")
    assert code in (0, None), said
    assert (tmp_path / "here" / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "here"]


def test_a_template_that_parts_from_its_own_prompt_is_refused(tmp_path, command):
    """The whole chat must begin with the prompt's ids, else what is trained is not what was sampled."""
    template = (
        "{{ bos_token }}{% if messages[-1].role == 'assistant' %}{{ 'bam ' }}{% endif %}"
        "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    )
    path = write_checkpoint(tmp_path / "odd", template=template)
    said = command(f"model.path={path}", "model.chat_template=tokenizer")
    assert "part" in said


def test_more_tokens_than_rows_of_the_embedding(command, folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    tree = json.loads((copy / "tokenizer.json").read_text())
    tree["model"]["vocab"] |= {"surplus": len(tree["model"]["vocab"])}
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    assert "the tokenizer has 77 ids, the model's embedding 76 rows" in command(f"model.path={copy}")
    (copy / "tokenizer.json").write_text((folder / "checkpoint" / "tokenizer.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 76]}))
    assert "eos_token_id names 76, the model's embedding has 76 rows" in command(f"model.path={copy}")
    assert not (tmp_path / "run").exists()


def test_an_end_id_that_is_never_drawn(command, folder, tmp_path):
    """The embedding has a row for it, the tokenizer no token: the sampler takes it for padding."""
    copy = copy_of(folder, tmp_path)
    tree = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    del vocabulary[max(vocabulary, key=vocabulary.get)]
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 75]}))
    said = command(f"model.path={copy}")
    assert f"{copy}: eos_token_id names 75, the tokenizer has 75 ids, and no other is ever drawn" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('Only on Sundays') }}", "roles (user): Only on Sundays"),
        (
            "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
            "2 begin tokens",
        ),
    ],
)
def test_a_template_that_attacks_raises_or_begins_twice(command, tmp_path, template, named):
    (tmp_path / "odd.jinja").write_text(template)
    said = command(f"model.chat_template={tmp_path / 'odd.jinja'}")
    assert "odd.jinja" in said
    assert named in said
    assert not (tmp_path / "run").exists()


def test_prompts_that_all_spell_control_tokens(command, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "bam </s> a"}\n{"prompt": "</s> b"}\n')
    said = command(f"prompts.path={tmp_path / 'rows.jsonl'}")
    assert "all 1 prompts of a part are dropped: 1 x prompt spells a control token" in said


def test_a_date_that_is_none(command):
    assert "template_date" in command("model.template_date=yesterday")


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_there_is_not(capsys, monkeypatch, port):
    monkeypatch.setattr(sys, "argv", ["dno", "fake-judge", "--port", port])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "Invalid value for '--port'" in capsys.readouterr().err


def test_the_installed_command_answers(tmp_path):
    done = subprocess.run(
        [Path(sys.executable).parent / "dno", "run", tmp_path / "none.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dno: ")
