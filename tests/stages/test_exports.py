"""What an export says to be done with it: the command of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import shlex

import pytest

from dno_jax.stages.exports import harness_command


def read_as_the_harness_does(command):
    """Its options that are used here, as `lm_eval` 0.4 declares them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="hf")
    parser.add_argument("--model_args", type=json.loads)
    parser.add_argument("--tasks")
    parser.add_argument("--batch_size", default="1")
    parser.add_argument("--apply_chat_template", nargs="?", const=True, default=False)
    program, *words = shlex.split(command)
    assert program == "lm_eval"
    return parser.parse_args(words)


@pytest.mark.parametrize("path", ["out", "runs/a b/out", "it's", "a,dtype=float16", 'quo"te', "$HOME"])
@pytest.mark.parametrize(("template", "chat"), [("tokenizer", True), ("raw", False), ("/a/template.jinja", True)])
def test_the_command_names_the_export_whatever_its_path(path, template, chat):
    found = read_as_the_harness_does(harness_command(path, template=template))
    assert found.model_args == {"pretrained": path}
    assert found.apply_chat_template is chat
    assert found.batch_size == "auto"
    assert "gsm8k" in found.tasks.split(",")
