"""Looks before the run leaps: does everything fit together, and what exactly is trained on?"""

from __future__ import annotations

import asyncio
import os
import tempfile

from dno_jax.annotation.annotator import build_annotator
from dno_jax.config import RunConfig
from dno_jax.model.tokenizer import ChatTokenizer, TemplateStrip, template_strip
from dno_jax.parallel.mesh import is_primary
from dno_jax.parallel.sharding import DECODE, TRAIN
from dno_jax.run_dir import RunDir, write_atomically
from dno_jax.stages import self_judge
from dno_jax.stages.prompts import load_prompts, split_prompts, tokenize_prompts
from dno_jax.stages.runtime import Runtime


def check(config: RunConfig) -> None:
    """Raise now what would otherwise be raised after hours: model, mesh, prompts, template, judge.

    Raises:
        DnoError: naming what does not fit.
    """
    runtime = Runtime.start(config)
    runtime.param_shardings(TRAIN)
    runtime.param_shardings(DECODE)
    split = split_prompts(config)
    for part in {*split.training, split.held_out}:
        tokenize_prompts(part, encode=runtime.tokenizer.prompt_ids, section=config.prompts)
    if config.annotation.kind == "self":
        self_judge.check(config)
    if is_primary():
        with tempfile.TemporaryDirectory() as folder:  # the run's own store is opened with the run directory
            store = os.path.join(folder, "annotations.sqlite")
            for section in (config.annotation, config.evaluation_judge):
                if section.kind != "self":
                    asyncio.run(build_annotator(section, store_path=store, seed=config.seed).close())


def strip(config: RunConfig) -> TemplateStrip:
    """The first prompt with its teacher's response (or a stand-in), as the model sees them."""
    tokenizer = ChatTokenizer.load(config.model.path, config.model.chat_template)
    prompts = load_prompts(config.prompts.path)
    prompt = next((prompt for prompt in prompts if prompt.gold), prompts[0])
    return template_strip(tokenizer, prompt.messages, prompt.gold or "A response.")


def describe(found: TemplateStrip) -> str:
    """The strip as text: a token a line, where the loss starts and ends, and what a reader should check."""
    lines = [
        f"{len(found.ids)} tokens, loss on [{found.loss_start}, {found.loss_end}), "
        f"{found.bos_count} BOS, end token {'trained' if found.end_trained else 'NOT trained'}",
        "",
    ]
    for index, (token_id, token) in enumerate(zip(found.ids, found.tokens, strict=True)):
        trained = "loss" if found.loss_start <= index < found.loss_end else "    "
        lines.append(f"{index:5d} {trained} {token_id:7d} {token!r}")
    return "\n".join(lines) + "\n"


def save_template_strip(config: RunConfig) -> None:
    """Leave the strip in the run directory, where a person can check what was trained on."""
    write_atomically(RunDir(config.run_dir).template_path, describe(strip(config)))
