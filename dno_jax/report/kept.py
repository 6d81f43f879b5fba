"""What the reports of one run are made of, kept while it goes on: after a stage only what is new is read and made."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Kept:
    """Values by keys that hold all that they depend on; what the last page was not made of is let go."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}
        self._used: set[Hashable] = set()

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made where it is not there yet."""
        if key not in self._found:
            self._found[key] = make()
        self._used.add(key)
        return cast(T, self._found[key])

    def forget(self, key: Hashable) -> None:
        self._found.pop(key, None)

    def turn(self) -> None:
        """A page is written: let go of what it was not made of."""
        self._found = {key: value for key, value in self._found.items() if key in self._used}
        self._used = set()
