"""The Batch API of a model's endpoints: requests sent, looked after and read, each on its own however often it fails.

A batch is noted in the store before it is made, with a token that stands in its metadata, and again with its id. Where
a run was killed while one was being made, the list of batches says by the token whether it was.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote

from dno_jax.annotation.question import Reply
from dno_jax.annotation.transport.client import EndpointClient
from dno_jax.annotation.transport.completion import completion_reply
from dno_jax.annotation.transport.routes import Unreachable
from dno_jax.endpoint import Endpoint, EndpointError, GaveUp, Response, Trouble, retried
from dno_jax.errors import DnoError

_LOG = logging.getLogger(__name__)

PATH = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
_MAX_FILE_BYTES = 2**30  # of results: 50,000 replies of 20 KB
_TRANSFER_SECONDS = 1800.0  # at least, for a file of the largest size
_TOKEN = "dno_jax"

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


class Batches:
    """The Batch APIs of a model's endpoints, and what is noted of them: a batch stays where it was made."""

    def __init__(self, client: EndpointClient, store: BatchStore):
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
            "endpoint": PATH,
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
            level = logging.INFO if status not in ENDED or status == "completed" else logging.WARNING
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
                endpoint,
                lambda path=path: _unless_gone(endpoint.get(path, timeout=self._timeout, limit=_MAX_FILE_BYTES), None),
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
        who, section = self._client.who, self._client.section

        async def patient() -> T | Trouble:
            try:
                result = await attempt()
            except EndpointError as error:
                return Trouble(str(error), then="raise")
            # However long the pause that is asked for, the batch is worth it.
            return replace(result, then="retry") if isinstance(result, Trouble) and result.asks_for_a_pause else result

        found = await retried(patient, who=who, min_tries=section.max_tries, max_outage=section.max_outage, pause=pause)
        if not isinstance(found, GaveUp):
            return found
        if found.trouble.then != "retry":
            raise DnoError(
                f"{who}: the Batch API of {endpoint.url} refuses: {found.trouble.detail}; "
                f"set {self._client.place}.batch=false to ask live"
            )
        raise Unreachable(
            f"{who}: the Batch API of {endpoint.url} has not answered for {found.seconds:.0f} s "
            f"({found.trouble.detail}); start again when it does: its batches keep running and are remembered"
        )


async def _unless_gone(request: Awaitable[T], otherwise: U) -> T | U:
    """Return what is asked for, or something else where there is no such thing."""
    try:
        return await request
    except EndpointError as error:
        if error.status != 404:
            raise
        return otherwise


def _read_line(line: str, *, client: EndpointClient) -> tuple[str, Reply | Trouble] | None:
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


async def pause(seconds: float) -> None:
    """Wait between tries, and between looks at a batch."""
    await asyncio.sleep(seconds)
