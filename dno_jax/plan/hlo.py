"""What a compiled program sends between devices, read in its text: runs of loops multiplied, of branches the dearest.

Counted is what each device holds of an operation's result, or of its operand where that is larger. A loop that ends by
itself, such as that over a response's tokens, counts as one run: the figures are then of a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "send")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
_CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)}|copy|transpose)(-start)?\((.*)")
_START = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]+)\][^{]*\{([^}]*)\}")
_INTO_VECTOR_MEMORY = re.compile(r" = \(?\w+\[[\d,]*\]\{[^}]*S\(1\)\}[^=]* copy(-start)?\(")
_PART = re.compile(r"channel_id=(\d+).*chain_id=\"(\d+)\"")
_CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")


@dataclass(frozen=True)
class Call:
    """One operation between devices, at one place of a program.

    Attributes:
        shape: of its largest array, of so many `bytes` on a device.
        sizes: numbers of each of its results.
        runs: of it in one run of the program, those of loops multiplied.
        looped: whether a loop runs it.
        groups: of devices, by their places in the mesh; empty: all.
    """

    kind: str
    shape: str
    bytes: int
    sizes: tuple[int, ...]
    runs: int
    looped: bool
    groups: tuple[tuple[int, ...], ...]

    def crosses(self, axes: Sequence[int], axis: int) -> bool:
        """Whether devices that differ along an axis of a mesh of these sizes take part."""
        along = np.indices(axes)[axis].ravel()
        return any(len(set(along[list(group)])) > 1 for group in self.groups or [tuple(range(math.prod(axes)))])


@dataclass(frozen=True)
class Collective:
    """One kind of operation between devices, all of a program's together.

    Attributes:
        runs: in one run of the program.
        bytes: of all runs, a device.
        largest: bytes of the largest one; `shape` is its shape.
        looped: of the runs, how many are in loops.
    """

    kind: str
    runs: int = 0
    bytes: int = 0
    largest: int = 0
    shape: str = ""
    looped: int = 0

    def __add__(self, other: Collective) -> Collective:
        larger = self if self.largest >= other.largest else other
        return Collective(
            self.kind,
            self.runs + other.runs,
            self.bytes + other.bytes,
            larger.largest,
            larger.shape,
            self.looped + other.looped,
        )

    def times(self, count: int) -> Collective:
        return Collective(self.kind, self.runs * count, self.bytes * count, self.largest, self.shape, self.runs * count)


Totals = Mapping[str, Collective]


def calls(text: str) -> list[Call]:
    """Return all operations between devices of a compiled program, those of every branch."""
    bodies, entry = _computations(text)

    def walk(name: str, runs: int, looped: bool) -> Iterator[Call]:
        for line in bodies.get(name, ()):
            kind, shape, size = _operation(line)
            if kind in KINDS:
                results = _SHAPE.findall(line.partition(f" {kind}")[0])
                sizes = tuple(_count(dims) for _, dims in results)
                yield Call(kind, shape, size, sizes, runs, looped, _groups(line))
                continue
            loop = " while(" in line
            for called in [*_CALLED.findall(line), *_branches(line)]:
                yield from walk(called, runs * _trips(line, bodies) if loop else runs, looped or loop)

    return list(walk(entry, 1, False))


def collectives(text: str) -> list[Collective]:
    """Return what a compiled program sends, by kind."""
    found = _totals(text)
    return [found[kind] for kind in KINDS if kind in found]


def copies(text: str, *, at_least: int) -> list[str]:
    """Return the shapes of copies and transpositions of so many bytes inside of loops, in their order.

    Those into a TPU's vector memory are left out: that is how it reads.
    """
    bodies, entry = _computations(text)
    looped = _within_loops(bodies, entry)
    return [
        shape
        for name in looped
        for line in bodies[name]
        for kind, shape, size in [_operation(line)]
        if kind in ("copy", "transpose") and size >= at_least and not _INTO_VECTOR_MEMORY.search(line)
    ]


def _totals(text: str) -> Totals:
    bodies, entry = _computations(text)
    known: dict[str, Totals] = {}

    def of(name: str) -> Totals:
        if name not in known:
            known[name] = {}  # no computation calls itself
            known[name] = _sum(of_line(line) for line in bodies.get(name, ()))
        return known[name]

    def of_line(line: str) -> Totals:
        kind, shape, size = _operation(line)
        own = {kind: Collective(kind, 1, size, size, shape)} if kind in KINDS else {}
        inner = _sum(of(name) for name in _CALLED.findall(line) if kind not in KINDS)
        if " while(" in line:
            inner = {name: one.times(_trips(line, bodies)) for name, one in inner.items()}
        dearest = max((of(name) for name in _branches(line)), key=_bytes, default={})
        return _sum([own, inner, dearest])

    return of(entry)


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """Return how often a loop runs: what the compiler says, or the bound that its condition compares a counter with."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    own = bodies.get(condition[1], []) if condition else []
    own = own + [inner for each in own for name in _CALLED.findall(each) for inner in bodies.get(name, [])]
    if any(" and(" in each or " or(" in each for each in own):  # it ends by what it finds
        return 1
    return max((int(bound) for each in own for bound in _CONSTANT.findall(each)), default=1)


