"""Policies that answer people, through the very sampler and template of the run."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import jax
import pytest
import yaml

from dno_jax.cli import main as cli
from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.parallel.sharding import TRAIN
from dno_jax.records import Message
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages.speak import Speakers
from dno_jax.training.checkpoint import save_policy
from tests.running import prepare
from tests.small import TEMPLATE, small_tree

HELLO = [Message(role="user", content="bas des")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with policy 0 and another policy 1, as training would leave it."""
    folder = tmp_path_factory.mktemp("speak")
    (folder / "chat.jinja").write_text(TEMPLATE)
    tree = small_tree(folder)
    tree["model"]["chat_template"] = str(folder / "chat.jinja")
    config = parse_config(RunConfig, tree, place="test")
    prepare(config)
    runtime = Runtime.start(config)
    params = runtime.load_policy(runtime.run_dir.policy(0), TRAIN)
    save_policy(runtime.run_dir.policy(1), jax.tree.map(lambda leaf: leaf * -1.5, params))
    return folder


@pytest.fixture(scope="module")
def speakers(folder):
    return Speakers.open(str(folder / "run"))


def test_an_answer_is_a_function_of_policy_conversation_and_draw(speakers):
    assert (speakers.numbers, speakers.default, speakers.is_run) == ((0, 1), 1, True)
    said = {(policy, draw): speakers.answer(policy, HELLO, draw=draw) for policy in (0, 1) for draw in (0, 1)}
    assert len({found.text for found in said.values()}) == 4
    assert speakers.answer(0, HELLO, draw=1) == said[0, 1]
    assert all(found.finish in ("stop", "length") for found in said.values())


def test_a_text_is_shown_as_it_grows(speakers):
    shown = []
    said = max(
        (speakers.answer(0, HELLO, draw=draw, show=shown.append) for draw in range(2)), key=lambda s: len(s.text)
    )
    assert said.text in shown
    assert all(later.startswith(earlier) or earlier in {shown[-1], said.text} for earlier, later in pairwise(shown))


def test_the_oldest_turns_are_left_out_where_a_conversation_no_longer_fits(speakers):
    assert speakers.longest_prompt == 64 - 16
    turns = [Message(role="system", content="bas")]
    for _ in range(12):
        turns += [Message(role="user", content="des des"), Message(role="assistant", content="dot .")]
    said = speakers.answer(0, [*turns, *HELLO], draw=0)
    assert 0 < said.num_forgotten < 24
    with pytest.raises(DnoError, match=r"the message has 10\d tokens; at most 48 fit"):
        speakers.answer(0, [Message(role="user", content="bas " * 100)], draw=0)


def test_a_checkpoint_says_what_policy_0_says(folder, speakers):
    options = ["sampling.temperature=0", f"model.chat_template={folder}/chat.jinja", "sampling.max_new_tokens=16"]
    alone = Speakers.open(str(folder / "checkpoint"), overrides=options)
    assert (alone.numbers, alone.is_run) == ((0,), False)
    greedy = Speakers.open(str(folder / "run"), overrides=options[:1])
    assert alone.answer(0, HELLO, draw=0).text == greedy.answer(0, HELLO, draw=5).text


def dno(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["dno", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_generate_answers_a_file(folder, speakers, monkeypatch, capsys, tmp_path):
    run, held_out, out = folder / "run", folder / "held_out.jsonl", tmp_path / "out.jsonl"
    prompts = [json.loads(line) for line in held_out.read_text().splitlines()]
    assert dno(monkeypatch, "generate", run, held_out, "--policy", 0, "--num-samples", 2, "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [prompt["prompt_id"] for prompt in prompts for _ in range(2)]
    assert [row["sample"] for row in rows] == [0, 1] * len(prompts)
    assert {row["policy"] for row in rows} == {0}
    assert len({row["response"] for row in rows}) > 4
    capsys.readouterr()
    assert dno(monkeypatch, "generate", run, held_out, "--policy", 0, "--num-samples", 2) == 0
    said = capsys.readouterr().out
    for row, prompt in zip(rows[::2], prompts, strict=True):
        assert f"user: {prompt['messages'][0]['content']}\npolicy 0: {row['response'].strip()}" in said
    assert dno(monkeypatch, "generate", run, held_out, "--out", out) == 2
    assert "out.jsonl exists" in capsys.readouterr().err


def test_chat_talks_to_the_policies_of_a_run(folder, speakers, monkeypatch, capsys):
    typed = iter(["bas des", "/policy 0", "/new", "bas des"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, "/quit"))
    assert dno(monkeypatch, "chat", folder / "run") == 0
    said = capsys.readouterr()
    for policy in (1, 0):
        assert speakers.answer(policy, HELLO, draw=0).text in said.out
    assert "policy 1 of" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "{folder}"], "neither a run directory (policies/) nor a Hugging Face checkpoint (config.json)"),
        (["chat", "{folder}/none"], "neither a run directory"),
        (["chat", "{folder}/run", "--policy", "7"], "there is no policy 7; there are 0, 1"),
        (["chat", "{folder}/run", "--beside", "7"], "there is no policy 7"),
        (["chat", "{folder}/run", "sampling.temprature=1"], "temprature"),
        (["generate", "{folder}/run", "{folder}/none.jsonl"], "none.jsonl"),
        (["chat", "{folder}/begun"], "no policy is there yet"),
    ],
)
def test_what_cannot_answer_says_so(folder, monkeypatch, capsys, arguments, message):
    begun = folder / "begun"
    (begun / "policies").mkdir(parents=True, exist_ok=True)
    (begun / "config.yaml").write_text(yaml.safe_dump(small_tree(folder)))
    (begun / "FORMAT").write_text((folder / "run" / "FORMAT").read_text())
    assert dno(monkeypatch, *(argument.format(folder=folder) for argument in arguments)) == 2
    assert message in capsys.readouterr().err
