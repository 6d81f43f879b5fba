"""Prompts with a prefix, too long, or with control tokens in them, from the file to the training rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dno_jax.annotation.pool import Candidate
from dno_jax.config import SftConfig, parse_config
from dno_jax.data.pair_table import PairRows, PairTable
from dno_jax.data.pools import pools_of
from dno_jax.data.prompts import load_prompts
from dno_jax.errors import DnoError
from dno_jax.model.text.templates import TemplateStrip
from dno_jax.records import Judgement, Message, Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime, load_tokenizer
from dno_jax.stages import annotate, pair, sample
from dno_jax.stages.sft import supervised_examples, supervised_rows
from dno_jax.stages.template import TemplateReport, render
from dno_jax.training.batches import make_batch
from tests.batches import response_tokens
from tests.pairs import in_order_of_id
from tests.running import export, prepare, run_stage
from tests.small import TEMPLATE, WORDS, small_tree

PREFIX = "bam dom"
LONG = " ".join(WORDS[:30])
ROWS = [
    {"prompt_id": "plain", "prompt": "bam fen kos", "gold": "bam fen ."},
    {"prompt_id": "prefix", "prompt": "kan kem les", "assistant_prefix": PREFIX, "gold": " kan kem ."},
    {"prompt_id": "long", "prompt": LONG, "gold": "bam ."},
    {"prompt_id": "turns", "messages": [
        {"role": "system", "content": "dan"}, {"role": "user", "content": LONG},
        {"role": "assistant", "content": "bas"}, {"role": "user", "content": "ges ket"}]},
    {"prompt_id": "injects", "prompt": "bam </s> kos"},
    {"prompt_id": "gold injects", "prompt": "bam gen", "gold": "bam </s> kos"},
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_folder):
    """One sampled, judged and paired iteration."""
    from dno_jax.config import RunConfig

    folder = tmp_path_factory.mktemp("template")
    (folder / "chat.jinja").write_text(TEMPLATE)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tree = small_tree(small_folder) | {"run_dir": str(folder / "run"), "iterations": 1}
    tree["model"] |= {"chat_template": str(folder / "chat.jinja")}
    tree["prompts"] |= {"path": str(folder / "rows.jsonl"), "too_long": "truncate"}
    tree["pairing"] |= {"rule": "all"}
    config = parse_config(RunConfig, tree, place="test")
    prepare(config)
    run_stage(sample, config, 0)
    run_stage(annotate, config, 0)
    run_stage(pair, config, 0)
    return config, RunDir(config.run_dir)


def test_what_was_dropped_and_cut_is_counted(run):
    _, run_dir = run
    manifest = run_dir.stage("sample", 0).require()
    assert manifest.dropped == {"prompt spells a control token": 1, "gold response without points or ids": 1}
    assert manifest.details["truncated_prompts"] == 2
    rollouts = list(run_dir.stage("sample", 0).read(Rollout))
    assert {row.prompt_id for row in rollouts} == {row["prompt_id"] for row in ROWS} - {"injects"}
    assert {row.prompt_id for row in rollouts if row.is_gold} == {"plain", "prefix", "long"}


def test_the_judge_is_shown_what_was_sampled_from(run):
    config, run_dir = run
    shown = {prompt.prompt_id: prompt for prompt in load_prompts(str(run_dir.prompts_path(0)))}
    tokenizer = load_tokenizer(config.model)
    for rollout in run_dir.stage("sample", 0).read(Rollout):
        prompt = shown[rollout.prompt_id]
        assert tuple(rollout.prompt_token_ids) == tokenizer.prompt_ids(prompt.messages, prompt.assistant_prefix)
        assert len(rollout.prompt_token_ids) <= 16
        assert (rollout.prompt_token_ids[0], rollout.prompt_token_ids.count(1)) == (1, 1)
    assert len(shown["long"].messages[0].content.split()) == 15
    assert LONG.endswith(shown["long"].messages[0].content)
    assert [message.content for message in shown["turns"].messages] == ["dan", "ges ket"]
    rollouts = [row for row in run_dir.stage("sample", 0).read(Rollout) if row.prompt_id == "prefix"]
    (pool,) = pools_of(rollouts, shown, dropped=Counter())
    texts = {row.rollout_id: row.text for row in rollouts}
    assert len(pool.candidates) > 2
    assert all(candidate.text.startswith(f"{PREFIX} ") for candidate in pool.candidates if candidate.text != PREFIX)
    assert all(candidate.text == PREFIX + texts[candidate.candidate_id] for candidate in pool.candidates)
    assert tokenizer.decode(rollouts[0].prompt_token_ids).endswith(PREFIX)
    assert {row.prompt_id for row in run_dir.stage("annotate", 0).read(Judgement)} >= {"prefix", "long"}


def test_only_what_follows_the_prefix_is_trained_with_at_most_one_end_token(run):
    _, run_dir = run
    pairs = in_order_of_id(run_dir, 0)
    rollouts = {row.rollout_id: row for row in run_dir.stage("sample", 0).read(Rollout)}
    rows = PairRows(PairTable.load(run_dir.stage("pair", 0)))
    batch = make_batch(rows, batch_size=len(rows), max_length=64)
    finishes = set()
    for index, made in enumerate(pairs):
        for side, name in enumerate((made.chosen_id, made.rejected_id)):
            trained = response_tokens(batch, index, side)
            np.testing.assert_array_equal(trained, rollouts[name].token_ids)
            stopped = rollouts[name].finish == "stop"
            assert (np.sum(trained == 2), trained[-1] == 2) == (stopped, stopped)
            finishes.add(rollouts[name].finish)
    assert "prefix" in {made.prompt_id for made in pairs}
    assert finishes == {"stop", "length"}


def test_the_report_lies_in_the_run_directory(run):
    _, run_dir = run
    said = run_dir.template_path.read_text()
    assert "note    concatenation: prompt and response ids are the whole chat's" in said
    assert "note    vocabulary: 76 ids of the tokenizer, 76 rows of the embedding" in said
    assert "loss on [" in said


def test_a_response_given_for_a_prefix_and_scored_is_found(run):
    """sampling.source=data with points: the judge's text is prefix and response, the points are by response."""
    from dno_jax.annotation.embedded import GivenAnnotator
    from dno_jax.annotation.pool import Pool

    row = {"prompt_id": "p", "messages": [{"role": "user", "content": "q"}], "assistant_prefix": "Sure,"}
    row["candidates"] = [{"text": " yes", "score": 2.0}, {"text": " no", "score": 1.0}]
    candidates = tuple(Candidate(f"000/p/{i}", f"Sure, {text}") for i, text in enumerate(("no", "yes")))
    judgement = GivenAnnotator()._judge(Pool(Prompt.model_validate(row), candidates))
    assert judgement.scores == (1.0, 2.0)


