"""How work with a judge or a teacher ends: nothing that was paid for is lost, and the receipts are written.

receipts.json says what a run has paid, by the store that holds the verdicts and by model, where a person finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, Protocol, runtime_checkable

from dno_jax.console import say
from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.run_dir import RunDir


@runtime_checkable
class Paid(Protocol):
    """Who is paid, or may be: an annotator, or the client that a teacher is asked through."""

    async def drain(self) -> None: ...

    def receipt(self) -> dict[str, Any] | None: ...

    async def close(self) -> None: ...


@contextlib.asynccontextmanager
async def closing(asked: Paid, run_dir: RunDir) -> AsyncIterator[None]:
    """Close a judge or a teacher when the work with it ends, however it ends, and leave the receipts.

    Nothing more is asked then; what is in flight comes back and is stored first. A second interrupt gives it up.

    Raises:
        DnoError: the receipts cannot be written; after an error of the work's own, that one stands.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError):
            say("stopping when the answers in flight are there and stored; interrupt again to give them up")
        with contextlib.suppress(DnoError):  # the same full disk, for one
            await _close(asked, run_dir)
        raise
    await _close(asked, run_dir)


def dollars(receipt: dict[str, Any] | None) -> str:
    """What a receipt comes to, for a progress line; empty where nothing is paid for."""
    return f"${receipt['usd']:,.2f}" if receipt and receipt["usd"] else ""


async def _close(asked: Paid, run_dir: RunDir) -> None:
    try:
        await asked.drain()
        receipt = asked.receipt()
    finally:
        await asked.close()
    if receipt is not None:
        _save(receipt, run_dir)


def _save(receipt: dict[str, Any], run_dir: RunDir) -> None:
    """Write a store's receipt in place of its last one, beside those of other stores (`dno annotate`'s, for one)."""
    stores = _stores(run_dir) | {receipt.pop("store"): receipt}
    total = sum(found["usd"] for found in stores.values())
    write_atomically(run_dir.receipts_path, json.dumps({"usd": total, "stores": stores}, indent=2) + "\n")


def _stores(run_dir: RunDir) -> dict[str, Any]:
    try:
        return json.loads(run_dir.receipts_path.read_text())["stores"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return {}  # none yet, or another program's: what was paid stands in the stores
