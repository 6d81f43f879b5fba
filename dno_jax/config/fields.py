"""Every field of a configuration as a person reads it: name, default, kind, choices, description."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dno_jax.config.base import Section


@dataclass(frozen=True)
class FieldHelp:
    """One field.

    Attributes:
        name: dotted, as in `annotation.openai.model`; a list of sections is marked `[]`.
        default: as YAML has it; None where the field has to be given.
        kind: "decides", "contents", "rounds" or "costs" (docs/run_directory.md); empty for a section.
        stages: what it decides.
        choices: the words it takes, where it takes a few only.
        description: one line.
    """

    name: str
    default: str | None
    kind: str
    stages: tuple[str, ...]
    choices: tuple[str, ...]
    description: str


def described(kind: type[Section], *, prefix: str = "", stages: tuple[str, ...] = ()) -> Iterator[FieldHelp]:
    """Yield every field of a section, those of the sections in it after themselves.

    Args:
        stages: named by a field above, in place of the fields' own.
    """
    for name, field in kind.model_fields.items():
        declared: Any = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        decided = stages or tuple(declared.get("stages", ()))
        inner = _section_in(field.annotation)
        summary = (inner.__doc__ or "").strip().split("\n\n")[0] if inner else ""
        yield FieldHelp(
            name=prefix + name,
            default=_default(field, inner),
            kind="" if inner else declared.get("kind", ""),
            stages=decided,
            choices=tuple(str(choice) for choice in _choices(field.annotation)),
            description=" ".join((field.description or summary).split()),
        )
        if inner is not None:
            below = {tuple: f"{name}[].", dict: f"{name}.NAME."}.get(get_origin(field.annotation), f"{name}.")
            yield from described(inner, prefix=prefix + below, stages=decided)


def _default(field: FieldInfo, inner: type[Section] | None) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if inner is not None and isinstance(value, inner):
        return ""  # its fields say
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return plain if isinstance(plain, str) and plain else json.dumps(plain)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds: itself, or none, or in a tuple or a dictionary."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for part in get_args(annotation) if (found := _choices(part))), ())
