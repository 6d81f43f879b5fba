"""The JSON files of an export: the source's, in words that transformers 4 and programs built on it read alike.

transformers 4, llama.cpp's converter and most servers look for rope_theta and rope_scaling, for the chat template
in tokenizer_config.json, and for a tokenizer class that they know. Where those are missing they take a default in
silence: a theta of 10,000, another template, another pre-tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.hf.classifiers import as_reward_model
from dno_jax.model.hf.composites import COMPOSITES
from dno_jax.model.hf.config_json import parse_config, read_json
from dno_jax.model.hf.families import FAMILIES
from dno_jax.model.hf.rope_json import beside_rope_parameters

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILE, PROCESSOR_TEMPLATE = "chat_template.jinja", "chat_template.json"
# It takes tokenizer.json as it is, in every version. Classes of a model's own replace parts of it in some.
_PLAIN_CLASS = "PreTrainedTokenizerFast"
# Code of a checkpoint's own, which an export does not bring; transformers has these models.
_CODE = ("auto_map", "custom_pipelines")


def config_text(config: ModelConfig, *, source: Path, dtype: Any, pad_token_id: int | None = None) -> str:
    """Return config.json of an export.

    Args:
        pad_token_id: of a reward model; None: the source's.

    Raises:
        DnoError: the source's describes another model than `config`.
    """
    file, tree = read_json(source, "config.json")
    before = tree
    if config.head == "reward":
        tree = as_reward_model(tree, pad_token_id=pad_token_id)
    theirs = parse_config(tree, place=str(file), head=config.head, rope_length=config.rope_length)
    for field in fields(ModelConfig):
        mine, other = getattr(config, field.name), getattr(theirs, field.name)
        if mine != other:
            raise DnoError(f"{file}: {field.name} is {other!r}, but the parameters have {mine!r}; wrong source?")
    changed = {key: value for key, value in tree.items() if key not in _CODE}
    inner = changed.get("text_config") if changed.get("model_type") in COMPOSITES else None
    text = dict(inner) if isinstance(inner, dict) else changed
    text |= beside_rope_parameters(text, FAMILIES[config.family])
    for key, other in FAMILIES[config.family].same.items():
        if other == "num_experts" and text.get(key) is not None:
            text.setdefault(other, text[key])
    if (kinds := FAMILIES[config.family].layer_kinds) and "layer_types" in text:
        text["layer_types"] = [kinds[0]] * config.num_hidden_layers  # transformers 5 reads its predecessor's name too
    if text is not changed:
        changed["text_config"] = text
    if dtype is not None:
        # transformers loads in the dtype that this entry names, whatever the file holds.
        for part in (changed, text):
            part |= {key: np.dtype(dtype).name for key in ("dtype", "torch_dtype") if key in part}
    return file.read_text(encoding="utf-8") if changed == before else _dump(changed)


def write_tokenizer(source: Path, target: Path, *, chat_template: str | None) -> None:
    """Give the copied tokenizer files of an export one class and one chat template, wherever it is looked for.

    Args:
        source: the folder they were copied from.
        target: the folder they lie in.
        chat_template: the template that was trained with; None: that of `source`, if it has one.
    """
    place = target / TOKENIZER_CONFIG
    tree = read_json(source, TOKENIZER_CONFIG)[1] if place.exists() else {}
    changed = {key: value for key, value in tree.items() if key not in _CODE}
    if isinstance(extra := changed.get("extra_special_tokens"), list):  # transformers 4 has another name for these
        del changed["extra_special_tokens"]
        changed.setdefault("additional_special_tokens", extra)
    # A class of a model's own may know tokens that the file does not name; those of transformers 5 know none.
    named = changed.get("eos_token") or str(changed.get("tokenizer_class")).endswith("Backend")
    if named and (target / "tokenizer.json").exists() and changed.get("tokenizer_class") != _PLAIN_CLASS:
        changed["tokenizer_class"] = _PLAIN_CLASS
        changed.setdefault("model_input_names", ["input_ids", "attention_mask"])
    template = chat_template if chat_template is not None else _own_template(source, tree)
    if template is not None:
        changed["chat_template"] = _with_default(tree.get("chat_template"), template)
        (target / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        if (target / PROCESSOR_TEMPLATE).exists():
            (target / PROCESSOR_TEMPLATE).write_text(_dump({"chat_template": template}), encoding="utf-8")
    if changed != tree:
        place.write_text(_dump(changed), encoding="utf-8")


def _own_template(source: Path, tree: dict[str, Any]) -> str | None:
    """The template that transformers takes from a folder: the file's before that of tokenizer_config.json."""
    if (source / TEMPLATE_FILE).is_file():
        return (source / TEMPLATE_FILE).read_text(encoding="utf-8")
    named = tree.get("chat_template")
    if isinstance(named, list):
        named = next((one.get("template") for one in named if _is_default(one)), None)
    return named if isinstance(named, str) else None


def _with_default(named: Any, template: str) -> Any:
    """Put a template in the place of the default one, where several stand under names of their own."""
    if not isinstance(named, list):
        return template
    return [{"name": "default", "template": template}, *(one for one in named if not _is_default(one))]


def _is_default(one: Any) -> bool:
    return isinstance(one, dict) and one.get("name") == "default"


def _dump(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
