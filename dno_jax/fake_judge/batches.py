"""The Batch API: batches that take their time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from dno_jax.fake_judge.checks import ApiError
from dno_jax.fake_judge.files import Files, page

_MAX_LINES = 50_000
_WINDOW_SECONDS = 24 * 3600
_LINES_PER_TURN = 16  # between two of which the connections are served
_OPEN = ("validating", "in_progress", "finalizing")
_STAMPS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
_CANCELLED = {"code": "batch_cancelled", "message": "This request was not executed: the batch was cancelled."}
_EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}

Judge = Callable[[dict[str, Any]], tuple[int, Any]]
"""Answers a line's body: HTTP status and the body of the reply."""


@dataclass
class _Batch:
    """A batch as the API tells it (`fields`), its rows so far, and whether it was cancelled."""

    fields: dict[str, Any]
    output: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def turn(self, status: str) -> None:
        self.fields["status"] = status
        self.fields[f"{status}_at"] = int(time.time())

    def add(self, line: dict[str, Any], *, status: int = 0, body: Any = None, error: Any = None) -> None:
        """Take down what became of a line: a response, or an error where there is none."""
        row_id = f"{self.fields['id'].replace('batch_', 'batch_req_')}_{len(self.output) + len(self.errors)}"
        response = {"status_code": status, "request_id": row_id, "body": body} if error is None else None
        good = status == 200
        (self.output if good else self.errors).append(
            {"id": row_id, "custom_id": line["custom_id"], "response": response, "error": error}
        )
        self.fields["request_counts"]["completed" if good else "failed"] += 1

    async def wait(self, until: float) -> None:
        """Wait for a moment of the loop's clock, or to be cancelled; give the loop a turn in any case."""
        await asyncio.sleep(0)
        left = until - asyncio.get_running_loop().time()
        if left > 0.0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.cancelled.wait(), left)


class Batches:
    """Batches and their files, of one endpoint.

    Args:
        judge: answers a line.
        expires: whether the window closes before a line's turn.
        delay: seconds a batch takes from its creation.
        errors: what went wrong here.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        expires: Callable[[dict[str, Any]], bool],
        delay: float,
        errors: list[BaseException],
    ):
        self._judge = judge
        self._expires = expires
        self._delay = delay
        self._errors = errors
        self._files = Files()
        self._batches: dict[str, _Batch] = {}
        self._work: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            *self._files.routes(),
            web.post("/v1/batches", self._create),
            web.get("/v1/batches", self._list),
            web.get("/v1/batches/{id}", self._show),
            web.post("/v1/batches/{id}/cancel", self._cancel),
        ]

    @property
    def started(self) -> int:
        return len(self._batches)

    async def _create(self, request: web.Request) -> web.Response:
        try:
            asked = json.loads(await request.read())
            content = self._files.by_id[asked["input_file_id"]].content
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ApiError(400, "no such input file", param="input_file_id") from None
        if asked.get("endpoint") != "/v1/chat/completions" or asked.get("completion_window") != "24h":
            raise ApiError(400, "expected endpoint /v1/chat/completions and completion_window 24h")
        now = int(time.time())
        batch = _Batch(
            {
                "id": f"batch_{len(self._batches) + 1:06d}",
                "object": "batch",
                "endpoint": asked["endpoint"],
                "errors": None,
                "input_file_id": asked["input_file_id"],
                "completion_window": "24h",
                "status": "validating",
                "output_file_id": None,
                "error_file_id": None,
                "created_at": now,
                "expires_at": now + _WINDOW_SECONDS,
                **{f"{stamp}_at": None for stamp in _STAMPS},
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "metadata": asked.get("metadata"),
            }
        )
        self._batches[batch.fields["id"]] = batch
        task = asyncio.create_task(self._run(batch, content))  # not before this answer, which says "validating"
        self._work.add(task)
        task.add_done_callback(self._end)
        return web.json_response(batch.fields)

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response(page([batch.fields for batch in self._batches.values()], request))

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response(self._named(request).fields)

    async def _cancel(self, request: web.Request) -> web.Response:
        batch = self._named(request)
        if batch.fields["status"] not in _OPEN:
            raise ApiError(409, f"Cannot cancel a batch with status '{batch.fields['status']}'.")
        batch.turn("cancelling")
        batch.cancelled.set()
        return web.json_response(batch.fields)

    def _named(self, request: web.Request) -> _Batch:
        name = request.match_info["id"]
        if name not in self._batches:
            raise ApiError(404, f"No such Batch object: {name}", param="id")
        return self._batches[name]

    def _end(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)

    async def _run(self, batch: _Batch, content: bytes) -> None:
        start = asyncio.get_running_loop().time()
        lines, problems = _read_lines(content)
        if problems:
            batch.fields["errors"] = {"object": "list", "data": problems}
            batch.turn("failed")
            return
        batch.fields["request_counts"]["total"] = len(lines)
        batch.turn("in_progress")
        late = False
        for number, line in enumerate(lines):
            if number % _LINES_PER_TURN == 0:
                await batch.wait(start + self._delay * number / len(lines))
            if batch.cancelled.is_set():
                batch.add(line, error=_CANCELLED)
            elif self._expires(line["body"]):
                late = True
                batch.add(line, error=_EXPIRED)
            else:
                status, body = self._judge(line["body"])
                batch.add(line, status=status, body=body)
        if not batch.cancelled.is_set():
            batch.turn("finalizing")
            await batch.wait(start + self._delay)
        for name, rows in (("output", batch.output), ("error", batch.errors)):
            if rows:
                text = "".join(json.dumps(row) + "\n" for row in reversed(rows))  # the API promises no order
                kept = self._files.keep(f"{batch.fields['id']}_{name}.jsonl", "batch_output", text.encode())
                batch.fields[f"{name}_file_id"] = kept["id"]
        batch.turn("cancelled" if batch.cancelled.is_set() else "expired" if late else "completed")


def _read_lines(content: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The requests of an input file, and what is wrong with it."""
    lines: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    seen: set[str] = set()

    def blame(code: str, message: str, number: int | None = None, param: str | None = None) -> None:
        problems.append({"code": code, "line": number, "message": message, "param": param})

    texts = content.splitlines()
    if not any(text.strip() for text in texts):
        blame("empty_file", "The input file is empty.")
    if len(texts) > _MAX_LINES:
        blame("too_many_tasks", f"The batch input file contains more than the {_MAX_LINES} requests allowed.")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            custom_id, method, url, model = line["custom_id"], line["method"], line["url"], line["body"]["model"]
        except (ValueError, LookupError, TypeError, RecursionError):
            blame("invalid_json_line", "This line is not parseable as a request.", number)
            continue
        if method != "POST" or url != "/v1/chat/completions":
            blame("invalid_url", "The URL and method do not match the endpoint of the batch.", number, "url")
        if custom_id in seen:
            blame("duplicate_custom_id", "The custom_id for this request is a duplicate.", number, "custom_id")
        if lines and model != lines[0]["body"]["model"]:
            blame("mismatched_model", "All requests of a batch must be for one model.", number, "body.model")
        seen.add(custom_id)
        lines.append(line)
    return lines, problems
