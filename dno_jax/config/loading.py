"""Load a validated configuration from a YAML file and overrides."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dno_jax.config.base import Section, absolute, data_place, expanded, hub_parts, model_place
from dno_jax.config.yaml_reader import drops_a_comment, read_yaml
from dno_jax.console import say
from dno_jax.display import hide_keys
from dno_jax.errors import DnoError
from dno_jax.records import explain

ConfigT = TypeVar("ConfigT", bound=Section)

_MAX_BYTES = 1 << 18  # of a file of YAML
_COMMANDS = {"data": "dno sft", "prompts": "dno run", "pairs": "dno reward"}  # the section that only its recipes have


def load_config(
    kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = (), *, variants: Sequence[str | Path] = ()
) -> ConfigT:
    """Read a YAML file, lay variants and then `a.b=value` overrides over it (values are YAML), and validate.

    A file with `base: other.yaml` says only what it changes in that one. In `base: [other.yaml, variant.yaml]` the
    second is laid over the first as a variant. Relative paths in a file are relative to its own folder, those in
    overrides to the working directory.

    Args:
        variants: files of which only that is taken which they change in the recipe that they start from, `run_dir`
            aside; all of one that starts from none.

    Raises:
        DnoError: naming the file, the field's path, what was expected and, for an unknown field, the known ones.
    """
    path = Path(path)
    anchored: list[str] = []
    layers = _layers(kind, path, above=(), anchored=anchored)
    if anchored and path.parent.absolute() != Path.cwd():
        say(f"{path}: its relative paths ({', '.join(anchored)}) start at its folder, {path.parent.absolute()}")
    tree = functools.reduce(_merge, [*layers, *(_variant(kind, Path(variant)) for variant in variants)])
    for override in overrides:
        lay_over(tree, override, kind=kind)
    return parse_config(kind, tree, place=str(path))


def kind_of(path: str | Path, kinds: Sequence[type[ConfigT]]) -> type[ConfigT]:
    """Say which of several kinds of recipes a file is, by the section that it alone has; the first where none says so.

    Raises:
        DnoError: as `load_config`, where it cannot be read.
    """
    tree = functools.reduce(_merge, _layers(Section, Path(path), above=(), anchored=[]))
    own = [name for name in _COMMANDS if name in tree]
    return next((kind for kind in kinds if any(name in kind.model_fields for name in own)), kinds[0])


def _layers(kind: type[Section], path: Path, *, above: tuple[Path, ...], anchored: list[str]) -> list[dict[str, Any]]:
    """Read a file and what it starts from, the recipe at the bottom first; `above` are the files that led here."""
    named = f" (the base of {above[-1]})" if above else ""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise DnoError(
                f"{path}: more than {_MAX_BYTES:,} bytes{named}; expected a recipe, which has some 100 lines"
            )
        tree = _without_keys(text.decode("utf-8-sig"), place=str(path))
    except FileNotFoundError:
        raise DnoError(f"{path}: no such configuration file{named}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DnoError(f"{path}: cannot be read{named}: {error}; expected a YAML file in UTF-8") from None
    if not isinstance(tree, dict):
        raise DnoError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    base = tree.pop("base", None)
    _anchor(kind, tree, path, prefix="", anchored=anchored)
    if base is None:
        return [tree]
    bases = base if isinstance(base, list) else [base]
    if not bases or not all(isinstance(name, str) for name in bases):
        raise DnoError(f"{path}: base: expected the path of a YAML file, or a list of them, got {base!r}")
    if path.resolve() in above:
        raise DnoError(f"{path}: base: {base} leads back to this file")
    above = (*above, path.resolve())
    first, *variants = (path.parent / name for name in bases)
    below = _layers(kind, first, above=above, anchored=anchored)
    return [*below, *(_variant(kind, variant, above=above) for variant in variants), tree]


def _variant(kind: type[Section], path: Path, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file changes in the recipe that it starts from; all that it says, if it starts from none."""
    layers = _layers(kind, path, above=above, anchored=[])
    changed = functools.reduce(_merge, layers[1:] or layers)
    return {name: value for name, value in changed.items() if name != "run_dir"}


def _without_keys(text: str, *, place: str) -> Any:
    """Read YAML; what its error quotes may hold a key in the place of its variable's name."""
    try:
        return read_yaml(text, place=place)
    except DnoError as error:
        raise DnoError(hide_keys(str(error))) from None


