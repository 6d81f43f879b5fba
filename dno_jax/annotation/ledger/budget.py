"""What annotation costs, and the limit that it cannot pass.

Before a call is sent, the most that it can cost is set aside: the most tokens its prompt can have, and the longest
reply. Calls in flight together never hold more than `annotation.max_usd` leaves; one that does not fit waits until
others have come back cheaper than feared, and is refused when none is left that could. What was really paid stands in
the store's receipts, committed with the verdicts, so that a restarted run resumes counting where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from dno_jax.annotation.ledger.store import Receipt, VerdictStore
from dno_jax.annotation.models import is_another
from dno_jax.annotation.question import Question, Reply
from dno_jax.config import AnnotationSection, PriceSection
from dno_jax.endpoint import Trouble
from dno_jax.errors import DnoError

# No tokenizer of bytes, or of pieces with bytes to fall back on, makes more tokens of a text than it has bytes; what
# chat templates and endpoints put around a message (roles, headers, a default system message) stays below this.
_TOKENS_A_MESSAGE = 64
_ROUNDING = 1e-9  # dollars by which sums of floats may miss the limit


@dataclass(frozen=True)
class Usage:
    """Tokens of one call: as an endpoint counted them, or the most that there can be."""

    tokens_in: int
    tokens_out: int

    @classmethod
    def stated(cls, tokens_in: int, tokens_out: int) -> Usage | None:
        """Return what an endpoint counted; None where it states nothing, for no call takes no tokens."""
        return cls(tokens_in, tokens_out) if tokens_in or tokens_out else None


class OverBudget(Exception):
    """A request that belongs to no verdict, and does not fit any more."""


def most_usage(question: Question) -> Usage:
    """Return the most tokens that one call with this question can take."""
    texts = [str(message["content"]) for message in question.body["messages"]]
    texts += [json.dumps(schema) for schema in (question.schema, question.body.get("response_format")) if schema]
    bytes_ = sum(len(text.encode(errors="replace")) for text in texts)
    section, replies = question.asked, int(question.body.get("n", 1))
    return Usage(
        tokens_in=bytes_ + _TOKENS_A_MESSAGE * len(texts),
        tokens_out=replies * int(question.body.get(section.max_tokens_field, section.max_tokens)),
    )


def cost(price: PriceSection, usage: Usage, *, batch: bool = False) -> float:
    """Return what so many tokens cost, dollars."""
    usd = (usage.tokens_in * price.input + usage.tokens_out * price.output) / 1e6
    return usd * price.batch if batch else usd


def _is_free(trouble: Trouble) -> bool:
    """Whether an endpoint surely took no money: nothing reached it, or it says so itself.

    408, 502, 504 and 52x are what stands before a model says of one that did not answer in time, and may have worked.
    """
    if trouble.status is None:
        return trouble.unreachable
    return trouble.status >= 400 and trouble.status not in (408, 502, 504) and trouble.status < 520


class Budget:
    """What one run may spend, and what it has spent, whichever process spent it."""

    def __init__(self, section: AnnotationSection, *, store: VerdictStore, run: str):
        """
        Args:
            run: names the run in the store.
        """
        self._prices = section.prices
        self._limit = section.max_usd
        self._store = store
        self._run = run
        self._held = 0.0  # dollars set aside for calls in flight
        self._holders = 0
        self._waiting: deque[tuple[float, asyncio.Future[bool]]] = deque()
        self._over = False

    @property
    def spent(self) -> float:
        """Dollars that this run has paid, all its processes together."""
        return self._store.spent(self._run)

    @property
    def why(self) -> str:
        """Say in a verdict's detail why nobody was asked."""
        return f"annotation.max_usd={self._limit:g} might be passed"

    @asynccontextmanager
    async def room(
        self, question: Question, *, batch: bool = False, wait: bool = True, owed: bool = False
    ) -> AsyncIterator[bool]:
        """Hold what a call can cost at most for as long as it takes to send it and to commit what came of it.

        Args:
            batch: it goes by the Batch API, whose price is another.
            wait: for other calls to come back cheaper than feared; a batch, which holds money for many at once, would
                wait for itself.
            owed: an earlier run has sent it: the money is gone, whether it fits or not.

        Yields:
            Whether the call may be sent. Once one that waited may not, none may: the run is about to stop.
        """
        usd = 0.0 if self._limit is None else self._usd(question, most_usage(question), batch=batch)
        if usd == 0.0:
            yield True
            return
        if not (await self._hold(usd) if wait else self._take(usd, owed=owed)):
            yield False
            return
        try:
            yield True
        finally:
            self._release(usd)

    def bill(self, question: Question, result: Reply | Trouble, *, batch: bool = False) -> Receipt:
        """Return what one call cost, by what came of it.

        A refusal is free. Where nobody states what a call took, it counts as the most that it can have been: of a
        connection that broke, nobody knows whether the endpoint had begun to work.
        """
        if isinstance(result, Trouble) and _is_free(result):
            return Receipt(run=self._run, model=question.asked.model, requests=1)
        usage = Usage.stated(result.tokens_in, result.tokens_out) if isinstance(result, Reply) else None
        counted = usage or most_usage(question)
        model = question.asked.model
        another = isinstance(result, Reply) and is_another(model, result.model)
        return Receipt(
            run=self._run,
            model=model,
            requests=1,
            tokens_in=usage.tokens_in if usage else 0,
            tokens_out=usage.tokens_out if usage else 0,
            usd=self._usd(question, counted, batch=batch),
            unmetered=int(usage is None),
            answered_by=result.model if another and isinstance(result, Reply) else "",
        )

    def stop(self, *, missing: int) -> DnoError:
        """Return the error by which a run stops that may spend no more.

        Args:
            missing: pools that have no verdict because of it.
        """
        return DnoError(
            f"annotation.max_usd={self._limit:g} leaves no room for another call: ${self.spent:.4f} are spent, and "
            f"{missing} pools have no verdict yet. Raise annotation.max_usd and start again: only these are asked "
            "about, whatever is paid for is kept"
        )

    def receipt(self) -> dict[str, Any]:
        """Return what this run has paid by model, with the prices by which it counts now, for receipts.json."""
        others = self._store.other_models(self._run)
        receipts = [receipt for receipt in self._store.receipts() if receipt.run == self._run]
        return {
            "store": self._store.store_id,
            "path": os.path.abspath(self._store.path),
            "max_usd": self._limit,
            "usd": sum(receipt.usd for receipt in receipts),
            "models": {
                receipt.model: {
                    "requests": receipt.requests,
                    "tokens_in": receipt.tokens_in,
                    "tokens_out": receipt.tokens_out,
                    "usd": receipt.usd,
                    "requests_without_usage": receipt.unmetered,
                    **({"answered_by": others[receipt.model]} if receipt.model in others else {}),
                    "price": price.model_dump() if (price := self._prices.get(receipt.model)) else None,
                }
                for receipt in receipts
            },
        }

    def _usd(self, question: Question, usage: Usage, *, batch: bool) -> float:
        price = self._prices.get(question.asked.model)
        return 0.0 if price is None else cost(price, usage, batch=batch)

    def _fits(self, usd: float) -> bool:
        # Read each time: another process may spend for the same run.
        return self._limit is not None and self.spent + self._held + usd <= self._limit + _ROUNDING

    def _take(self, usd: float, *, owed: bool = False) -> bool:
        fits = owed or (not self._over and self._fits(usd))
        if fits:
            self._held += usd
            self._holders += 1
        return fits

    async def _hold(self, usd: float) -> bool:
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((usd, future))
        self._settle()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.result():
                self._release(usd)
            raise

    def _release(self, usd: float) -> None:
        self._holders -= 1
        self._held = self._held - usd if self._holders else 0.0
        self._settle()

    def _settle(self) -> None:
        """Let those in who fit, first come, first served; refuse all when nothing can come back any more."""
        while self._waiting:
            usd, future = self._waiting[0]
            if not future.done():  # else its caller was cancelled
                if self._take(usd):
                    future.set_result(True)
                elif self._holders and not self._over:
                    return
                else:
                    self._over = True
                    future.set_result(False)
            self._waiting.popleft()