def test_supervised_examples_take_a_prefix_and_name_the_row_that_spells_a_control_token(tmp_path, small_folder):
    tree = small_tree(small_folder)
    path = tmp_path / "sft.jsonl"
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": tree["model"],
        "data": {"path": str(path), "max_length": 32},
        "training": {"batch_size": 8},
    }
    runtime = Runtime.start(parse_config(SftConfig, config, place="test"))
    good = {"prompt": "bam", "assistant_prefix": " dom", "response": " fen"}
    path.write_text(json.dumps(good))
    (row,) = supervised_rows(runtime, runtime.config)
    assert runtime.tokenizer.strip(np.asarray(row.prompt_ids[0]).tolist()) == ["<s>", "bam", "dom"]
    assert runtime.tokenizer.strip(np.asarray(row.response_ids[0]).tolist()) == ["fen", "</s>"]
    for bad in ({"prompt": "bam </s>"}, {"assistant_prefix": " </s>"}, {"response": "</s>"}):
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | bad))
        with pytest.raises(DnoError, match=r"sft\.jsonl:2: .*spells the control token '</s>'"):
            supervised_rows(runtime, runtime.config)
    held = replace(runtime, tokenizer=replace(runtime.tokenizer, num_rows=75))  # the last word has no row
    path.write_text(
        "".join(json.dumps(good | bad) + "\n" for bad in ({}, {"prompt": WORDS[-1]}, {"response": WORDS[-1]}))
    )
    found = supervised_examples(held, held.config)
    assert len(found.rows) == 1
    assert "2 a token without an embedding" in found.line.replace(" x ", " ")
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "bam"}], "response": "dom"}))
    with pytest.raises(DnoError, match="goes into assistant_prefix"):
        supervised_rows(runtime, runtime.config)


def test_an_export_brings_the_template_of_the_run(run, tmp_path):
    """Another reader of the checkpoint renders chats as it was trained on them."""
    from transformers import AutoTokenizer

    config, _ = run
    export(config, policy=0, path=str(tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    chat = [{"role": "user", "content": "bam kos"}]
    ids = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
    messages = (Message(role="user", content="bam kos"),)
    assert tuple(ids) == load_tokenizer(config.model).prompt_ids(messages)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize(("prompt", "response"), [(5, 5), (100_000, 7), (3, 100_000), (50_000, 50_000)])
def test_of_long_texts_the_ends_are_shown(prompt, response):
    """A text of a megabyte is no megabyte of lines; where the loss starts and ends is always there."""
    total = prompt + response
    ids = tuple(range(total))
    strip = TemplateStrip(ids, tuple(f"t{i}" for i in ids), prompt, total, (False,) * total, 1, end_trained=True)
    lines = render(TemplateReport(strip, ())).plain.splitlines()
    assert len(lines) < 700
    shown = [int(line.split()[0]) for line in lines[2:] if line.strip() and not line.strip().startswith("...")]
    left_out = [int(line.split()[1].replace(",", "")) for line in lines if line.strip().startswith("...")]
    assert len(shown) + sum(left_out) == total
    assert {0, prompt - 1, prompt, total - 1} <= set(shown)
    assert any(line.endswith(f"'t{total - 1}'  end") for line in lines)
    assert bool(left_out) == (total > 1000)
