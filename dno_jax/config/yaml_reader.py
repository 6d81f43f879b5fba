"""YAML as people mean it, and of bounded size."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from dno_jax.errors import DnoError

_MAX_NODES = 20_000  # with what aliases stand for
_DEEPEST = 100  # brackets in brackets


def drops_a_comment(text: str) -> bool:
    """Whether YAML would take the end of a text for a comment, and leave it out."""
    end = max((token.end_mark.index for token in yaml.scan(text) if not isinstance(token, _MARKS)), default=0)
    return bool(text[end:].strip())


_MARKS = (yaml.StreamStartToken, yaml.StreamEndToken, yaml.BlockEndToken)


class _Loader(yaml.SafeLoader):
    """YAML without what nobody means: 010 is no octal number, and 1:30 none to the base of 60: both are texts."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_t}int", f"{_t}float")]
    for _t in ("tag:yaml.org,2002:",)
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?|\.inf|\.Inf|\.INF)$|\.nan$"
    ),
    list("-+0123456789."),
)


def read_yaml(text: str, *, place: str) -> Any:
    """Read YAML of bounded size: aliases that stand for more than a recipe could hold are refused before they do.

    Raises:
        DnoError: it is no YAML, or stands for too much.
    """
    loader = _Loader(text)
    try:
        if _depth(text) > _DEEPEST:
            raise ValueError(f"brackets in brackets, more than {_DEEPEST} deep")
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _size(node, {}, ())) > _MAX_NODES:
            many = f"{count:,}" if count < 10**9 else "billions of"
            raise ValueError(f"its aliases (*name) stand for {many} values; expected at most {_MAX_NODES:,}")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # what looks like a date is made one: 2024-13-01
        raise DnoError(f"{place}: not valid YAML: {_short(error)}") from None
    finally:
        loader.dispose()


def _short(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return "\n".join(line[:200] for line in lines[:8])


def _size(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values that a node becomes, each alias counted as what it stands for."""
    if id(node) in above:
        raise ValueError("an alias that stands for what it is in")
    if id(node) not in known:
        inner: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            _refuse_repetitions(node)
            inner = (part for pair in node.value for part in pair)
        known[id(node)] = 1 + sum(_size(part, known, (*above, id(node))) for part in inner)
    return known[id(node)]


def _refuse_repetitions(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in seen:
                raise ValueError(f"{key.value!r} is there twice, the second time in line {key.start_mark.line + 1}")
            seen.add(key.value)


def _depth(text: str) -> int:
    """At least how deep brackets go."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest
