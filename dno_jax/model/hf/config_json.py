"""config.json and generation_config.json of Hugging Face checkpoints: everything understood, or an error.

A key that is neither understood nor known to be harmless is refused: most wrong imports are a scaling, window or
soft-cap that some converter did not look at.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.attention import NO_WINDOW
from dno_jax.model.config import Head, ModelConfig
from dno_jax.model.hf.composites import COMPOSITES, text_of, text_part
from dno_jax.model.hf.families import FAMILIES
from dno_jax.model.hf.family import Family, Meaning
from dno_jax.model.hf.rope_json import read_ropes
from dno_jax.model.hf.settings import (
    DROPOUTS,
    HARMLESS,
    HARMLESS_PREFIXES,
    LABELS,
    LIMITS,
    MAX_EXPERTS,
    MAX_NUMBER,
    ONLY,
    is_class,
    is_dropout,
    shown,
)
from dno_jax.model.hf.strangers import missing_config, refuse_pointer

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

# Of a tower beside the language model.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Understood in every family, with what transformers assumes where a key is absent and the family says nothing else.
_COMMON = {"head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_TRANSFORMERS_LABELS = 2  # where config.json names none
_MAX_BYTES = 64_000_000  # of a JSON file; an index of 300,000 tensors has half of that
_MAX_SHOWN = 6  # keys that one message names with their values
# Of keys that some families have.
_LEAST = {"max_window_layers": 0, "sliding_window_pattern": 1, "no_rope_layer_interval": 1}
_LEAST |= {"full_attention_interval": 1, "block_multiple_of": 1, "linear_conv_kernel_dim": 2, "conv_L_cache": 2}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_MEANING: tuple[Meaning, ...] = (
    *((name, name, int, None) for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")),
    ("tie_word_embeddings", "tie_word_embeddings", bool, None),
    ("rms_norm_eps", "rms_norm_eps", float, None),
    ("attention_bias", "attention_bias", bool, None),
    ("attention_bias", "output_bias", bool, None),
    ("mlp_bias", "mlp_bias", bool, None),
    ("clip_qkv", "clip_qkv", float, None),
    ("attn_logit_softcapping", "attention_softcap", float, None),
    ("final_logit_softcapping", "logit_softcap", float, None),
    ("query_pre_attn_scalar", "attention_scale", float, lambda scalar: scalar**-0.5),
    ("attention_multiplier", "attention_scale", float, None),
    ("embedding_multiplier", "embed_scale", float, None),
    ("residual_multiplier", "residual_scale", float, None),
    ("logits_scaling", "logit_scale", float, lambda scaling: 1 / scaling),
)


def read_config(path: str | Path, *, head: Head = "logits", rope_length: int | None = None) -> ModelConfig:
    """Return the shape and arithmetic of the model in a checkpoint directory.

    Args:
        head: what the checkpoint must be: a language model, or a reward model (a classifier with one label).
        rope_length: tokens of the run's longest text; see ModelConfig.rope_length, which stays None where no rotation
            depends on it.

    Raises:
        DnoError: config.json is missing or no JSON, an unknown model_type, a key that is not understood, or a value
            that is not supported.
    """
    file, tree = read_json(path, "config.json")
    return parse_config(tree, place=str(file), head=head, rope_length=rope_length)


def read_end_token_ids(path: str | Path) -> tuple[int, ...]:
    """Return the ids that end a text: those of generation_config.json, or else those of config.json.

    Raises:
        DnoError: neither file names any, or a file is no JSON.
    """
    path = Path(path)
    names = ["generation_config.json"] if (path / "generation_config.json").exists() else []
    for name in [*names, "config.json"]:
        file, tree = read_json(path, name)
        ids = tree.get("eos_token_id", text_of(tree).get("eos_token_id"))
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise DnoError(f"{file}: eos_token_id is {shown(ids)}; expected an id or a list of ids")
        return tuple(ids)
    raise DnoError(f"{path}: no eos_token_id in generation_config.json or config.json; add one, generation must end")


def read_pad_token_id(path: str | Path) -> int | None:
    """Return the id by which transformers tells padding from text, of config.json; None where it names none."""
    return read_json(path, "config.json")[1].get("pad_token_id")


def has_tower(path: str | Path) -> bool:
    """Whether a checkpoint holds another model beside the language model."""
    return read_json(path, "config.json")[1].get("model_type") in COMPOSITES


def loads_alone(path: str | Path) -> bool:
    """Whether transformers loads the language model by itself, under the names that it has without a tower."""
    composite = COMPOSITES.get(str(read_json(path, "config.json")[1].get("model_type")))
    return composite is None or composite.loads_alone


def carried_names(path: str | Path) -> re.Pattern[str] | None:
    """Return what names of tensors begin with that are carried along, and read by nobody here; None: there are none.

    A folder of weights without config.json says of none.
    """
    if not (Path(path) / "config.json").exists():
        return None
    tree = read_json(path, "config.json")[1]
    composite, family = COMPOSITES.get(str(tree.get("model_type"))), FAMILIES.get(str(text_of(tree).get("model_type")))
    found = [] if composite is None else [f"(model\\.)?({'|'.join(composite.towers)})\\."]
    found += [re.escape(family.carried)] if family is not None and family.carried is not None else []
    return re.compile("|".join(found)) if found else None


def read_json(path: str | Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Return (file, content) of a JSON object in a checkpoint directory.

    Raises:
        DnoError: the directory or file is missing, or holds no JSON object.
    """
    if (url := re.match(r"(\w+):/", str(path))) is not None:
        raise DnoError(
            f"{url[1]}://...: a checkpoint is read from a folder, or from the Hub by its id, not by a URL; copy it to "
            "a disk that all processes see"
        )
    path = Path(path)
    if not path.is_dir():
        raise DnoError(f"{path}: no such directory; expected a Hugging Face checkpoint with config.json")
    file = path / name
    try:
        if (size := file.stat().st_size) > _MAX_BYTES:
            raise DnoError(f"{file}: {size:,} bytes; expected at most {_MAX_BYTES:,}: this is no such file")
        refuse_pointer(file)
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        said = missing_config(path) if name == "config.json" else f"{file}: no such file"
        raise DnoError(f"{said}; expected a Hugging Face checkpoint in {path}") from None
    except OSError as error:
        raise DnoError(f"{file}: cannot be read ({error.strerror or error})") from None
    except RecursionError:
        raise DnoError(f"{file}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise DnoError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DnoError(f"{file}: expected a JSON object, got {type(tree).__name__}")
    return file, tree


def read_dropout(path: str | Path) -> dict[str, float]:
    """Return the shares above 0 that config.json would have dropped at random in training."""
    tree = text_of(read_json(path, "config.json")[1])
    return {key: tree[key] for key in DROPOUTS if is_dropout(tree.get(key)) and tree.get(key)}


def parse_config(
    tree: dict[str, Any], *, place: str, head: Head = "logits", rope_length: int | None = None
) -> ModelConfig:
    """Return the ModelConfig that a config.json describes; `place` names it in messages."""
    if tree.get("model_type") in COMPOSITES:
        tree, place = text_part(tree, head=head, place=place), f"{place}: text_config"
    model_type = tree.get("model_type")
    if model_type not in FAMILIES:
        raise DnoError(f"{place}: model_type is {model_type!r}; supported are {', '.join([*FAMILIES, *COMPOSITES])}")
    family = FAMILIES[model_type]
    if head == "reward":
        tree = _one_label(tree, family, place=place)
    expected = family.architecture if head == "logits" else family.reward
    if not is_class(tree.get("architectures"), str(expected), place=place):
        kind = "" if head == "logits" else "a reward model of "
        raise DnoError(
            f"{place}: architectures is {tree['architectures']!r}; {kind}{model_type} supports [{expected!r}]"
        )
    values = _understood(tree, family, place=place)
    fields: dict[str, Any] = {"family": model_type, "head": head}
    for key, field, kind, convert in (*_MEANING, *family.meaning):
        if values.get(key) is not None:
            value = _number(values, key, kind, place=place)
            fields[field] = convert(value) if convert else value
    act = "hidden_activation" if "hidden_activation" in family.keys else "hidden_act"
    if values[act] not in _ACTIVATIONS:
        raise DnoError(f"{place}: {act} is {values[act]!r}; supported are {', '.join(_ACTIVATIONS)}")
    fields["hidden_act"] = _ACTIVATIONS[values[act]]
    sliding = _sliding_layers(values, family, place=place)
    if any(sliding):
        window = _number(values, "sliding_window", int, place=place)
        fields["windows"] = tuple(window if slides else NO_WINDOW for slides in sliding)
    try:
        fields |= _mixers(values, family, place=place) | dict(family.derived(values) if family.derived else {})
    except ValueError as error:
        raise DnoError(f"{place}: {error}") from None
    fields |= read_ropes(values, family, sliding=sliding, place=place)
    if any(rope.rope_type in ("dynamic", "longrope") for rope in fields["ropes"]):
        fields["rope_length"] = rope_length
    try:
        return ModelConfig(**{**fields, **family.fixed})
    except ValueError as error:
        raise DnoError(f"{place}: {error}") from None


def _one_label(tree: dict[str, Any], family: Family, *, place: str) -> dict[str, Any]:
    """Return config.json of a classifier without its labels, of which there must be one."""
    if family.reward is None:
        raise DnoError(f"{place}: {tree['model_type']} has no reward models; transformers has no such class")
    counts = [len(tree[key]) for key in ("id2label", "label2id") if isinstance(tree.get(key), dict)]
    counts += [tree["num_labels"]] if "num_labels" in tree else []
    for count in counts or [_TRANSFORMERS_LABELS]:
        if type(count) is not int or count != 1:
            why = "" if counts else " (what transformers assumes where neither num_labels nor id2label is given)"
            raise DnoError(f"{place}: num_labels is {count!r}{why}; a reward model has 1, the reward")
    return {key: value for key, value in tree.items() if key not in LABELS}


def _understood(tree: dict[str, Any], family: Family, *, place: str) -> dict[str, Any]:
    """Return every key that matters, with defaults filled in, once nothing is left that could be misread."""
    tree = tree | {other: tree[key] for key, other in family.instead.items() if tree.get(key) is not None}
    defaults = _COMMON | dict(family.keys)
    if "rms_norm_eps" in family.fixed:
        del defaults["rms_norm_eps"]
    only = {key: allowed for key, allowed in ONLY.items() if key not in defaults} | dict(family.only)
    known = {*_REQUIRED, *defaults, *HARMLESS, *only, *DROPOUTS, *_ROPE}
    known |= {*family.harmless, *family.same, *family.instead}
    unknown = [key for key in sorted(tree.keys() - known) if not key.startswith(HARMLESS_PREFIXES)]
    wrong = [f"key {key!r} (value {shown(tree[key])}) is not understood" for key in unknown]
    wrong += [
        f"{key} is {shown(tree[key])}; supported is only {allowed[0]!r}"
        for key, allowed in only.items()
        if key in tree and key not in family.harmless and not _is_one_of(tree[key], allowed)
    ]
    wrong += [
        f"{key} is {shown(tree[key])}; expected a share, at least 0 and below 1"
        for key in DROPOUTS
        if key in tree and not is_dropout(tree[key])
    ]
    wrong += [f"key {key!r} is missing" for key in _REQUIRED if key not in tree]
    if wrong:
        more = [f"and {len(wrong) - _MAX_SHOWN} more"] if len(wrong) > _MAX_SHOWN else []
        advice = ["what is not understood may change what the model computes; remove it if it is known to do nothing"]
        raise DnoError(f"{place}: " + "\n  ".join([*wrong[:_MAX_SHOWN], *more, *(advice if unknown else [])]))
    values = {**defaults, **tree}
    for key, most in LIMITS.items():
        if type(values.get(key)) is int and values[key] > most:
            raise DnoError(f"{place}: {key} is {shown(values[key])}; expected at most {most:,}, which no model exceeds")
    layers, experts = values["num_hidden_layers"], values.get("num_experts") or values.get("num_local_experts") or 1
    if type(layers) is type(experts) is int and layers * experts > MAX_EXPERTS:
        raise DnoError(f"{place}: {layers} layers of {experts} experts; expected at most {MAX_EXPERTS:,} in all")
    for key, least in _LEAST.items():
        if key in defaults and _number(values, key, int, place=place) < least:
            raise DnoError(f"{place}: {key} is {values[key]!r}; expected at least {least}")
    if "use_sliding_window" in defaults:
        _number(values, "use_sliding_window", bool, place=place)
    for key, other in family.same.items():
        if key in tree and values[other] not in (None, tree[key]):
            raise DnoError(f"{place}: {key} is {tree[key]!r}, but {other} is {values[other]!r}; make them equal")
    heads = _number(values, "num_attention_heads", int, place=place)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None:
        width = _number(values, "hidden_size", int, place=place)
        if heads < 1 or width % heads:
            raise DnoError(f"{place}: num_attention_heads {heads} does not divide hidden_size {width}; give head_dim")
        values["head_dim"] = width // heads
    if values.get("use_sliding_window") is False:
        values["sliding_window"] = None
    if "no_rope_layers" in values:
        values["no_rope_layers"] = _rope_layers(values, place=place)
    return values


def _rope_layers(values: dict[str, Any], *, place: str) -> list[bool]:
    """Whether each layer rotates. transformers' name says the opposite: a 1 in no_rope_layers is a layer that does."""
    count, given = _number(values, "num_hidden_layers", int, place=place), values["no_rope_layers"]
    if given is None:
        interval = _number(values, "no_rope_layer_interval", int, place=place)
        return [(layer + 1) % interval != 0 for layer in range(count)]
    if not isinstance(given, list) or len(given) < count or not all(value in (0, 1) for value in given):
        raise DnoError(f"{place}: no_rope_layers is {shown(given)}; expected a 0 or 1 for each of {count} layers")
    return [bool(value) for value in given[:count]]


def _sliding_layers(values: dict[str, Any], family: Family, *, place: str) -> list[bool]:
    """Whether each layer's queries see a window of keys only."""
    count, kinds = values["num_hidden_layers"], None if family.mixers else values.get("layer_types")
    if family.layer_kinds and (
        not isinstance(kinds, list) or len(kinds) != count or not all(kind in family.layer_kinds for kind in kinds)
    ):
        raise DnoError(
            f"{place}: layer_types is {shown(kinds)}; supported is {family.layer_kinds[0]} for each of {count} layers"
        )
    if family.sliding is None:
        return [False] * count
    if kinds is None:
        sliding = [family.sliding(values, layer) for layer in range(count)]
    else:
        allowed = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != count or not all(kind in allowed for kind in kinds):
            raise DnoError(
                f"{place}: layer_types is {shown(kinds)}; expected {' or '.join(allowed)} for each of {count} layers"
            )
        sliding = [kind == "sliding_attention" for kind in kinds]
    if any(sliding) and values["sliding_window"] is None:
        raise DnoError(f"{place}: layers slide but there is no sliding_window (or use_sliding_window is false)")
    return sliding


def _mixers(values: dict[str, Any], family: Family, *, place: str) -> dict[str, Any]:
    """What mixes tokens in each layer, where that is not attention everywhere."""
    if family.kinds is None:
        return {}
    count, given = values["num_hidden_layers"], values["layer_types"]
    kinds = family.kinds(values) if given is None else given
    if not isinstance(kinds, list) or len(kinds) != count or not all(kind in tuple(family.mixers) for kind in kinds):
        raise DnoError(
            f"{place}: layer_types is {shown(kinds)}; expected {' or '.join(family.mixers)} for each of {count} layers"
        )
    mixers = tuple(family.mixers[kind] for kind in kinds)
    return {} if set(mixers) == {"attention"} else {"mixers": mixers}


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) in (type(v), float) and value == v for v in allowed)


def _number(tree: dict[str, Any], key: str, kind: type, *, place: str) -> Any:
    value = tree[key]
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        raise DnoError(f"{place}: {key} is {shown(value)}; expected {kind.__name__}")
    if kind is float and not 0 < value < MAX_NUMBER:
        raise DnoError(f"{place}: {key} is {shown(value)}; expected a positive number")
    return kind(value)
