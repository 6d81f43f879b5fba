"""The checker of annotations that the suite puts on every function of the package (see conftest.py)."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let beartype check a function of a module or class; those made by a call would be wrapped anew by every call."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
