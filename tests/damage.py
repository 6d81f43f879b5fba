"""Damage as disks and people do it: flipped bits, cut and missing files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def flip(path: Path, *places: float) -> None:
    """Flip one bit at each of some places, shares of a file's length; at ten by default: not every byte is read."""
    content = bytearray(path.read_bytes())
    for place in places or [index / 10 for index in range(1, 11)]:
        content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "empty": empty, "remove": remove}


def weights_file(folder: os.PathLike[str]) -> Path:
    """The largest file below a checkpoint's folder: the arrays themselves."""
    return max((path for path in Path(folder).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def damage_weights(folder: os.PathLike[str], damage: Callable[[Path], None]) -> None:
    """Damage every file below a checkpoint's folder that may hold arrays: of which bytes are read, chance decides."""
    for path in [path for path in Path(folder).rglob("*") if path.is_file() and path.stat().st_size > 3000]:
        damage(path)
