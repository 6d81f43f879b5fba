"""Examples for `dno sft` from the file to the rows, and that a call that is refused leaves nothing behind."""

import json
import sys

import pytest

from dno_jax.cli import main as cli
from dno_jax.config import SftConfig, dump_config, parse_config
from dno_jax.errors import DnoError
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages.sft import supervised_examples
from tests.small import TEMPLATE, small_tree


@pytest.fixture
def make(tmp_path, small_folder):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)

    def config(*rows, **data):
        (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = {
            "run_dir": str(tmp_path / "run"),
            "model": small_tree(small_folder)["model"] | {"chat_template": str(tmp_path / "chat.jinja")},
            "data": {"path": str(tmp_path / "sft.jsonl"), "max_length": 12} | data,
            "training": {"batch_size": 8},
        }
        return parse_config(SftConfig, tree, place="test")

    return config


def words(config):
    """Each example's prompt and response as words, and what is said of the file."""
    runtime = Runtime.start(config)
    found = supervised_examples(runtime, config)
    texts = [[" ".join(runtime.tokenizer.strip(ids[0].tolist())) for ids in (r.prompt_ids, r.response_ids)]
             for r in found.rows]  # fmt: skip
    return texts, found


def turn(role, content):
    return {"role": role, "content": content}


CHAT = [turn("system", "dan"), turn("user", "bam bas"), turn("assistant", "dom"), turn("user", "fen kos"),
        turn("assistant", "les ket")]  # fmt: skip
LONG = {"prompt": " ".join(["bam"] * 20 + ["kos"] * 5), "response": "dom fen les"}
HOPELESS = {"prompt": "bam", "response": " ".join(["dom"] * 12)}


def test_the_last_turn_or_every_turn_of_the_assistant_is_trained(make):
    last = ["<s> dan bam bas dom </s> fen kos", "les ket </s>"]
    texts, found = words(make({"messages": CHAT}))
    assert texts == [last]
    texts, every = words(make({"messages": CHAT}, turns="all"))
    assert texts == [["<s> dan bam bas", "dom </s>"], last]
    assert [row.weight for row in every.rows] == [2.0, 3.0]  # a mean over tokens, whichever turn they are of
    assert every.digest != found.digest


def test_examples_that_are_too_long_are_an_error_dropped_or_cut(make):
    short = {"prompt": "bam", "response": "dom"}
    with pytest.raises(DnoError, match=r"sft\.jsonl:2: 30 tokens exceed data\.max_length 12; .*data\.too_long=drop"):
        words(make(short, LONG))
    texts, found = words(make(short, LONG, HOPELESS, too_long="drop"))
    assert texts == [["<s> bam", "dom </s>"]]
    assert "1 examples from 3 rows (prompt); left out: 2 x too long" in found.line
    texts, found = words(make(short, LONG, HOPELESS, {"messages": [*CHAT, *CHAT[1:]]}, too_long="truncate"))
    assert texts == [
        ["<s> bam", "dom </s>"],
        ["<s> bam bam kos kos kos kos kos", "dom fen les </s>"],  # the response stays whole
        ["<s> dan bam bas dom </s> fen kos", "les ket </s>"],  # as do system messages: the oldest turns go
    ]
    assert "2 x prompt cut" in found.line
    assert "1 x too long" in found.line
    with pytest.raises(DnoError, match=r"holds no examples: .*left out: 1 x too long"):
        words(make(HOPELESS, too_long="drop"))


@pytest.mark.parametrize("shape", ["alpaca", "preference", "array"])
def test_other_peoples_files_are_the_same_examples(make, tmp_path, shape):
    config = make({"prompt": "bam bas", "response": "dom"})
    texts, own = words(config)
    rows = {
        "alpaca": {"instruction": "bam bas", "input": "", "output": "dom"},
        "preference": {"prompt": "bam bas", "chosen": [turn("assistant", "dom")], "rejected": [turn("assistant", "x")]},
        "array": [{"messages": [turn("user", "bam bas"), turn("assistant", "dom")]}],
    }
    (tmp_path / "sft.jsonl").write_text(json.dumps(rows[shape], indent=1))
    again, found = words(config)
    assert (again, found.digest) == (texts, own.digest)  # so a run goes on, whatever form its examples take


@pytest.mark.parametrize(
    ("rows", "changes", "why"),
    [
        ([{"prompt": "bam"}], {}, "sft.jsonl:1: not a valid example: no answer"),
        ([LONG], {}, "30 tokens exceed data.max_length"),
        ([{"prompt": "bam </s>", "response": "dom"}], {}, "spells the control token"),
        ([], {}, "holds no examples"),
        ([{"prompt": "bam", "response": "dom"}], {"weights": 100}, "model.safetensors"),
    ],
    ids=["row", "long", "control", "none", "weights"],
)
def test_a_call_that_is_refused_leaves_nothing_behind(
    make, tmp_path, small_folder, monkeypatch, capsys, rows, changes, why
):
    config = make(*rows)
    if size := changes.get("weights"):
        copy = tmp_path / "checkpoint"
        copy.mkdir()
        for file in (small_folder / "checkpoint").iterdir():
            (copy / file.name).write_bytes(file.read_bytes()[: size if file.suffix == ".safetensors" else None])
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(copy)})})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["dno", "sft", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err
    assert (caught.value.code, why in said, "Traceback" in said) == (2, True, False), said
    assert sorted(tmp_path.rglob("*")) == before