def _merge(below: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in over.items():
        under = merged.get(name)
        merged[name] = _merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged


def parse_config(kind: type[ConfigT], tree: dict[str, Any], *, place: str) -> ConfigT:
    for section, command in _COMMANDS.items():
        if section in tree and section not in kind.model_fields:
            mine = [name for name in _COMMANDS if name in kind.model_fields and name not in tree]
            if mine:
                raise DnoError(
                    f"{place}: a recipe of `{command}` (it has the section {section}); `{_COMMANDS[mine[0]]}` reads "
                    f"one with {mine[0]} in its place (see configs/demo.yaml and configs/demo/sft.yaml)"
                )
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        unknown = [item for item in error.errors() if item["type"] == "extra_forbidden"]
        hint = "".join(f"\n  {_known_fields(kind, item['loc'])}" for item in unknown)
        raise DnoError(f"{place}: {explain(error)}{hint}") from None


def lay_over(tree: dict[str, Any], override: str, *, kind: type[Section] | None = None) -> None:
    """Set `a.b=value` in a tree. A text is taken as it stands; other values are YAML.

    Args:
        kind: what the tree will be, which says where texts are expected.

    Raises:
        DnoError: it is no such thing.
    """
    name, separator, text = override.partition("=")
    shown = f"{name}=..." if "key" in name and separator else hide_keys(override)  # what is set of a key may be one
    if not separator or not name:
        raise DnoError(f"override {shown!r}: expected a.b=value")
    *parents, leaf = name.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise DnoError(f"override {shown!r}: {parent} is a value, not a section")
        tree, kind = below, _section_of(kind, parent)
    field = None if kind is None else kind.model_fields.get(leaf)
    try:
        tree[leaf] = _value(text, field, place=f"override {shown!r}")
    except DnoError:
        if shown != override:
            raise DnoError(f"override {shown!r}: the value is not valid YAML") from None
        raise


def _value(text: str, field: FieldInfo | None, *, place: str) -> Any:
    """Read an override's value: as YAML, or, where a text is expected and YAML makes something else of it, as it is."""
    parts = set() if field is None else set(_parts(field.annotation))
    takes_text = str in parts or any(isinstance(part, str) for part in parts)
    try:
        value = read_yaml(text, place=f"{place}: the value")
    except DnoError:
        if str in parts:
            return text
        raise
    if drops_a_comment(text):
        return text
    listed = isinstance(value, list) and tuple in parts
    return text if takes_text and text and not (value is None or listed or isinstance(value, str)) else value


def _anchor(kind: type[Section], tree: dict[str, Any], path: Path, *, prefix: str, anchored: list[str]) -> None:
    """Make the relative paths of a file's own values relative to its folder.

    Raises:
        DnoError: what a path names lies in the working directory, and not beside the file.
    """
    for name, value in tree.items():
        if (field := kind.model_fields.get(name)) is None:
            continue
        if isinstance(value, dict) and (section := _section_of(kind, name)) is not None:
            _anchor(section, value, path, prefix=f"{prefix}{name}.", anchored=anchored)
        elif isinstance(value, list) and _is_path(field, ""):
            tree[name] = [_beside(path, item, f"{prefix}{name}", field, anchored) for item in value]
        elif isinstance(value, str) and _is_path(field, value):
            tree[name] = _beside(path, value, f"{prefix}{name}", field, anchored)


def _beside(path: Path, value: Any, name: str, field: FieldInfo, anchored: list[str]) -> Any:
    try:
        place = Path(expanded(value))
    except (ValueError, TypeError):  # validation names the field
        return value
    if not isinstance(value, str) or "://" in value or place.is_absolute():
        return value
    own = Path(os.path.normpath(path.parent.absolute() / place))
    if not own.exists():
        here = Path.cwd() / place
        if here.exists() and here.resolve() != own.resolve():
            raise DnoError(
                f"{path}: {name}: {value} is relative to this file's folder and names {own}, which is not there; "
                f"{here} is: write that, or give it on the command line ({name}={value}), where paths are relative to "
                "the working directory"
            )
        if _kind(field) == "contents" and hub_parts(value):
            return value
    if name not in anchored:
        anchored.append(name)
    return str(own)


def _is_path(field: FieldInfo, value: str) -> bool:
    """Whether a field takes a path, and a value of one that may be a name too is one."""
    validators = {getattr(part, "func", None) for part in _metadata(field)}
    if validators & {absolute, data_place, model_place}:
        return True
    return _kind(field) == "contents" and bool(set(value) & set("/."))


def _kind(field: FieldInfo) -> Any:
    return field.json_schema_extra.get("kind") if isinstance(field.json_schema_extra, dict) else None


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """What is noted beside a field's type, and beside the parts of a union or a tuple."""
    yield from field.metadata
    stack = [field.annotation]
    while stack:
        part = stack.pop()
        yield from getattr(part, "__metadata__", ())
        stack += get_args(part) if get_origin(part) is not Literal else ()


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that a field takes: str, tuple, the names of a Literal."""
    origin = get_origin(annotation)
    if origin is Literal:
        yield from get_args(annotation)
    elif origin is tuple:
        yield tuple
    elif hasattr(annotation, "__metadata__"):
        yield from _parts(annotation.__origin__)
    elif origin is not None and origin not in (list, dict):
        for part in get_args(annotation):
            yield from _parts(part)
    elif isinstance(annotation, type):
        yield annotation


def _section_of(kind: type[Section] | None, name: str) -> type[Section] | None:
    """The section in a field; None where it holds none."""
    field = None if kind is None else kind.model_fields.get(name)
    if field is None:
        return None
    # An optional section is a union with None.
    found = [
        a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type) and issubclass(a, Section)
    ]
    return found[0] if found else None


def _known_fields(kind: type[Section], loc: Iterable[Any]) -> str:
    *parents, leaf = loc
    for parent in parents:
        if (section := _section_of(kind, str(parent))) is None:
            break
        kind = section
    return f"{leaf!r} is unknown; known here: {', '.join(kind.model_fields)}"


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
