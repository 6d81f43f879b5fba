"""Quantities with units on the command line."""

from __future__ import annotations

import re

from dno_jax.errors import DnoError


def read_bytes(text: str, *, option: str) -> int:
    """Read a size such as 500MB, 5GB or 16GiB.

    Raises:
        DnoError: it is none; `option` says where it stands.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT]?)|([KMGT])i)B", text)
    if found is None or not float(found[1]):
        raise DnoError(f"{option} is {text!r}; expected a number above 0 and a unit, such as 500MB, 5GB or 16GiB")
    number, decimal, binary = found.groups()
    unit = 1024 ** " KMGT".index(binary) if binary else 1000 ** " kMGT".index(decimal or " ")
    return int(float(number) * unit)
