"""A judge that is a function of yours: (messages, responses) -> points, or a matrix of win rates."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dno_jax.annotation.pool import Annotator, Pool
from dno_jax.config import PythonSection
from dno_jax.display import printable
from dno_jax.errors import DnoError
from dno_jax.preferences import check_preference_matrix
from dno_jax.records import Judgement

_PLACE = "annotation.python.function"


class PythonAnnotator(Annotator):
    """Calls a function with a prompt's messages and its responses.

    What the function raises, or returns in another shape, leaves that pool without a judgement: it is asked again by
    the next call, and never made a number.
    """

    def __init__(self, section: PythonSection):
        """Import the function.

        Raises:
            DnoError: there is no such module or function, or the module fails.
        """
        self._section = section
        self._function, source = _import(section.function)
        self._digest = hashlib.sha256(source).hexdigest()
        self._turn = asyncio.Semaphore(section.max_concurrency)

    @property
    def identity(self) -> str:
        return f"python {self._section.function} #{self._digest[:16]} {self._section.returns}"

    @property
    def width(self) -> int:
        return self._section.max_concurrency

    def recall(self, pool: Pool, *, repeat: int = 0) -> Judgement | None:
        return None

    async def judge(self, pool: Pool, *, repeat: int = 0) -> Judgement:
        messages = [{"role": message.role, "content": message.content} for message in pool.prompt.messages]
        responses = [candidate.text for candidate in pool.candidates]
        fields: dict[str, Any] = {
            "prompt_id": pool.prompt.prompt_id,
            "candidate_ids": pool.candidate_ids,
            "judge": self.identity,
        }
        try:
            async with self._turn:
                said = await asyncio.to_thread(self._function, messages, responses)
                if inspect.isawaitable(said):
                    said = await said
            found = np.asarray(said, dtype=np.float64)
            if self._section.returns == "points":
                return Judgement(**fields, state="ok", scores=_points(found, count=len(responses)))
            return Judgement(**fields, state="ok", wins=_wins(found, count=len(responses)))
        except Exception as error:
            detail = f"{self._section.function}: {type(error).__name__}: {error}"
            return Judgement(**fields, state="failed", detail=printable(" ".join(detail.split()))[:300])


def _points(found: np.ndarray, *, count: int) -> tuple[float, ...]:
    if found.shape != (count,) or not np.isfinite(found).all():
        raise ValueError(f"expected {count} finite numbers, one per response, got {_shown(found)}")
    return tuple(found.tolist())


def _wins(found: np.ndarray, *, count: int) -> tuple[tuple[float, ...], ...]:
    if found.shape != (count, count):
        raise ValueError(f"expected a {count} x {count} matrix of P(row beats column), got {_shown(found)}")
    check_preference_matrix(found)
    return tuple(tuple(row) for row in found.tolist())


def _shown(found: np.ndarray) -> str:
    return f"{found.tolist()!r:.80}" if found.ndim < 2 else f"an array of {found.shape}"


def _import(name: str) -> tuple[Callable[..., Any], bytes]:
    """Return the function and the bytes of its file, which are part of the judge's identity."""
    module_name, _, function_name = name.partition(":")
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except Exception as error:
        raise DnoError(
            f"{_PLACE}={name}: the module {module_name!r} cannot be imported from {os.getcwd()} or PYTHONPATH: "
            f"{type(error).__name__}: {error}"
        ) from None
    finally:
        sys.path[:] = before
    function = getattr(module, function_name, None)
    if not callable(function):
        there = ", ".join(sorted(own for own, value in vars(module).items() if inspect.isfunction(value))) or "none"
        raise DnoError(f"{_PLACE}={name}: {module_name} has no function {function_name!r}; its functions: {there}")
    file = getattr(module, "__file__", None)
    return function, Path(file).read_bytes() if file else b""
