"""Checkpoints as people have them: what transformers loads is loaded, and what is none is called by its name."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.hf.config_json import parse_config
from dno_jax.model.hf.tensors import stored_tensors
from dno_jax.runtime.fit import warn_of_dropout
from tests.model.checkpoints import same
from tests.model.conftest import write_json
from tests.model.families import CASES, SIZES

SHAPE = {**SIZES, "num_hidden_layers": 2, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROTARY = [
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached",
    "model.rotary_emb_local.original_inv_freq",
    "model.rotary_emb.full_attention_inv_freq",
]


def write(path: Path, *, edit=None, shards: int = 1, **changes) -> Path:
    """Write a random checkpoint; `edit` changes its tensors, `changes` its config.json."""
    path.mkdir()
    tree = {key: value for key, value in {**SHAPE, **changes}.items() if value is not ...}
    write_json(path / "config.json", tree)
    shape = parse_config({**SHAPE, **{k: v for k, v in changes.items() if k == "tie_word_embeddings"}}, place="")
    random = np.random.default_rng(0)
    tensors = {s.name: random.standard_normal(s.shape).astype(np.float32) for s in stored_tensors(shape)}
    tensors = edit(tensors) if edit else tensors
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    place = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(place.values())):
        save_file({n: a for n, a in tensors.items() if place[n] == file}, path / file, metadata={"format": "pt"})
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": place})
    return path


def head_alone(tensors):
    tensors[HEAD] = tensors.pop(EMBED)
    return tensors


def bare(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_buffers(tensors):
    return tensors | {name: np.ones(8, np.float32) for name in ROTARY}


TIED = {"tie_word_embeddings": True}
ACCEPTED = [
    ({"edit": head_alone, **TIED}, "the tied head under its own name alone"),
    ({"edit": bare, **TIED}, "no prefixes"),
    ({"edit": bare, "architectures": ["LlamaModel"]}, "no prefixes, with a head"),
    ({"edit": with_buffers}, "buffers of rotations"),
    ({"architectures": ["FSDPLlamaForCausalLM"]}, "wrapped by FSDP"),
    ({"architectures": []}, "no architecture"),
    ({"architectures": ...}, "no architectures at all"),
    ({"architectures": ["LLaMAForCausalLM"]}, "the first spelling"),
    ({"attention_dropout": 0.1, "hidden_dropout": 0.2}, "dropout"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "theta twice"),
    ({"rope_scaling": None, "rope_theta": 1e4}, "no scaling"),
    ({"max_length": 20, "temperature": 0.6, "tokenizer_class": "X", "id2label": {"0": "a", "1": "b"}}, "of old"),
    ({"_attn_implementation": "sdpa", "unsloth_version": "1", "is_decoder": True, "pruned_heads": {}}, "of tools"),
    ({"use_sliding_window": False, "sliding_window": None, "qk_layernorm": False}, "neutral settings"),
]


@pytest.mark.parametrize(("changes", "name"), ACCEPTED, ids=[name for _, name in ACCEPTED])
def test_what_transformers_loads_is_loaded(tmp_path, changes, name):
    plain = write(tmp_path / "plain", **{key: changes[key] for key in TIED if key in changes})
    config, params = hf.load(write(tmp_path / "other", **changes))
    expected, original = hf.load(plain)
    assert config == expected
    same(params, original)


@pytest.mark.parametrize("edit", [head_alone, bare, with_buffers])
def test_transformers_reads_the_same_of_them(tmp_path, edit):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(write(tmp_path / name, edit=change, **TIED), dtype=torch.float32)
        for name, change in (("plain", None), ("other", edit))
    ]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_index_may_name_a_tied_head_that_is_not_there(tmp_path):
    path = write(tmp_path / "x", shards=2, **TIED)
    index = path / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"] |= dict.fromkeys([HEAD, *ROTARY], "model-00002-of-00002.safetensors")
    write_json(index, tree)
    same(hf.load(path)[1], hf.load(write(tmp_path / "plain", **TIED))[1])
    untied = write(tmp_path / "untied", shards=2, edit=lambda t: {n: a for n, a in t.items() if n != HEAD})
    (untied / "model.safetensors.index.json").write_text(index.read_text())
    with pytest.raises(DnoError, match=r"tensor lm_head\.weight is missing"):
        hf.check(untied)


LINEAR = {"rope_type": "linear", "factor": 4.0}
GEMMA = CASES["gemma3"].config_json
PHI = CASES["phi4"].config_json
PHI_ROPE = PHI["rope_parameters"]


@pytest.mark.parametrize(
    ("tree", "beside"),
    [
        ({**SHAPE, "rope_parameters": {**LINEAR, "rope_theta": 5e3}}, {"rope_theta": 5e3, "rope_scaling": LINEAR}),
        (
            {**SHAPE, "rope_parameters": {**LINEAR, "rope_theta": 5e3}},
            {"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 5e3}},
        ),
        (
            GEMMA,
            {"rope_theta": 5e3, "rope_local_base_freq": 100.0, "rope_scaling": {"type": "linear", "factor": 8.0}},
        ),
        (
            PHI,
            {
                "rope_theta": 5e3,
                "partial_rotary_factor": 0.75,
                "rope_scaling": {"type": "longrope"} | {k: PHI_ROPE[k] for k in ("short_factor", "long_factor")},
            },
        ),
    ],
    ids=["linear", "type", "gemma3", "phi4"],
)
def test_rotations_may_be_said_twice_where_they_agree(tree, beside):
    assert parse_config({**tree, **beside}, place="x") == parse_config(tree, place="x")
    wrong = {**beside["rope_scaling"], **({"factor": 3.0} if "factor" in beside["rope_scaling"] else {"factor": 2.0})}
    with pytest.raises(DnoError, match="rope_scaling and rope_parameters are both given and differ in factor"):
        parse_config({**tree, **beside, "rope_scaling": wrong}, place="x")


def test_dropout_is_said(make_config, capsys, small_folder):
    path = small_folder / "dropping"
    tree = json.loads((Path(make_config().model.path) / "config.json").read_text())
    path.mkdir()
    write_json(path / "config.json", {**tree, "attention_dropout": 0.25})
    warn_of_dropout(make_config(model={"path": str(path)}))
    said = capsys.readouterr().err
    assert "attention_dropout 0.25" in said
    assert "nothing is dropped here" in said


def test_all_unknown_keys_are_named_at_once(tmp_path):
    tree = {**SHAPE, "mystery": 1, "other": "x" * 500, "attention_bias": 3, "vocab_size": ...}
    tree = {key: value for key, value in tree.items() if value is not ...}
    with pytest.raises(DnoError) as caught:
        parse_config({**tree, "partial_rotary_factor": 0.5}, place="x")
    text = str(caught.value)
    assert all(f"{word!r}" in text for word in ("mystery", "other", "vocab_size"))
    assert "partial_rotary_factor is 0.5" in text
    with pytest.raises(DnoError) as caught:
        parse_config(SHAPE | {f"key_{i}": "y" * 1000 for i in range(500)}, place="x")
    assert len(str(caught.value).splitlines()) <= 10
    assert "and 494 more" in str(caught.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 976\n"


def spoil(name: str, path: Path) -> None:
    """Turn a checkpoint into what people give in its place."""
    weights = path / "model.safetensors"
    if name == "LFS weights":
        weights.write_bytes(POINTER)
    elif name == "LFS config":
        (path / "config.json").write_bytes(POINTER)
    elif name in ("adapter", "adapter with a config"):
        weights.rename(path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text("{}")
        if name == "adapter":
            (path / "config.json").unlink()
    elif name == "a lone shard":
        weights.rename(path / "model-00001-of-00003.safetensors")
    elif name == "a shard that is all":
        weights.rename(path / "model-00001-of-00001.safetensors")
    elif name == "pickles":
        weights.rename(path / "pytorch_model.bin")
    elif name == "a trainer's state":
        weights.unlink()
        (path / "config.json").unlink()
        (path / "checkpoint-500").mkdir()
    elif name == "GGUF":
        weights.rename(path / "model-Q4_K_M.gguf")
        (path / "config.json").unlink()
    elif name == "the maker's own":
        weights.rename(path / "consolidated.safetensors")


STRANGERS = {
    "LFS weights": "model.safetensors: a Git LFS pointer of .* git lfs pull",
    "LFS config": "config.json: a Git LFS pointer of .* git lfs pull",
    "adapter": "config.json: no such file; this is a PEFT adapter .*merge_and_unload",
    "adapter with a config": "this is a PEFT adapter .*merge_and_unload",
    "a lone shard": "1 of 3 shards are here .* without the index",
    "a shard that is all": "rename that to model.safetensors",
    "pickles": "only safetensors checkpoints can be read, and pytorch_model.bin may run code",
    "a trainer's state": "checkpoint-500 is a trainer's state",
    "GGUF": "model-Q4_K_M.gguf is llama.cpp's format",
    "the maker's own": "consolidated.safetensors is of the maker's own layout",
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_no_checkpoint_is_called_by_its_name(tmp_path, name):
    path = write(tmp_path / "x")
    spoil(name, path)
    with pytest.raises(DnoError, match=STRANGERS[name]) as caught:
        hf.load(path)
    assert len(str(caught.value).splitlines()) <= 10


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda name: f"_orig_mod.{name}", r"'_orig_mod\.' .*torch\.compile was around"),
        (lambda name: name.replace("model.", "model._orig_mod.", 1), r"'_orig_mod\.' .*torch\.compile"),
        (lambda name: f"module.{name}", r"'module\.' .*DistributedDataParallel"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "FSDP was around"),
        (lambda name: f"base_model.model.{name}", r"'base_model\.model\.' .*PEFT was around"),
        (lambda name: f"actor.{name}", r"'actor\.' .*something was around"),
    ],
    ids=["compile", "compiled body", "module", "fsdp", "peft", "unknown"],
)
def test_wrappers_are_called_by_their_names(tmp_path, edit, words):
    path = write(tmp_path / "x", edit=lambda tensors: {edit(name): tensor for name, tensor in tensors.items()})
    with pytest.raises(DnoError, match=words) as caught:
        hf.check(path)
    assert len(str(caught.value).splitlines()) <= 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected at most 2,000"),
        ({"vocab_size": 2**31 - 1}, "vocab_size is 2147483647; expected at most"),
        ({"vocab_size": 10**400}, "vocab_size is a number of many digits"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is a number of many digits"),
        ({"rope_theta": 10**400}, "many digits.*; expected a positive number"),
        ({"hidden_size": 2**40, "head_dim": 8}, "hidden_size is"),
        (
            {"model_type": "mixtral", "architectures": None, "num_hidden_layers": 1999, "num_local_experts": 8000},
            "1999 layers of 8000 experts",
        ),
    ],
    ids=range(7),
)
def test_shapes_beyond_any_model_are_refused_at_once(changes, words):
    tracemalloc.start()
    with pytest.raises(DnoError, match=words):
        parse_config({**SHAPE, **changes}, place="x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ("\ufeff{}", "not valid JSON"),
    ],
    ids=["empty", "deep", "digits", "list", "mark"],
)
def test_a_config_that_is_no_object_is_an_error(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DnoError, match=words) as caught:
        hf.read_config(tmp_path)
    assert len(str(caught.value)) < 1000


def test_files_of_gigabytes_are_not_read(tmp_path):
    """Sparse files: a config, and a header that covers most of its file."""
    path = write(tmp_path / "x")
    for name, start, words in (
        ("model.safetensors", (1 << 30).to_bytes(8, "little"), "a header of 1,073,741,824 bytes; expected at most"),
        ("config.json", b"", "4,294,967,296 bytes; expected at most"),
    ):
        with (path / name).open("wb") as file:
            file.write(start)
            file.truncate(1 << 32)
        tracemalloc.start()
        with pytest.raises(DnoError, match=words):
            hf.load(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


def test_sixty_thousand_names_get_a_short_message(tmp_path):
    """Minutes, were it quadratic."""
    path = write(tmp_path / "x")
    names = [f"model.layers.{i}.mlp.experts.{i}.weight" for i in range(60_000)]
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * len(names)))
    with pytest.raises(DnoError, match=r"files and config\.json disagree") as caught:
        hf.load(path)
    assert len(str(caught.value).splitlines()) <= 10
    assert "more" in str(caught.value).splitlines()[-1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [EMBED, "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    def break_one(tensors):
        tensors[name].reshape(-1)[7] = value
        return tensors

    with pytest.raises(DnoError, match=f"model.safetensors: tensor {name} holds NaN or infinity"):
        hf.load(write(tmp_path / "x", edit=break_one))


def test_large_weights_are_finite(tmp_path):
    """Their sum is not."""
    path = write(tmp_path / "x", edit=lambda t: {n: np.full_like(a, 3e38) for n, a in t.items()})
    assert hf.load(path)[1]["embed"].max() == np.float32(3e38)
