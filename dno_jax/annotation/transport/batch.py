"""Questions through the OpenAI Batch API: half the price, within a day, and never paid for twice.

A batch is noted in the store before it is made, with a token that stands in its metadata, and again with its id. A run
that starts anew finds the batches it left and collects them; where it was killed while one was being made, the list of
batches says by the token whether it was. A batch that finds no room in the endpoint's queue is made anew when another
has ended, or in halves where none is under way. What a batch leaves unanswered is the caller's to ask live.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote

from dno_jax.annotation.question import Question, Reply
from dno_jax.annotation.transport.client import Client
from dno_jax.annotation.transport.completion import completion_reply
from dno_jax.annotation.transport.routes import Unreachable
from dno_jax.endpoint import Endpoint, EndpointError, Response, Trouble, wait_seconds
from dno_jax.errors import DnoError

_LOG = logging.getLogger(__name__)

MAX_REQUESTS = 50_000  # of one batch, as OpenAI has it
MAX_BYTES = 200_000_000
FIRST_POLL_SECONDS = 5.0
MAX_POLL_SECONDS = 60.0
_TRANSFER_SECONDS = 1800.0  # at least, for a file of that size
_PATH = "/v1/chat/completions"
_FEWEST_REQUESTS = 64  # that a batch is halved to for lack of room
_TOKEN = "dno_jax"
_ENDED = ("completed", "failed", "expired", "cancelled")

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class OpenBatch:
    """A batch that is or may be under way.

    Attributes:
        token: names it, here and in its metadata.
        url: of the endpoint that has it.
        keys: of the questions whose answers are still to be collected.
        batch_id: None while it is not known whether it was made.
    """

    token: str
    url: str
    keys: tuple[str, ...]
    batch_id: str | None = None


@runtime_checkable
class BatchStore(Protocol):
    """Where batches are remembered; each call is on the disk when it returns."""

    def remember_batch(self, batch: OpenBatch) -> None:
        """Note a batch, in place of what is noted under its token."""

    def open_batches(self) -> Sequence[OpenBatch]:
        """Return all that are noted."""
        ...

    def close_batch(self, token: str) -> None:
        """Forget a batch."""


class Room(Protocol):
    """Whether there is money for a question, which is set aside then; for one that was sent there has to be."""

    async def __call__(self, question: Question, *, was_sent: bool) -> bool: ...


async def run(
    questions: Iterable[Question], *, client: Client, store: BatchStore, room: Room, fresh: bool = True
) -> AsyncIterator[tuple[str, Reply | Trouble]]:
    """Yield the keys of questions with what the Batch API made of them.

    What is yielded has to be committed before the next is asked for: a batch is forgotten when all of it was yielded.
    Batches that an earlier run left are collected in place of being paid for again; of their answers, those that were
    not asked for now stay where they are.

    Args:
        client: its preferred endpoint is used, and it is probed by then.
        room: is asked about each question; one for which there is none is passed over.
        fresh: make batches of what no earlier run has sent; else only those that are under way are waited for.

    Yields:
        A `Reply` as a live one is. A `Trouble` that says "retry" is a question to ask live.

    Raises:
        Unreachable: the endpoint has not answered for `max_outage` seconds.
        DnoError: it has no Batch API, or refuses this batch.
    """
    wanted = {question.key: question for question in questions}
    batches = _Batches(client, store)
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
            if state["status"] not in _ENDED:
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
            await _pause(pause)
            pause = min(MAX_POLL_SECONDS, 1.5 * pause)


def _parts(questions: Iterable[Question], client: Client) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Yield keys and JSONL of batches within the limits."""
    keys: list[str] = []
    lines: list[bytes] = []
    size = 0
    for question in questions:
        body = client.composed(question.body, question.schema, offers=client.offers)
        request = {"custom_id": question.key, "method": "POST", "url": _PATH, "body": body}
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


