"""What a compiled program sends between devices, read in its text: runs of loops multiplied, of branches the dearest.

Counted is what each device holds of an operation's result, or of its operand where that is larger. A loop that ends by
itself, such as that over a response's tokens, counts as one run: the figures are then of a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
_CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)}|copy|transpose)(-start)?\((.*)")
_START = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")


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


def collectives(text: str) -> list[Collective]:
    """Return what a compiled program sends, by kind."""
    found = _totals(text)
    return [found[kind] for kind in KINDS if kind in found]


def copies(text: str, *, at_least: int) -> list[str]:
    """Return the shapes of copies and transpositions of so many bytes inside of loops, in their order."""
    bodies, entry = _computations(text)
    looped = _within_loops(bodies, entry)
    return [
        shape
        for name in looped
        for kind, shape, size in map(_operation, bodies[name])
        if kind in ("copy", "transpose") and size >= at_least
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
    name = entry = ""
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and (started := _START.match(line)):
            name = started[2]
            bodies[name] = []
            entry = name if started[1] else entry
        elif name:
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
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8
