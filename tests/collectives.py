"""What a compiled program of a CPU moves between devices, read from its text."""

import math
import re
from dataclasses import dataclass

import numpy as np

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@dataclass(frozen=True)
class Collective:
    """One of them: the numbers of its results, whether a loop runs it, and between which devices."""

    kind: str
    sizes: list[int]
    looped: bool
    groups: list[list[int]]

    def crosses(self, axes, axis):
        """Whether devices that differ along an axis of a mesh of these sizes take part."""
        along = np.indices(axes)[axis].ravel()
        return any(len(set(along[group])) > 1 for group in self.groups)


def collectives(text):
    bodies, calls = {}, {}
    name = entry = ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, entry = start[2], start[2] if start[1] else entry
            bodies[name], calls[name] = [], []
        if made := re.search(rf"= (.+?) ({KINDS})\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", made[1])
            sizes = [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
            bodies[name].append((made[2], sizes, groups(line)))
        if name:
            called = re.findall(r"(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)", line)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            calls[name] += [(one, " while(" in line) for one in called]

    def walk(name, looped):
        yield from (Collective(kind, sizes, looped, among) for kind, sizes, among in bodies[name])
        for called, loop in calls[name]:
            yield from walk(called, looped or loop)

    return list(walk(entry, False))


def groups(line):
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line):
        return [[int(one) for one in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    named = re.search(r"replica_groups=mesh\[([^\]]+)\][^{]*\{([^}]*)\}", line)
    if counted:
        shape, source, turned = ([int(one) for one in part.split(",")] if part else None for part in counted.groups())
        return np.arange(math.prod(source)).reshape(source).transpose(turned).reshape(shape).tolist()
    assert named, line
    axes = re.findall(r"'(\w+)'=(\d+)", named[1])
    inside = [index for index, (axis, _) in enumerate(axes) if f"'{axis}'" in named[2]]
    ids = np.arange(math.prod(int(size) for _, size in axes)).reshape([int(size) for _, size in axes])
    moved = np.moveaxis(ids, inside, range(-len(inside), 0))
    return moved.reshape(-1, math.prod(moved.shape[len(axes) - len(inside) :])).tolist()
