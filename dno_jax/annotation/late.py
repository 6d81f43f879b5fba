"""What a server failed with is asked once more at the end, after a pause: it may be well again."""

from __future__ import annotations

import asyncio

from dno_jax.annotation.transport.completion import BROKEN_OFF
from dno_jax.console import say

PAUSE_SECONDS = 10.0


def failed_by_server(state: str, detail: str) -> bool:
    """Whether a question has no answer because the server failed, as it says itself."""
    return state == "failed" and detail.startswith(("HTTP 5", BROKEN_OFF))


async def pause(count: int, *, what: str) -> None:
    """Wait before so many are asked once more, and say so.

    Args:
        what: completes "3 ..." as in "pools".
    """
    say(f"{count} {what} failed by faults of the server (HTTP 5xx): asking once more in {PAUSE_SECONDS:g} s")
    await asyncio.sleep(PAUSE_SECONDS)
