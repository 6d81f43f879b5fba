"""Questions through the OpenAI Batch API: half the price, within a day, and never paid for twice.

A run that starts anew finds the batches it left and collects them. A batch that does not fit the endpoint's queue
is made anew when another has ended, or in halves where none is under way. What a batch leaves unanswered is the
caller's to ask live.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, Protocol

from dno_jax.annotation.question import Question, Reply
from dno_jax.annotation.transport import batch_api
from dno_jax.annotation.transport.batch_api import ENDED, PATH, Batches, BatchStore, OpenBatch
from dno_jax.annotation.transport.client import EndpointClient
from dno_jax.endpoint import Trouble

_LOG = logging.getLogger(__name__)

MAX_REQUESTS = 50_000  # of one batch, as OpenAI has it
MAX_BYTES = 200_000_000
FIRST_POLL_SECONDS = 5.0
MAX_POLL_SECONDS = 60.0
_FEWEST_REQUESTS = 64  # that a batch is halved to where the queue is full


class Room(Protocol):
    """Whether there is money for a question, which is set aside then; for one that was sent there has to be."""

    async def __call__(self, question: Question, *, was_sent: bool) -> bool: ...


async def run(
    questions: Iterable[Question], *, client: EndpointClient, store: BatchStore, room: Room, fresh: bool = True
) -> AsyncIterator[tuple[str, Reply | Trouble]]:
    """Yield the keys of questions with what the Batch API made of them.

    What is yielded has to be committed before the next is asked for: a batch is forgotten when all of it was yielded.
    Batches that an earlier run left are collected in place of being paid for again; of their answers, those that were
    not asked for now stay where they are.

    Args:
        client: its preferred endpoint is used, and it is probed by then.
        room: reserves money for each question; one for which there is none is passed over.
        fresh: make batches of what no earlier run has sent; else only those that are under way are waited for.

    Yields:
        A `Reply` as a live one is. A `Trouble` that says "retry" is a question to ask live.

    Raises:
        Unreachable: the endpoint has not answered for `max_outage` seconds.
        DnoError: it has no Batch API, or refuses this batch.
    """
    wanted = {question.key: question for question in questions}
    batches = Batches(client, store)
    under_way = [batch async for batch in batches.resumed(wanted.keys())]
    left = dict(wanted)
    for key in (key for batch in under_way for key in batch.keys):
        if question := left.pop(key, None):
            await room(question, was_sent=True)
    if under_way and not fresh:
        _LOG.warning("%s: waiting for %d batches that an earlier run made, though batch=false now (%s); cancel them "
                     "there to have the rest asked live", client.who, len(under_way),
                     ", ".join(str(batch.batch_id) for batch in under_way))  # fmt: skip
    new = [question for question in left.values() if fresh and await room(question, was_sent=False)]
    for keys, data in _parts(new, client):
        under_way.append(await batches.make(keys, data))
    no_room: list[tuple[OpenBatch, Mapping[str, Any]]] = []
    pause = FIRST_POLL_SECONDS
    while under_way:
        ended = 0
        for batch in list(under_way):
            state = await batches.state(batch)
            if state["status"] not in ENDED:
                continue
            under_way.remove(batch)
            if fresh and _found_no_room(state):
                no_room.append((batch, state))
                continue
            ended += 1
            async for result in batches.results(batch, state, wanted.keys()):
                yield result
        anew = no_room[:ended] if ended or under_way else no_room
        no_room = no_room[len(anew) :]
        for batch, state in anew:
            keys = [key for key in batch.keys if key in wanted]
            size = len(keys) if ended else len(keys) // 2
            if not ended and size < _FEWEST_REQUESTS:
                async for result in batches.results(batch, state, wanted.keys()):
                    yield result
                continue
            batches.forget(batch, wanted.keys())
            for start in range(0, len(keys), size):
                for part, data in _parts([wanted[key] for key in keys[start : start + size]], client):
                    under_way.append(await batches.make(part, data))
        if under_way:
            await batch_api.pause(pause)
            pause = min(MAX_POLL_SECONDS, 1.5 * pause)


def _parts(questions: Iterable[Question], client: EndpointClient) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Yield keys and JSONL of batches within the limits."""
    keys: list[str] = []
    lines: list[bytes] = []
    size = 0
    for question in questions:
        body = client.composed(question.body, question.schema, offers=client.offers)
        request = {"custom_id": question.key, "method": "POST", "url": PATH, "body": body}
        line = json.dumps(request, separators=(",", ":")).encode() + b"\n"
        if keys and (len(keys) >= MAX_REQUESTS or size + len(line) > MAX_BYTES):
            yield tuple(keys), b"".join(lines)
            keys, lines, size = [], [], 0
        keys.append(question.key)
        lines.append(line)
        size += len(line)
    if keys:
        yield tuple(keys), b"".join(lines)


def _found_no_room(state: Mapping[str, Any]) -> bool:
    """Whether a batch failed because more tokens are enqueued than the account may have."""
    said = json.dumps(state.get("errors")).lower()
    return state["status"] == "failed" and ("token_limit_exceeded" in said or "enqueued token" in said)
