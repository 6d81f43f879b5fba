"""What every section of the configuration is made of."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

# A field marked so may differ when a run directory is resumed: it changes cost, not results.
MAY_CHANGE: dict[str, Any] = {"may_change": True}

# Of what is sampled here. Logits are float32: 1e-38 is 0 there, by which no difference of them can be divided.
MIN_TEMPERATURE = 1e-6


def absolute(path: str) -> str:
    if not path:
        raise ValueError("an empty path")
    return path if "://" in path else str(Path(path).expanduser().absolute())


def drawable(temperature: float) -> float:
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise ValueError(
            f"{temperature} is too small to divide logits by; expected 0 (greedy), or at least {MIN_TEMPERATURE}"
        )
    return temperature


def iso_date(day: Any) -> str:
    return str(datetime.date.fromisoformat(str(day)))  # YAML has made a date of it, unless it is in quotes


PathStr = Annotated[str, AfterValidator(absolute)]
DateStr = Annotated[str, BeforeValidator(iso_date)]
Temperature = Annotated[float, Field(ge=0.0), AfterValidator(drawable)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, value: Any, info: Any) -> Any:
        """Refuse what pydantic takes for 0 and 1: `iterations: yes` is a slip."""
        if _is_number(cls.model_fields[info.field_name].annotation):
            _refuse_booleans(value)
        return value


def _is_number(annotation: Any) -> bool:
    """Whether a field takes numbers, maybe in tuples."""
    return annotation in (int, float) or any(_is_number(part) for part in get_args(annotation))


def _refuse_booleans(value: Any) -> None:
    if isinstance(value, bool):
        raise ValueError(f"{value} is a boolean; expected a number (yes and on are true to YAML, no and off false)")
    if isinstance(value, (list, tuple)):
        for item in value:
            _refuse_booleans(item)
