"""Commands that other tests do not run: sft, inspect, import, export, status, single stages."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from dno_jax.cli import main as cli
from dno_jax.model import hf
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import STAGES, stage_names
from dno_jax.training.checkpoint import policy_fingerprint
from tests.small import WORDS, small_tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def dno(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dno", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code in (0, None), caught.value.code

    return run


@pytest.mark.compiles
def test_stage_by_stage_equals_one_run(folder, dno, capsys, monkeypatch):
    config = folder / "stages.yaml"
    config.write_text(yaml.safe_dump({**small_tree(folder, run_dir="stages"), "iterations": 1, "prompts": {
        **small_tree(folder)["prompts"], "split": "shared"}}))  # fmt: skip
    dno("import", config)
    stages = stage_names(RunDir(folder / "stages").load_config(), 0)
    for name in stages:
        dno(name, config)
    whole = folder / "whole.yaml"
    whole.write_text(config.read_text().replace("/stages", "/whole"))
    dno("run", whole)
    one, two = RunDir(folder / "stages"), RunDir(folder / "whole")
    assert policy_fingerprint(one.policy(1)) == policy_fingerprint(two.policy(1)) is not None
    capsys.readouterr()
    dno("status", folder / "stages")
    said = capsys.readouterr().out
    assert said.count("done") == len(stages)
    dno("export", folder / "stages", folder / "out", "--policy", "1")
    dno(
        "export", folder / "stages", folder / "half", "--policy", "1", "--dtype", "bfloat16", "--max-shard-size", "20kB"
    )
    assert len(list((folder / "half").glob("model-0000*.safetensors"))) > 1
    manifests = {name: one.stage(name, 0).require() for name in ("pair", "evaluate")}
    card = (folder / "half" / "README.md").read_text()
    assert f"| training pairs | {manifests['pair'].rows:,} |" in card
    assert "| annotator | `embedded oracle (relevance, variety, brevity)` |" in card
    for opponent, found in manifests["evaluate"].details["win_rates"].items():
        name = f"policy {opponent}" if opponent.isdigit() else opponent
        assert f"| `{name}` | {100 * found['rate']:.1f} % | {100 * found['low']:.1f} to " in card
    assert str(folder) not in card
    _, params = hf.load(str(folder / "out"))
    _, best = hf.load(str(folder / "whole" / "export"))
    if int(two.stage("evaluate", 0).require().details["best"]) == 1:
        for name in ("embed", "final_norm"):
            np.testing.assert_array_equal(params[name], best[name])
    (folder / "stages").rename(folder / "moved")  # its config.yaml names where it was
    monkeypatch.chdir(folder)
    dno("export", "moved", "again", "--policy", "1")
    for path in (folder / "out").iterdir():
        assert (folder / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_inspect_shows_where_the_loss_starts_and_ends(folder, dno, capsys):
    config = folder / "inspect.yaml"
    config.write_text(yaml.safe_dump(small_tree(folder, run_dir="inspect")))
    dno("inspect", config)
    said = capsys.readouterr().out
    dno("inspect", "template", config)
    assert capsys.readouterr().out == said
    lines = said.splitlines()
    assert "1 BOS, end token trained" in lines[0]
    assert lines.count("") == 2
    strip, findings = lines[2 : lines.index("", 2)], lines[lines.index("", 2) + 1 :]
    assert {line.split()[0] for line in findings} <= {"warning", "note"}
    assert any(line.startswith("note    BOS: 1 begin token '<s>'") for line in findings)
    trained = [" loss " in line for line in strip]
    start = trained.index(True)
    assert not any(trained[:start])
    assert "'</s>'" in strip[trained.index(False, start) - 1 if False in trained[start:] else -1]
    assert not (folder / "inspect").exists()


def test_inspect_template_shows_what_is_wrong_before_it_refuses(folder, monkeypatch, capsys):
    template = folder / "parts.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}bam {% else %}{{ eos_token }}{% endif %}"
    )
    config = folder / "inspect.yaml"
    tree = small_tree(folder, run_dir="inspect")
    tree["model"] |= {"chat_template": str(template)}
    config.write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(sys, "argv", ["dno", "inspect", "template", str(config)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert "error   concatenation: " in captured.out
    assert "they part at token" in captured.err
    assert "Traceback" not in captured.err


def test_inspect_template_is_coloured_on_a_terminal(folder):
    from dno_jax.config import RunConfig, parse_config
    from dno_jax.stages import template

    config = parse_config(RunConfig, small_tree(folder), place="test")
    found = template.report(config.model, config.prompts.path)
    text = template.render(found)
    quoted = [span for span in text.spans if text.plain[span.start] == "'"]  # one a token, in order
    styles = [span.style for span in quoted]
    count, start = len(found.strip.ids), found.strip.loss_start
    assert len(styles) == count
    assert set(styles[1:start]) == {"dim"}
    assert len(set(styles[start : count - 1])) == 1
    assert len({styles[0], styles[1], styles[start], styles[-1]}) == 4
    assert text.plain.count("  end\n") == 1


@pytest.fixture(scope="module")
def sft_config(folder):
    """Examples whose answer is their first word three times: learnt in a few steps from random weights."""
    small_tree(folder)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(64):
        words = rng.choice(WORDS[:12], size=2).tolist()
        rows.append(json.dumps({"prompt": " ".join(words), "response": " ".join(words[:1] * 3)}))
    (folder / "sft.jsonl").write_text("\n".join(rows[:1]) + "\n" + "\n".join(rows) + "\n")
    return {
        "run_dir": str(folder / "sft"),
        "model": {
            "path": str(folder / "checkpoint"),
            "init_config": str(folder / "checkpoint"),
            "chat_template": "raw",
        },
        "data": {"path": str(folder / "sft.jsonl"), "max_length": 32},
        "optimizer": {"learning_rate": 1e-2, "schedule": "linear"},
        "training": {"batch_size": 16, "num_epochs": 12, "save_every": 5},
        "report": {"tensorboard": True},
    }


@pytest.mark.compiles
def test_sft_learns_and_exports_a_checkpoint(folder, dno, sft_config, capsys):
    config = folder / "sft.yaml"
    config.write_text(yaml.safe_dump(sft_config))
    dno("sft", config)
    run_dir = RunDir(folder / "sft")
    assert "end token trained" in run_dir.template_path.read_text()
    losses = [row["loss"] for row in run_dir.read_metrics()]
    assert losses[0] == pytest.approx(np.log(76), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]
    assert list((folder / "sft" / "tensorboard").rglob("events.out.tfevents.*"))
    assert not (folder / "sft" / "states").exists()
    model_config, params = hf.load(str(folder / "sft" / "export"))
    assert params["embed"].shape == (model_config.vocab_size, model_config.hidden_size)
    before = (folder / "sft" / "export" / "model.safetensors").stat().st_mtime_ns
    dno("sft", config)
    assert "nothing to do" in capsys.readouterr().err
    assert (folder / "sft" / "export" / "model.safetensors").stat().st_mtime_ns == before


def test_prompt_tokens_of_sft_are_masked(folder, sft_config):
    from dno_jax.config import SftConfig, parse_config
    from dno_jax.runtime.runtime import Runtime
    from dno_jax.stages.sft import supervised_rows

    config = parse_config(SftConfig, sft_config, place="test")
    runtime = Runtime.start(config)
    for row in supervised_rows(runtime, config)[:5]:
        assert row.prompt_ids[0][0] == 1  # one BOS, in the prompt
        assert 1 not in row.response_ids[0]
        assert row.response_ids[0][-1] == 2
        assert list(row.response_ids[0]).count(2) == 1
        assert row.weight == len(row.response_ids[0]) == 4


def test_an_interrupt_in_a_callback_of_the_garbage_collector_ends_the_command():
    code = """
