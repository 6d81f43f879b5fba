"""The demo's committed material is what its generator writes, small, and fit for its tokenizer."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from dno_jax.config import RunConfig, SftConfig, load_config
from dno_jax.records import Example, Prompt, parse_lines

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo"


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("demo_corpus", ROOT / "examples" / "demo_corpus.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "demo_corpus", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def files(corpus):
    return corpus.make_files(0)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "policy")


@pytest.fixture(scope="module")
def examples(files):
    return list(parse_lines(Example, files["sft.jsonl"].splitlines(), place="sft.jsonl"))


def prompts_of(files, name):
    return list(parse_lines(Prompt, files[name].splitlines(), place=name))


def test_the_generator_is_deterministic_and_its_seed_matters(corpus, files):
    assert corpus.make_files(0) == files
    other = corpus.make_rows(1)
    assert all("".join(json.dumps(row) + "\n" for row in rows) != files[name] for name, rows in other.items())


@pytest.mark.parametrize("name", ["prompts.jsonl", "held_out.jsonl"])
def test_committed_prompts_are_what_the_generator_writes(files, name):
    assert (DEMO / name).read_text(encoding="utf-8") == files[name]


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer", "tokenizer_config"])
def test_committed_policy_files_are_what_the_generator_writes(files, name):
    # Parsed, not as bytes: another version of `tokenizers` may write its defaults differently.
    committed = json.loads((DEMO / "policy" / f"{name}.json").read_text(encoding="utf-8"))
    made = json.loads(files[f"policy/{name}.json"])
    if name == "tokenizer":
        committed, made = committed["model"], made["model"]
    assert committed == made


def test_no_prompt_is_in_two_files(files, examples):
    train, held_out = prompts_of(files, "prompts.jsonl"), prompts_of(files, "held_out.jsonl")
    texts = [{row.messages[-1].content for row in rows} for rows in (train, held_out, examples)]
    assert [len(found) for found in texts[:2]] == [len(train), len(held_out)]
    assert sum(len(found) for found in texts) == len(set.union(*texts))
    assert len({row.prompt_id for row in (*train, *held_out)}) == len(train) + len(held_out)
    assert all(row.gold for row in (*train, *held_out))


def test_a_whole_chat_extends_its_prompt_and_ends_with_the_end_token(tokenizer, examples):
    for row in examples[:300]:
        messages = [message.model_dump() for message in row.messages]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": row.response}], return_dict=False
        )
        assert whole[: len(prompt)] == prompt
        assert prompt[0] == tokenizer.bos_token_id
        assert whole.count(tokenizer.eos_token_id) == 1
        assert whole[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(whole[len(prompt) : -1]) == row.response


def test_every_text_is_covered_and_most_words_are_one_token(tokenizer, files, examples):
    rows = [*prompts_of(files, "prompts.jsonl"), *prompts_of(files, "held_out.jsonl")]
    texts = [row.messages[-1].content for row in rows] + [row.gold for row in rows]
    texts += [row.response for row in examples] + [row.messages[-1].content for row in examples]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert all(tokenizer.unk_token_id not in ids for ids in encoded)
    assert [tokenizer.decode(ids) for ids in encoded[:300]] == texts[:300]

    vocabulary = sorted({word for text in texts for word in re.findall(r" ?[A-Za-z]+", text)})
    whole = sum(len(ids) == 1 for ids in tokenizer(vocabulary, add_special_tokens=False)["input_ids"])
    assert whole / len(vocabulary) > 0.9


def test_lengths_fit_the_demo_and_the_model(tokenizer, files, examples):
    run = load_config(RunConfig, ROOT / "configs" / "demo.yaml")
    sft = load_config(SftConfig, DEMO / "sft.yaml")
    context = json.loads(files["policy/config.json"])["max_position_embeddings"]
    assert run.max_length <= context
    assert sft.data.max_length <= context
    rows = [*prompts_of(files, "prompts.jsonl"), *prompts_of(files, "held_out.jsonl"), *examples]
    chats = [[message.model_dump() for message in row.messages] for row in rows]
    lengths = [len(ids) for ids in tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)]
    assert max(lengths) <= run.prompts.max_length
    responses = [row.response if isinstance(row, Example) else row.gold for row in rows]
    told = [len(ids) + 1 for ids in tokenizer(responses, add_special_tokens=False)["input_ids"]]
    assert max(told) <= run.sampling.max_new_tokens
    assert max(a + b for a, b in zip(lengths, told, strict=True)) <= sft.data.max_length


def test_the_demo_is_small():
    paths = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= 2_000_000
    assert all(path.stat().st_size <= 1_200_000 for path in paths)


def test_the_shape_has_the_parameters_it_claims(corpus):
    shape = corpus.model_config()
    width, heads, inner = shape["hidden_size"], shape["num_attention_heads"], shape["intermediate_size"]
    projections = 2 * heads + 2 * shape["num_key_value_heads"]  # query and output; key and value
    layer = width * projections * shape["head_dim"] + 3 * width * inner + 2 * width
    count = shape["vocab_size"] * width + shape["num_hidden_layers"] * layer + width
    assert count == 217_664
    assert "217,664" in corpus.model_config.__doc__
