"""The word that nothing more is to be sent, heard by whoever waits."""

from __future__ import annotations

import asyncio
import contextlib

from dno_jax.errors import DnoError


class Stop:
    """Said once, with its reason."""

    def __init__(self) -> None:
        self.reason: DnoError | None = None
        self._said = asyncio.Event()

    def say(self, reason: DnoError) -> None:
        """Let every wait end, now and later; the first reason stands."""
        self.reason = self.reason or reason
        self._said.set()

    def check(self) -> None:
        """
        Raises:
            DnoError: the reason, once it was said.
        """
        if self.reason is not None:
            raise self.reason

    async def pause(self, seconds: float) -> None:
        """Wait so long, or raise the reason as soon as it is said."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._said.wait()
        self.check()
