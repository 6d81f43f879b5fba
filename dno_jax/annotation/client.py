"""Where questions are carried: to the store first, then, within the budget, to the model that is asked.

A try is committed when it comes back, with what it cost, before anything else happens; so is every failure. What no
later question could survive (a refused key, an unknown model, a full disk under the store) stops the client: what
is under way comes back and is committed, and nothing more is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from dno_jax.annotation.ledger.budget import Budget, OverBudget, most_usage
from dno_jax.annotation.ledger.store import Receipt, VerdictStore
from dno_jax.annotation.question import Question, Reply, Unparsable, Verdict
from dno_jax.annotation.transport import batch
from dno_jax.annotation.transport.client import EndpointClient
from dno_jax.annotation.transport.completion import BROKEN, BROKEN_OFF
from dno_jax.annotation.transport.probe import Sending
from dno_jax.annotation.transport.stop import Stop
from dno_jax.annotation.tries import Tries
from dno_jax.config import ChatSection, OpenAISection
from dno_jax.endpoint import Trouble, retried
from dno_jax.errors import DnoError

_LOG = logging.getLogger(__name__)

# Replies, none of which could be read, after which nobody is asked any more: they are paid for in vain.
_MOST_UNREAD = 100
_MOST_KEPT = 16_384  # characters of a reply that is not trained on: it is for people to read
_BYTES_A_TOKEN = 4  # of usual text: for limits of tokens per minute, which endpoints keep by estimates, too


class JudgeClient:
    """Answers questions, each of which is paid for once. It serves one event loop, and is closed in it."""

    def __init__(self, clients: Mapping[ChatSection, EndpointClient], *, store: VerdictStore, budget: Budget):
        """
        Args:
            clients: by the section of the configuration that questions name; closed with this one, as is the store.
        """
        self.budget = budget
        self._clients = clients
        self._store = store
        # As many as a client may have in flight: who waits here holds no money, and is spared what stops the others.
        self._slots = {section: asyncio.Semaphore(section.max_concurrency) for section in clients}
        self._under_way: dict[str, asyncio.Task[Verdict]] = {}
        self._probes: dict[ChatSection, asyncio.Task[None]] = {}
        self._stopped = Stop()
        self._unread: Counter[ChatSection] = Counter()  # replies of models of which none was read so far
        self._read_once: set[ChatSection] = set()
        self._swapped: set[ChatSection] = set()  # whose endpoints answered with another model, which was said
        self._given_up: set[str] = set()  # questions that had all their tries: asked again in this call, they have one

    @property
    def width(self) -> int:
        """How many requests may be in flight, of all models together."""
        return sum(section.max_concurrency for section in self._clients)

    @property
    def asks_by_batch(self) -> bool:
        """Whether the configuration asks for the Batch API, or a run has left batches that are to be collected."""
        return any(isinstance(section, OpenAISection) and section.batch for section in self._clients) or bool(
            self.by_batch()
        )

    def recall(self, question: Question) -> Verdict | None:
        """Return the answer where it is already paid for, else None."""
        return self._store.get(question.key)

    async def probe(self, question: Question, *, patient: bool = True) -> None:
        """Ask the model of a question for a sign of life, once, by a small request with the question's parameters.

        Args:
            patient: wait up to `max_outage` for one that is busy or has failed.

        Raises:
            DnoError: saying what is wrong with the endpoint, the key or the model.
        """
        task = self._probes.get(question.asked)
        if task is None:
            task = self._probes[question.asked] = asyncio.create_task(self._probe(question, patient=patient))
        await asyncio.shield(task)

    async def ask(self, question: Question) -> Verdict:
        """Return the stored answer, or ask, again where that may help; whatever comes back is committed first.

        The same question asked while it is under way is asked once.

        Raises:
            DnoError: nobody can be asked (a refused key, a dead endpoint), or the store fails.
        """
        if (known := self._store.get(question.key)) is not None:
            return known
        task = self._under_way.get(question.key)
        if task is None:
            task = asyncio.create_task(self._ask(question))
            self._under_way[question.key] = task
            task.add_done_callback(lambda done: self._settled(question.key, done))
        # One caller's end is not another's: what is asked for, and may be paid for, comes back all the same.
        return await asyncio.shield(task)

    def by_batch(self) -> frozenset[str]:
        """Return the keys of questions that the Batch API has been asked, by whichever run, and has not answered."""
        return frozenset(key for noted in self._store.open_batches() for key in noted.keys)

    async def ask_by_batch(self, questions: Sequence[Question]) -> None:
        """Have the Batch API answer what it can, and commit it; what it leaves is to be asked live.

        Where `batch` is false by now, only what is under way is waited for: it is paid for.

        Raises:
            DnoError: the endpoint has no Batch API, refuses it, or has not answered for long; or the store fails.
        """
        by_key = {question.key: question for question in questions if self.recall(question) is None}
        for section in {question.asked: None for question in by_key.values()}:
            own = [question for question in by_key.values() if question.asked == section]
            await self.probe(own[0])
            client = self._clients[section]
            async with AsyncExitStack() as rooms:  # held until all of it is committed

                async def room(question: Question, *, was_sent: bool, rooms: AsyncExitStack = rooms) -> bool:
                    budget = self.budget.room(question, batch=True, wait=False, owed=was_sent)
                    return await rooms.enter_async_context(budget)

                fresh = isinstance(section, OpenAISection) and section.batch
                async for key, result in batch.run(own, client=client, store=self._store, room=room, fresh=fresh):
                    if isinstance(result, Reply):
                        await self.settle(by_key[key], result, batch=True)

    async def settle(self, question: Question, result: Reply | Trouble, *, batch: bool = False) -> Verdict:
        """Read what came back of one try, commit it with what it cost, and return what stands.

        Args:
            batch: it came by the Batch API, whose price is another.

        Raises:
            DnoError: the store fails.
        """
        paid = self._bill(question, result, batch=batch)
        if paid.answered_by and question.asked not in self._swapped:
            self._swapped.add(question.asked)
            _LOG.warning("%s: %r was asked and %r answers (receipts.json counts how often): its verdicts are another "
                         "model's; check for aliases and fallbacks",
                         self._clients[question.asked].who, paid.model, paid.answered_by)  # fmt: skip
        if isinstance(result, Reply):
            verdict = self._read(question, result)
            self._count_unread(question, verdict)
        else:
            verdict = Verdict("refused" if result.then == "refused" else "failed", detail=result.detail)
        verdict = replace(verdict, tries=1, tokens_in=paid.tokens_in, tokens_out=paid.tokens_out, usd=paid.usd)
        return await self._store.put(
            question.key, verdict, judge=question.judge, prompt_id=question.prompt_id, paid=paid
        )

    def receipt(self) -> dict[str, Any]:
        """Return what the run has paid by model, for receipts.json."""
        return self.budget.receipt()

    async def drain(self) -> None:
        """Send nothing more, and wait until what is in flight has come back and is committed."""
        self._stop(DnoError("no more questions are sent: the run is stopping"))
        await asyncio.gather(*self._under_way.values(), *self._probes.values(), return_exceptions=True)
        await asyncio.gather(*(client.drain() for client in self._clients.values()))

    async def close(self) -> None:
        """Give up what is under way, and give back connections and the file."""
        tasks = [*self._under_way.values(), *self._probes.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await asyncio.gather(*(client.close() for client in self._clients.values()))
        finally:
            self._store.close()

    async def _probe(self, question: Question, *, patient: bool) -> None:
        async with self.budget.room(question) as granted:
            pass  # released: the small requests reserve their own share
        if granted:  # else not even they are sent
            with self._breaking(), suppress(OverBudget):
                pay = partial(self._pay, question)
                client = self._clients[question.asked]
                await client.probe(question.body, schema=question.schema, pay=pay, patient=patient)

    async def _pay(
        self, question: Question, body: Mapping[str, Any], send: Sending, *, wait: bool = True, held: bool = False
    ) -> Reply | Trouble:
        """Send a request that finds out what an endpoint offers, within the budget, and commit what it cost.

        Args:
            question: that it is sent for.
            wait: for money to be released; a call that holds some itself would keep others from releasing theirs.
            held: what is set aside for the question itself is enough for it.

        Raises:
            OverBudget: it was not sent, for the limit might be passed.
        """
        asked = replace(question, body=body, schema=None)
        async with nullcontext(True) if held else self.budget.room(asked, wait=wait) as granted:
            self._stopped.check()
            if not granted:
                raise OverBudget
            result = await send()
            await self._store.pay(self._bill(asked, result))
            return result

    def _bill(self, question: Question, result: Reply | Trouble, *, batch: bool = False) -> Receipt:
        """Return what a call cost; the name that the server gives its model is scrubbed."""
        paid = self.budget.bill(question, result, batch=batch)
        words = self._clients[question.asked].words
        return replace(paid, answered_by=words(paid.answered_by)) if paid.answered_by else paid

    async def _ask(self, question: Question) -> Verdict:
        """Try until there is an answer, a refusal, or no try left."""
        await self.probe(question)
        section, client = question.asked, self._clients[question.asked]
        usage = most_usage(question)
        tokens = usage.tokens_in // _BYTES_A_TOKEN + usage.tokens_out
        most = 1 if question.key in self._given_up else section.max_tries
        tries = Tries(question, section, most=most, takes_seed=client.offers is None or client.offers.seed)
        verdict = result = None

        async def attempt() -> Verdict | Trouble:
            nonlocal verdict, result
            async with self._slots[section], self.budget.room(question) as granted:
                self._stopped.check()
                if not granted:
                    raise OverBudget
                with self._breaking():
                    pay = partial(self._pay, question, wait=False)
                    before = client.answered
                    result = await client.send(tries.body, schema=question.schema, tokens=tokens, pay=pay)
                    verdict = await self.settle(question, result)
                    if verdict.is_answer or verdict.state == "refused":
                        return verdict
                    trouble = tries.count(result, verdict, before=before, after=client.answered)
                    if tries.needs_a_sign:
                        pay = partial(self._pay, question, held=True)
                        if await client.is_there(question.body, pay=pay):
                            return tries.signed(trouble)
            return trouble

        async def pause(seconds: float) -> None:
            if tries.pauses:
                await self._stopped.pause(seconds)

        try:
            await retried(attempt, who=section.model, pause=pause)
        except OverBudget:  # before this question, or before another endpoint was got to know for it
            return Verdict("over budget", detail=self.budget.why)
        assert verdict is not None
        if not verdict.is_answer:
            self._given_up.add(question.key)
        return verdict

    def _read(self, question: Question, reply: Reply) -> Verdict:
        client = self._clients[question.asked]
        is_judged = isinstance(question.asked, OpenAISection)
        # The client has taken its keys out of every reply. A teacher's text is trained on: what only looks like a key
        # ("Bearer tokens") stays.
        said = ((reply.said if is_judged else reply.text) or "").encode(errors="replace").decode()
        raw = client.scrub(said) if is_judged else said
        if is_judged:
            raw = raw[:_MOST_KEPT]
        verdict = Verdict("unparsable", raw=raw, model=client.scrub(reply.model))
        if reply.refusal is not None or reply.finish == "content_filter":
            return replace(verdict, state="refused", detail=client.words(reply.refusal or "content filter"))
        if reply.finish == BROKEN and is_judged:
            return replace(verdict, state="failed", detail=BROKEN_OFF)
        try:
            scores = question.read(reply)
        except Unparsable as error:
            return replace(verdict, raw=raw[:_MOST_KEPT], detail=client.words(str(error)))
        is_pair = isinstance(question.asked, OpenAISection) and question.asked.form != "listwise"
        return replace(verdict, state="tie" if is_pair and scores[0] == scores[1] else "ok", scores=scores)

    def _count_unread(self, question: Question, verdict: Verdict) -> None:
        asked = question.asked
        if verdict.is_answer:
            self._read_once.add(asked)
        if verdict.state != "unparsable" or asked in self._read_once:
            return
        self._unread[asked] += 1
        if self._unread[asked] >= _MOST_UNREAD and self._stopped.reason is None:
            words = self._clients[asked].words(verdict.raw)
            self._stop(
                DnoError(
                    f"none of the first {_MOST_UNREAD} replies of {asked.model!r} could be read ({verdict.detail}); "
                    f"the last one: {words!r}. Nobody is asked any more: try another rubric, a higher max_tokens, "
                    "structured=json_schema, or another model. All replies are kept"
                )
            )

    def _settled(self, key: str, task: asyncio.Task[Verdict]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # seen, though all who asked may be gone

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        try:
            yield
        except DnoError as error:
            self._stop(error)
            raise

    def _stop(self, error: DnoError) -> None:
        """Send nothing more, to nobody; who waits for a turn to send gets the error."""
        self._stopped.say(error)
        for client in self._clients.values():
            client.stop(error)
