"""Load a validated configuration from a YAML file and overrides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from dno_jax.config.base import Section
from dno_jax.display import hide_keys
from dno_jax.errors import DnoError
from dno_jax.records import explain

ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, lay `a.b=value` overrides over it (values are YAML), and validate.

    A file with `base: other.yaml` (relative to itself) says only what it changes in that one.

    Raises:
        DnoError: naming the file, the field's path, what was expected and, for an unknown field, the known ones.
    """
    tree = _read(Path(path), above=())
    for override in overrides:
        lay_over(tree, override)
    return parse_config(kind, tree, place=str(path))


def _read(path: Path, *, above: tuple[Path, ...]) -> dict[str, Any]:
    """Read one file, laid over its bases; `above` are the files that led here."""
    named = f" (the base of {above[-1]})" if above else ""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DnoError(f"{path}: no such configuration file{named}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DnoError(f"{path}: cannot be read{named}: {error}; expected a YAML file in UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # what looks like a date is made one: 2024-13-01
        raise DnoError(f"{path}: not valid YAML: {hide_keys(str(error))}") from None
    if not isinstance(tree, dict):
        raise DnoError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise DnoError(f"{path}: base: expected the path of a YAML file, got {base!r}")
    if path.resolve() in above:
        raise DnoError(f"{path}: base: {base} leads back to this file")
    return _merge(_read(path.parent / base, above=(*above, path.resolve())), tree)


def _merge(below: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in over.items():
        under = merged.get(name)
        merged[name] = _merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged


def parse_config(kind: type[ConfigT], tree: dict[str, Any], *, place: str) -> ConfigT:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        unknown = [item for item in error.errors() if item["type"] == "extra_forbidden"]
        hint = "".join(f"\n  {_known_fields(kind, item['loc'])}" for item in unknown)
        raise DnoError(f"{place}: {explain(error)}{hint}") from None


def lay_over(tree: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in a tree; the value is YAML.

    Raises:
        DnoError: it is no such thing.
    """
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise DnoError(f"override {hide_keys(override)!r}: expected a.b=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = "" if "key" in name else f": {hide_keys(str(error))}"
        raise DnoError(f"override {_shown(override)!r}: the value is not valid YAML{why}") from None
    *parents, leaf = name.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise DnoError(f"override {_shown(override)!r}: {parent} is a value, not a section")
        tree = below
    tree[leaf] = value


def _shown(override: str) -> str:
    """An override as messages show it: what is set of a key may be one."""
    name, _, _ = override.partition("=")
    return f"{name}=..." if "key" in name else hide_keys(override)


def _known_fields(kind: type[Section], loc: Iterable[Any]) -> str:
    *parents, leaf = loc
    for parent in parents:
        annotation = kind.model_fields[parent].annotation if parent in kind.model_fields else None
        # An optional section is a union with None.
        found = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Section)]
        if not found:
            break
        kind = found[0]
    return f"{leaf!r} is unknown; known here: {', '.join(kind.model_fields)}"


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