import gc, os, signal, sys, threading, time
from dno_jax.cli import main as cli

timer = threading.Timer
threading.Timer = lambda seconds, *rest: timer(seconds + 2, *rest)  # a busy machine takes a while to say "dropped"

class Broken:
    def __del__(self):
        raise ValueError("of another kind")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

def interrupt(phase, info):
    gc.callbacks.remove(interrupt)
    os.kill(os.getpid(), signal.SIGINT)

@cli.app.command()
def linger():
    Broken()
    gc.callbacks.append(interrupt)
    gc.collect()
    print("dropped", flush=True)
    time.sleep(60)

sys.argv = ["dno", "linger"]
cli.main()
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (130, "dropped\n"), done.stderr
    assert "KeyboardInterrupt" not in done.stderr
    assert "ValueError: of another kind" in done.stderr  # what Python says of all others, it still says
    assert time.monotonic() - start < 60


def test_an_interrupt_before_the_command_has_begun_is_quiet(monkeypatch, capsys):
    def interrupted(*, standalone_mode):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    hook = sys.unraisablehook
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr() == ("", "")
    assert sys.unraisablehook is hook


def test_help_names_every_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dno", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    for name in ("run", "sft", "import", "export", "status", "inspect", "game", *STAGES):
        assert f"  {name.replace('_', '-')} " in said


def test_the_demo_starts_without_a_warning(monkeypatch):
    from dno_jax.config import RunConfig, load_config
    from dno_jax.stages import template

    monkeypatch.chdir(Path(__file__).parents[2])
    config = load_config(RunConfig, "configs/demo.yaml")
    found = template.report(config.model, config.prompts.path)
    assert {finding.level for finding in found.findings} == {"note"}
    assert any("comes back as" in finding.text for finding in found.findings)  # its 512 tokens know no asterisk


def test_libraries_give_no_advice_at_the_start():
    """transformers tells everybody without torch so, at every import."""
    code = """
from dno_jax.cli import process
def start(standalone_mode):
    import transformers
    from transformers.utils import logging
    logging.get_logger("transformers").warning_advice("PyTorch was not found")
process.run(start)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"USE_TORCH": "0"}, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
