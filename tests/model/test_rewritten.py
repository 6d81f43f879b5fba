"""The JSON files of an export: what other programs look for, and nothing that they cannot have."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.hf.config_json import parse_config
from dno_jax.model.hf.rewritten import config_text, write_tokenizer
from tests.model.conftest import write_json
from tests.model.families import CASES, FACTORS, ORIGINAL, SIZES
from tests.model.tokenizers import make_tokenizer


def rewritten(path, tree, **options):
    write_json(path / "config.json", tree)
    config = hf.read_config(path)
    text = config_text(config, source=path, dtype=options.get("dtype"))
    assert parse_config(json.loads(text), place="export") == config
    return json.loads(text), text


EXPECTED = {
    "llama": {"rope_theta": 5000.0},
    "llama3": {
        "rope_theta": 5000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": ORIGINAL,
        },
    },
    "linear": {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "gemma3": {
        "rope_theta": 5000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi4": {
        "rope_theta": 5000.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": ORIGINAL,
        "rope_scaling": {"type": "longrope", "short_factor": FACTORS, "long_factor": [2.0 * x for x in FACTORS]},
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rotations_are_said_in_the_words_of_transformers_4_too(tmp_path, name):
    tree = CASES[name].config_json
    if name == "llama":
        del tree["rope_theta"]
        tree["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    found, _ = rewritten(tmp_path, tree)
    assert found == {**tree, **EXPECTED[name]}
    assert rewritten(tmp_path, found)[0] == found


def test_what_transformers_4_wrote_is_kept_byte_by_byte(tmp_path):
    tree = {"model_type": "llama", **SIZES, "rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(text := json.dumps(tree))
    assert config_text(hf.read_config(tmp_path), source=tmp_path, dtype=None) == text


def test_code_of_its_own_and_experts_by_another_name(tmp_path):
    tree = {**CASES["phi4"].config_json, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}
    assert "auto_map" not in rewritten(tmp_path, tree)[0]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16}
    found, _ = rewritten(tmp_path, {"model_type": "qwen3_moe", **SIZES, **experts})
    assert found["num_experts"] == found["num_local_experts"] == 4
    assert rewritten(tmp_path, CASES["granite4"].config_json)[0]["layer_types"] == ["attention"] * 4
    found, _ = rewritten(tmp_path, {"model_type": "llama", **SIZES, "torch_dtype": "float32"}, dtype=np.float16)
    assert found["torch_dtype"] == "float16"


def test_dropout_stays_in_the_export(tmp_path):
    assert (
        rewritten(tmp_path, {"model_type": "llama", **SIZES, "attention_dropout": 0.1})[0]["attention_dropout"] == 0.1
    )


def test_another_source_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "llama", **SIZES})
    other = parse_config({"model_type": "llama", **SIZES, "vocab_size": 98}, place="x")
    with pytest.raises(DnoError, match="vocab_size is 97, but the parameters have 98; wrong source"):
        config_text(other, source=tmp_path, dtype=None)


def exported(tmp_path, edit, *, template, own="own", files=()):
    source = make_tokenizer(tmp_path / "source", template=own)
    config = source / "tokenizer_config.json"
    write_json(config, {**json.loads(config.read_text()), **edit})
    for name, text in files:
        (source / name).write_text(text)
    target = tmp_path / "target"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    write_tokenizer(source, target, chat_template=template)
    return target, json.loads((target / "tokenizer_config.json").read_text())


NAMED = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]


@pytest.mark.parametrize(
    ("edit", "files", "template", "default"),
    [
        ({}, [], "trained", "trained"),
        ({}, [], None, "own"),
        ({}, [("chat_template.jinja", "from the file")], None, "from the file"),
        ({}, [("chat_template.jinja", "from the file")], "trained", "trained"),
        ({"chat_template": NAMED}, [], "trained", "trained"),
        ({"chat_template": NAMED}, [], None, "a"),
        ({}, [("chat_template.json", '{"chat_template": "a processor\'s"}')], "trained", "trained"),
        ({"chat_template": None}, [], None, None),
    ],
    ids=range(8),
)
def test_the_trained_template_is_wherever_one_is_looked_for(tmp_path, edit, files, template, default):
    target, tree = exported(tmp_path, edit, template=template, files=files)
    file = target / "chat_template.jinja"
    assert (file.read_text() if file.exists() else None) == default
    said = tree.get("chat_template")
    if isinstance(said, list):
        assert said == [{"name": "default", "template": default}, NAMED[1]]
    else:
        assert said == default
    if (target / "chat_template.json").exists():
        assert json.loads((target / "chat_template.json").read_text()) == {"chat_template": default}


@pytest.mark.parametrize("own", ["TokenizersBackend", "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast"])
def test_a_tokenizer_is_of_a_class_that_every_version_takes_as_the_file_is(tmp_path, own):
    _, tree = exported(tmp_path, {"tokenizer_class": own, "auto_map": {"AutoTokenizer": ["own.T", None]}}, template="t")
    assert tree["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tree["model_input_names"] == ["input_ids", "attention_mask"]
    assert "auto_map" not in tree


def test_a_class_stays_where_it_may_know_more_than_the_files(tmp_path):
    _, tree = exported(tmp_path, {"tokenizer_class": "LlamaTokenizer", "eos_token": None}, template="t")
    assert tree["tokenizer_class"] == "LlamaTokenizer"


def test_special_tokens_have_the_name_that_both_versions_read(tmp_path):
    _, tree = exported(tmp_path, {"extra_special_tokens": ["<|x|>"]}, template="t")
    assert tree["additional_special_tokens"] == ["<|x|>"]
    assert "extra_special_tokens" not in tree
