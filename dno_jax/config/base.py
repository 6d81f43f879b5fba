"""Building blocks of every section of the configuration."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from dno_jax.display import is_variable_name

Stage = Literal["teach", "sample", "annotate", "pair", "score", "train", "evaluate", "sft", "reward"]
Kind = Literal["decides", "contents", "rounds", "costs"]


def decides(*stages: Stage) -> dict[str, Any]:
    """Mark a field whose value decides what these stages write: it is part of their digests.

    On a field that holds a section, the stages stand in place of those that the section's own fields name.
    """
    return {"kind": "decides", "stages": stages}


def contents(*stages: Stage) -> dict[str, Any]:
    """Mark a path. Where a file lies decides nothing; stages name its contents among their inputs instead."""
    return {"kind": "contents", "stages": stages}


# Beside each field: what follows when it differs from the value a run directory was made with.
ROUNDS: dict[str, Any] = {"kind": "rounds"}  # may change; numbers differ in rounding
COSTS: dict[str, Any] = {"kind": "costs"}  # may change, and nothing differs
SAMPLED = decides("sample", "evaluate")
JUDGED = decides("annotate", "evaluate")
PAIRED = decides("pair")
TRAINED = decides("train", "sft", "reward")

# Of what is sampled here. Logits are float32: 1e-38 is 0 there, by which no difference of them can be divided.
MIN_TEMPERATURE = 1e-6


# An id of the Hub, as opposed to a file: owner/name@revision:split, or with a subset owner/name:subset:split.
_DATASET_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?((:(?P<subset>[\w.-]+))?:(?P<split>[\w.-]+))?"
)
_FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".bz2", ".xz", ".zip")
_FILES += (".arrow", ".yaml", ".yml", ".jinja", ".safetensors", ".sqlite")


def hub_parts(text: str) -> dict[str, str | None] | None:
    """Return name, revision, subset and split of an id of the Hub; None where the text is a path."""
    found = _DATASET_ID.fullmatch(text)
    if found is None or text.startswith(".") or text.endswith(_FILES) or Path(text).exists():
        return None
    return found.groupdict()


def expanded(path: str) -> str:
    """Put in the home directory for ~, and the environment's variables for $NAME and ${NAME}.

    Raises:
        ValueError: a variable is not set.
    """
    if not path:
        raise ValueError("an empty path")
    path = os.path.expandvars(path)
    if missing := re.search(r"\$(\w+|\{\w+\})", path):
        raise ValueError(f"{path!r} names the environment variable {missing[0]}, which is not set")
    return path if "://" in path else os.path.expanduser(path)


def absolute(path: str) -> str:
    path = expanded(path)
    return path if "://" in path else str(Path(path).absolute())


def data_place(path: str) -> str:
    return path if hub_parts(path) else absolute(path)


_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w./-]+))?", re.ASCII)


def hub_id(path: str, *, folder_first: bool = True) -> tuple[str, str | None] | None:
    """Return (owner/name, revision or None) of an id on the Hugging Face Hub; None: a path.

    Args:
        folder_first: whether what is here under that name is a path.
    """
    found = _HUB_ID.fullmatch(path)
    return None if found is None or (folder_first and Path(path).exists()) else (found[1], found[2])


def model_place(path: str) -> str:
    return path if hub_id(path) else absolute(path)


def drawable(temperature: float) -> float:
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise ValueError(
            f"{temperature} is too small to divide logits by; expected 0 (greedy), or at least {MIN_TEMPERATURE}"
        )
    return temperature


def variable_name(name: str) -> str:
    """
    Raises:
        ValueError: it is no name, and is not shown: it may be the key.
    """
    if not is_variable_name(name):
        raise ValueError(
            "no name of an environment variable, and maybe a key (so it is not shown); expected a name such as "
            "OPENAI_API_KEY. Put the key into that variable; if the key has been in a file or a command, replace it"
        )
    return name


def iso_date(day: Any) -> str:
    return str(datetime.date.fromisoformat(str(day)))  # YAML has made a date of it, unless it is in quotes


PathStr = Annotated[str, AfterValidator(absolute)]
ModelPath = Annotated[str, AfterValidator(model_place)]
DataPath = Annotated[str, AfterValidator(data_place)]
DataPaths = DataPath | Annotated[tuple[DataPath, ...], Field(min_length=1)]
DateStr = Annotated[str, BeforeValidator(iso_date)]
VariableName = Annotated[str, AfterValidator(variable_name)]
Temperature = Annotated[float, Field(ge=0.0), AfterValidator(drawable)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def unread(self) -> set[str]:
        """Names of fields that nothing reads while the others are as they are."""
        return set()

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, value: Any, info: Any) -> Any:
        """Refuse booleans, which pydantic takes for 0 and 1: `iterations: yes` is a slip."""
        if _is_number(cls.model_fields[info.field_name].annotation):
            _refuse_booleans(value)
        return value


def _is_number(annotation: Any) -> bool:
    """Whether a field takes numbers, maybe in tuples."""
    return annotation in (int, float) or any(_is_number(part) for part in get_args(annotation))


def _refuse_booleans(value: Any) -> None:
    if isinstance(value, bool):
        raise ValueError(f"{value} is a boolean; expected a number (yes and on are true in YAML, no and off false)")
    if isinstance(value, (list, tuple)):
        for item in value:
            _refuse_booleans(item)
