"""Reward models as transformers has them: classifiers with one label, in place of a language model with a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.config import Head, ModelConfig
from dno_jax.model.hf.composites import COMPOSITES, text_part
from dno_jax.model.hf.config_json import parse_config, read_json
from dno_jax.model.hf.families import FAMILIES
from dno_jax.model.hf.settings import LABELS

_LABEL = "LABEL_0"  # as transformers calls the first of labels without names


def head_of(path: str | Path) -> Head:
    """Say what a checkpoint directory has on its hidden states; a language model's head where it does not say."""
    return _head(read_json(path, "config.json")[1])


def reward_shape(path: str | Path, *, rope_length: int | None = None) -> ModelConfig:
    """Return the shape of the reward model that is trained from a checkpoint: from one, or from a language model.

    Raises:
        DnoError: as `read_config`; or transformers has no reward models of its family.
    """
    file, tree = read_json(path, "config.json")
    if tree.get("model_type") in COMPOSITES:
        text_part(tree, head="reward", place=str(file))  # which says why not
    config = parse_config(tree, place=str(file), head=_head(tree), rope_length=rope_length)
    if FAMILIES[config.family].reward is None:
        raise DnoError(f"{file}: {config.family} has no reward models; transformers has no such class")
    return replace(config, head="reward")


def as_reward_model(tree: Mapping[str, Any], *, pad_token_id: int | None) -> dict[str, Any]:
    """Return config.json of a language model, or of a reward model, as that of a reward model.

    Args:
        pad_token_id: by which transformers tells where a text ends; None keeps the one that is there.
    """
    named = {"architectures": [FAMILIES[tree["model_type"]].reward], "id2label": {"0": _LABEL}, "label2id": {_LABEL: 0}}
    padding = {} if pad_token_id is None else {"pad_token_id": pad_token_id}
    return {key: value for key, value in tree.items() if key not in LABELS} | named | padding


def _head(tree: Mapping[str, Any]) -> Head:
    names = tree.get("architectures")
    found = isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)
    return "reward" if found else "logits"