class _Batches:
    """The Batch APIs of a model's endpoints, and what is noted of them: a batch stays where it was made."""

    def __init__(self, client: Client, store: BatchStore):
        self._client = client
        self._store = store
        self._told: dict[str, str] = {}
        self._timeout = max(_TRANSFER_SECONDS, client.section.timeout)

    async def resumed(self, wanted: Iterable[str]) -> AsyncIterator[OpenBatch]:
        """Yield the batches of these endpoints that have something of what is wanted."""
        wanted = set(wanted)
        for batch in self._store.open_batches():
            if wanted.isdisjoint(batch.keys):
                continue
            endpoint = self._client.at(batch.url)
            if endpoint is None:
                _LOG.warning("%s: a batch of %d questions was made at %s, which is no endpoint of the model any more: "
                             "its answers are not collected, and are paid for again; name it in %s.more_endpoints",
                             self._client.who, len(batch.keys), batch.url, self._client.place)  # fmt: skip
                continue
            if batch.batch_id is None:
                batch_id = await self._persist(endpoint, lambda batch=batch: self._find(self._at(batch), batch.token))
                if batch_id is None:  # killed before it was made
                    self._store.close_batch(batch.token)
                    continue
                batch = replace(batch, batch_id=batch_id)
                self._store.remember_batch(batch)
            _LOG.info("%s: resuming batch %s, %d requests", self._client.who, batch.batch_id, len(batch.keys))
            yield batch

    async def make(self, keys: tuple[str, ...], data: bytes) -> OpenBatch:
        """Upload requests and make a batch of them."""
        endpoint = self._client.endpoint
        upload = {"file": ("requests.jsonl", data), "timeout": self._timeout}
        file = await self._persist(
            endpoint, lambda: self._object(endpoint.post("/files", {"purpose": "batch"}, **upload))
        )
        batch = OpenBatch(token=uuid.uuid4().hex, url=endpoint.url, keys=keys)
        self._store.remember_batch(batch)
        request = {
            "input_file_id": file["id"],
            "endpoint": _PATH,
            "completion_window": "24h",
            "metadata": {_TOKEN: batch.token},
        }
        perhaps_made = False

        async def create() -> str | Trouble:
            nonlocal perhaps_made
            if perhaps_made:  # and its answer was lost
                found = await self._find(endpoint, batch.token)
                if found is not None:
                    return found
                perhaps_made = False
            made = await self._object(endpoint.post("/batches", request))
            if not isinstance(made, Trouble):
                return made["id"]
            perhaps_made = not (made.unreachable or (400 <= (made.status or 0) < 500 and made.status not in (408, 409)))
            return made

        try:
            batch_id = await self._persist(endpoint, create)
        except DnoError as error:
            if not isinstance(error, Unreachable) and not perhaps_made:
                self._store.close_batch(batch.token)
            raise
        batch = replace(batch, batch_id=batch_id)
        self._store.remember_batch(batch)
        _LOG.info("%s: batch %s of %d requests", self._client.who, batch_id, len(keys))
        return batch

    def forget(self, batch: OpenBatch, wanted: Collection[str]) -> None:
        """Strike what is wanted out of the note of a batch that has ended; others may have struck theirs meanwhile."""
        noted = next((note for note in self._store.open_batches() if note.token == batch.token), None)
        later = tuple(key for key in noted.keys if key not in wanted) if noted else ()
        if later:
            self._store.remember_batch(replace(batch, keys=later))
        elif noted:
            self._store.close_batch(batch.token)

    async def state(self, batch: OpenBatch) -> Mapping[str, Any]:
        """Return what the endpoint says of a batch; one that it has forgotten has failed."""
        assert batch.batch_id is not None
        path = f"/batches/{quote(batch.batch_id, safe='')}"
        endpoint = self._at(batch)
        state = await self._persist(
            endpoint, lambda: _unless_gone(self._object(endpoint.get(path)), {"status": "failed"})
        )
        status = state["status"] = str(state.get("status"))
        if self._told.get(batch.token) != status:
            self._told[batch.token] = status
            said = f", {self._client.words(json.dumps(state['errors']))}" if state.get("errors") else ""
            level = logging.INFO if status not in _ENDED or status == "completed" else logging.WARNING
            _LOG.log(level, "%s: batch %s: %s%s", self._client.who, batch.batch_id, self._client.words(status), said)
        return state

    async def results(
        self, batch: OpenBatch, state: Mapping[str, Any], wanted: Collection[str]
    ) -> AsyncIterator[tuple[str, Reply | Trouble]]:
        """Yield what came of all that is wanted of a batch that has ended, say what it left, and forget it."""
        unanswered = Trouble(f"batch {batch.batch_id} {state['status']} without an answer")
        missing = {key: unanswered for key in batch.keys if key in wanted}
        number, troubles = len(missing), []
        async for key, result in self._answers(batch, state):
            if missing.pop(key, None) is not None:
                if isinstance(result, Trouble):
                    troubles.append(result)
                yield key, result
        for item in missing.items():
            yield item
        if troubles := [*troubles, *missing.values()]:
            _LOG.warning("%s: batch %s (%s) left %d of %d requests without a reply (%s): they are asked live, at the "
                         "full price", self._client.who, batch.batch_id, self._client.words(state["status"]),
                         len(troubles), number, troubles[0].detail)  # fmt: skip
        self.forget(batch, wanted)

    async def _answers(self, batch: OpenBatch, state: Mapping[str, Any]) -> AsyncIterator[tuple[str, Reply | Trouble]]:
        """Yield what stands in the files of a batch that has ended."""
        endpoint, known = self._at(batch), set(batch.keys)
        for name in ("output_file_id", "error_file_id"):
            if not isinstance(state.get(name), str):
                continue
            path = f"/files/{quote(state[name], safe='')}/content"
            file = await self._persist(
                endpoint, lambda path=path: _unless_gone(endpoint.get(path, timeout=self._timeout), None)
            )
            odd = 0
            for line in re.finditer(r"[^\n]*\S[^\n]*", file.text if file else ""):
                read = _read_line(line[0], client=self._client)
                if read is None or read[0] not in known:
                    odd += 1
                else:
                    yield read
            if odd or file is None:
                _LOG.warning("%s: batch %s: %s", self._client.who, batch.batch_id,
                             f"{odd} odd lines are passed over" if odd else "a file of results is gone")  # fmt: skip

    def _at(self, batch: OpenBatch) -> Endpoint:
        endpoint = self._client.at(batch.url)
        assert endpoint is not None  # of others no batch is taken up
        return endpoint

    async def _find(self, endpoint: Endpoint, token: str) -> str | Trouble | None:
        """Look for the batch that has this token in its metadata; where there is no looking, say what that means."""
        try:
            found = await self._look_for(endpoint, token)
        except EndpointError as error:
            found = Trouble(str(error), then="raise", status=error.status)
        if not isinstance(found, Trouble) or found.then == "retry" or found.asks_for_a_pause:
            return found
        return replace(found, detail=f"{found.detail}; a batch with {_TOKEN}={token} in its metadata may have been "
                       "made there all the same: if you find it, cancel it first, or it is paid for twice")  # fmt: skip

    async def _look_for(self, endpoint: Endpoint, token: str) -> str | Trouble | None:
        after: str | None = None
        while True:
            query = {"limit": "100", **({"after": after} if after else {})}
            page = await self._object(endpoint.get("/batches", query=query), id_needed=False)
            if isinstance(page, Trouble):
                return page
            found = [entry for entry in page.get("data") or () if isinstance(entry, dict)]
            for entry in found:
                if isinstance(entry.get("metadata"), dict) and entry["metadata"].get(_TOKEN) == token:
                    return str(entry["id"])
            last = str(found[-1].get("id")) if found else None
            if not page.get("has_more") or last in (None, after):
                return None
            after = last

    async def _object(
        self, request: Awaitable[Response | Trouble], *, id_needed: bool = True
    ) -> dict[str, Any] | Trouble:
        """Read the JSON object of an answer."""
        response = await request
        if isinstance(response, Trouble):
            return response
        try:
            found = json.loads(response.text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or (id_needed and not isinstance(found.get("id"), str)):
            return Trouble(f"HTTP 200 without what was asked for: {self._client.words(response.text)}")
        return found

    async def _persist(self, endpoint: Endpoint, attempt: Callable[[], Awaitable[T | Trouble]]) -> T:
        """Try until it succeeds, or nothing has answered for `max_outage`."""
        section, failures, since = self._client.section, 0, time.monotonic()
        while True:
            try:
                result = await attempt()
            except EndpointError as error:
                result = Trouble(str(error), then="raise")
            if not isinstance(result, Trouble):
                return result
            if result.then != "retry" and not result.asks_for_a_pause:
                raise DnoError(
                    f"{self._client.who}: the Batch API of {endpoint.url} refuses: {result.detail}; "
                    f"set {self._client.place}.batch=false to ask live"
                )
            failures += 1
            waited = time.monotonic() - since
            left = section.max_outage - waited
            if failures >= section.max_tries and left <= 0.0:
                raise Unreachable(
                    f"{self._client.who}: the Batch API of {endpoint.url} has not answered for {waited:.0f} s "
                    f"({result.detail}); start again when it does: its batches go on and are remembered"
                )
            pause = None if result.retry_after is None else min(result.retry_after, max(0.0, left))
            await _pause(wait_seconds(failures, retry_after=pause, jitter=random.random()))


async def _unless_gone(request: Awaitable[T], otherwise: U) -> T | U:
    """Return what is asked for, or something else where there is no such thing."""
    try:
        return await request
    except EndpointError as error:
        if error.status != 404:
            raise
        return otherwise


def _read_line(line: str, *, client: Client) -> tuple[str, Reply | Trouble] | None:
    """Read one line of an output or error file; None if it is none."""
    try:
        entry = json.loads(line)
        key, response, error = entry["custom_id"], entry.get("response"), entry.get("error")
        status = response["status_code"] if response else None
        body = response["body"] if response else error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(key, str):
        return None
    if status == 200:
        reply = completion_reply(body)
        if reply is not None:
            return key, client.without_keys(reply)
        return key, Trouble(f"a line of a batch without a chat completion: {client.words(json.dumps(body))}")
    if not isinstance(status, int) or isinstance(status, bool):
        return key, Trouble(f"a line of a batch failed: {client.words(json.dumps(body))}")
    trouble = client.endpoint.trouble(status, body, headers={})
    # Where no request at all could succeed, the live one says so.
    return key, replace(trouble, then="retry") if trouble.then == "raise" else trouble


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)
