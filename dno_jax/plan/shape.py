"""The model that is planned for: its shape and its end ids, of a folder or of a bundled description."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dno_jax.config import AnyConfig, RewardConfig
from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.hf import folder, read_end_token_ids
from dno_jax.model.hf.config_json import parse_config
from dno_jax.runtime.fit import longest_text, read_shape

_SHAPES = Path(__file__).with_name("shapes.yaml")


@dataclass(frozen=True)
class Shape:
    """
    Attributes:
        name: of the model, to a person.
        end_ids: that end a response; part of the programs that decode.
    """

    name: str
    config: ModelConfig
    end_ids: tuple[int, ...]


def shapes() -> dict[str, dict[str, Any]]:
    """The bundled models: what their config.json says, by name."""
    return yaml.safe_load(_SHAPES.read_text())


def shape_of(config: AnyConfig, name: str | None = None) -> Shape:
    """Return the shape of a bundled model, or that of the checkpoint at model.path: its config.json alone is read.

    Raises:
        DnoError: no such model, or no config.json there.
    """
    if name is not None:
        known = shapes()
        if name not in known:
            raise DnoError(f"--model is {name!r}; known: {', '.join(known)}; or leave it out and give model.path")
        tree = known[name]
        ends = tree["eos_token_id"]
        found = parse_config(tree, place=f"{_SHAPES.name}: {name}", rope_length=longest_text(config))
        if isinstance(config, RewardConfig):
            found = replace(found, head="reward")
        return Shape(name, found, tuple(ends) if isinstance(ends, list) else (ends,))
    fresh = getattr(config.model, "init_config", None)
    source, field = (fresh, "init_config") if fresh else (config.model.path, "path")
    place = folder(source)
    if not (place / "config.json").exists():
        raise DnoError(
            f"model.{field} {source}: no config.json there, all that a plan needs of a model; give the folder "
            f"or id of one (model.{field}=PLACE), or --model with one of {', '.join(shapes())}"
        )
    return Shape(str(source), read_shape(config), read_end_token_ids(place))
