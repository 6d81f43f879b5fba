"""config.json and generation_config.json of Hugging Face checkpoints: everything understood, or an error.

A key that is neither understood nor known to be harmless is refused: most wrong imports are a scaling, window or
soft-cap that some converter did not look at.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

# model_type -> architecture. Mistral without its sliding window is the same arithmetic as Llama.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers assumes where a key is absent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
_COMMON_DEFAULTS = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
# They say nothing about the arithmetic of a forward pass.
_HARMLESS = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# Understood, but only at these values: anything else changes the arithmetic.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1,),
    "attention_dropout": (0, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}


def read_config(path: str | Path) -> ModelConfig:
    """Return the shape of the model in a checkpoint directory.

    Raises:
        DnoError: config.json is missing or no JSON, an unknown model_type, a key that is not understood, or a value
            that is not supported.
    """
    file, tree = read_json(path, "config.json")
    return parse_config(tree, place=str(file))


def read_end_token_ids(path: str | Path) -> tuple[int, ...]:
    """Return the ids that end a text: those of generation_config.json, or else those of config.json.

    Raises:
        DnoError: neither file names any, or a file is no JSON.
    """
    path = Path(path)
    names = ["generation_config.json"] if (path / "generation_config.json").exists() else []
    for name in [*names, "config.json"]:
        file, tree = read_json(path, name)
        ids = tree.get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise DnoError(f"{file}: eos_token_id is {tree['eos_token_id']!r}; expected an id or a list of ids")
        return tuple(ids)
    raise DnoError(f"{path}: no eos_token_id in generation_config.json or config.json; add one, generation must end")


def read_json(path: str | Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Return (file, content) of a JSON object in a checkpoint directory.

    Raises:
        DnoError: the directory or file is missing, or holds no JSON object.
    """
    path = Path(path)
    if not path.is_dir():
        raise DnoError(f"{path}: no such directory; expected a Hugging Face checkpoint with config.json")
    file = path / name
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DnoError(f"{file}: no such file; expected a Hugging Face checkpoint in {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DnoError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DnoError(f"{file}: expected a JSON object, got {type(tree).__name__}")
    return file, tree


def parse_config(tree: dict[str, Any], *, place: str) -> ModelConfig:
    """Return the ModelConfig that a config.json describes; `place` names it in messages."""
    model_type = tree.get("model_type")
    if model_type not in ARCHITECTURES:
        raise DnoError(f"{place}: model_type is {model_type!r}; supported are {', '.join(ARCHITECTURES)}")
    expected = [ARCHITECTURES[model_type]]
    if tree.get("architectures", expected) not in (expected, None):
        raise DnoError(f"{place}: architectures is {tree['architectures']!r}; {model_type} supports {expected}")
    values = {**_COMMON_DEFAULTS, **_DEFAULTS[model_type], **tree}
    known = {*_REQUIRED, *_COMMON_DEFAULTS, *_DEFAULTS[model_type], *_HARMLESS, *_ONLY, *_ROPE}
    for key in sorted(tree.keys() - known):
        raise DnoError(
            f"{place}: key {key!r} (value {tree[key]!r}) is not understood, and may change what the model computes; "
            "remove it if it is known to do nothing"
        )
    for key, allowed in _ONLY.items():
        if key in values and not any(values[key] == value for value in allowed):
            absent = "" if key in tree else " (the default of an absent key)"
            raise DnoError(f"{place}: {key} is {values[key]!r}{absent}; supported is only {allowed[0]!r}")
    if model_type == "mistral" and (values["attention_bias"] or values["mlp_bias"]):
        raise DnoError(f"{place}: attention_bias and mlp_bias mean nothing in a mistral model; remove them")
    for key in _REQUIRED:
        if key not in tree:
            raise DnoError(f"{place}: key {key!r} is missing")
    heads = _number(values, "num_attention_heads", int, place=place)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None:
        width = _number(values, "hidden_size", int, place=place)
        if width % heads:
            raise DnoError(f"{place}: num_attention_heads {heads} does not divide hidden_size {width}; give head_dim")
        values["head_dim"] = width // heads
    names = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
    numbers: dict[str, Any] = {name: _number(values, name, int, place=place) for name in names}
    numbers["rms_norm_eps"] = float(_number(values, "rms_norm_eps", float, place=place))
    numbers["rope_theta"] = _rope_theta(tree, place=place)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        numbers[name] = _number(values, name, bool, place=place)
    try:
        return ModelConfig(**numbers)
    except ValueError as error:
        raise DnoError(f"{place}: {error}") from None


def _number(tree: dict[str, Any], key: str, kind: type, *, place: str) -> Any:
    value = tree[key]
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        raise DnoError(f"{place}: {key} is {value!r}; expected {kind.__name__}")
    return value


def _rope_theta(tree: dict[str, Any], *, place: str) -> float:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters with both inside."""
    theta: dict[str, Any] = {"rope_theta": tree["rope_theta"]} if "rope_theta" in tree else {}
    for key in ("rope_scaling", "rope_parameters"):
        inner = tree.get(key)
        if inner is None:
            continue
        if not isinstance(inner, dict):
            raise DnoError(f"{place}: {key} is {inner!r}; expected an object")
        for name, value in inner.items():
            if name in ("rope_type", "type") and value == "default":
                continue
            if name == "rope_theta" and theta.get(name, value) == value:
                theta[name] = value
                continue
            raise DnoError(
                f"{place}: {key} has {name} = {value!r}; supported is only rope_type 'default' with one rope_theta"
            )
    return float(_number(theta, "rope_theta", float, place=place)) if theta else 10_000.0