def _sum(totals: Iterator[Totals] | list[Totals]) -> Totals:
    found: dict[str, Collective] = {}
    for one in totals:
        for kind, value in one.items():
            found[kind] = found[kind] + value if kind in found else value
    return found


def _bytes(totals: Totals) -> int:
    return sum(one.bytes for one in totals.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of every computation by its name, and the name of the program's own."""
    bodies: dict[str, list[str]] = {}
    spread: set[tuple[str | None, ...]] = set()
    name = entry = ""
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and (started := _START.match(line)):
            name = started[2]
            bodies[name] = []
            entry = name if started[1] else entry
        elif name:
            if part := _PART.search(line):
                if part.groups() in spread:
                    continue
                spread.add(part.groups())
            bodies[name].append(line)
    return bodies, entry


def _within_loops(bodies: dict[str, list[str]], entry: str) -> list[str]:
    """Return the computations that loops run."""
    found: dict[str, None] = {}

    def walk(name: str, inside: bool) -> None:
        if name in found or name not in bodies:
            return
        if inside:
            found[name] = None
        for line in bodies[name]:
            below = inside or " while(" in line
            for called in [*_CALLED.findall(line), *_branches(line)]:
                walk(called, below)

    walk(entry, False)
    return list(found)


def _branches(line: str) -> list[str]:
    names = (name.strip().lstrip("%") for pair in _BRANCHES.findall(line) for name in ",".join(pair).split(","))
    return [name for name in names if name]


def _operation(line: str) -> tuple[str, str, int]:
    """Return the kind of a line's operation, its largest array as text, and the bytes of that."""
    called = _CALL.search(line)
    if called is None:
        return "", "", 0
    arrays = _SHAPE.findall(called[1])
    if called[2] in KINDS:
        arrays += _SHAPE.findall(called[4].split("), ")[0])  # operands, where the text names their shapes
    sizes = {f"{dtype}[{dims}]": _size(dtype, dims) for dtype, dims in arrays}
    largest = max(sizes, key=lambda shape: sizes[shape], default="")
    return called[2], largest, sizes.get(largest, 0)


def _size(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])
    return _count(dims) * bits // 8


def _count(dims: str) -> int:
    return math.prod(int(size) for size in dims.split(",") if size)


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Return between which devices an operation is; the compiler has three ways to say it."""
    if found := _LISTED.search(line):
        return tuple(tuple(int(one) for one in group.split(",")) for group in re.findall(r"\{([\d, ]+)\}", found[1]))
    if found := _COUNTED.search(line):
        shape, source, turned = ([int(one) for one in part.split(",")] if part else [] for part in found.groups())
        ids = np.arange(math.prod(source)).reshape(source)
        return _tuples((ids.transpose(turned) if turned else ids).reshape(shape))
    if found := _NAMED.search(line):
        axes = re.findall(r"'(\w+)'=(\d+)", found[1])
        inside = [index for index, (axis, _) in enumerate(axes) if f"'{axis}'" in found[2]]
        sizes = [int(size) for _, size in axes]
        ids = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), inside, range(-len(inside), 0))
        return _tuples(ids.reshape(-1, math.prod(sizes[index] for index in inside)))
    return ()


def _tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, groups.tolist()))
