"""The Batch API: batches that take their time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dno_jax.fake_judge.completion import error_body
from dno_jax.fake_judge.files import Files, page
from dno_jax.fake_judge.http import Answer, Request, json_answer

_MAX_LINES = 50_000
_WINDOW_SECONDS = 24 * 3600
_LINES_A_TURN = 16  # between two of which the connections are served
_OPEN = ("validating", "in_progress", "finalizing")

Judge = Callable[[dict[str, Any]], tuple[int, Any]]
"""Answers a line's body: HTTP status and the body of the reply."""


@dataclass
class _Batch:
    fields: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    output: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def turn(self, status: str) -> None:
        self.fields["status"] = status
        self.fields[f"{status}_at"] = int(time.time())

    async def wait(self, until: float) -> None:
        """Wait for a moment of the loop's clock, or to be cancelled; give the loop a turn in any case."""
        await asyncio.sleep(0)
        left = until - asyncio.get_running_loop().time()
        if left > 0.0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.cancelled.wait(), left)


class Batches:
    """Files and batches of one endpoint.

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
        self.started = 0

    def handle(self, request: Request) -> Answer | None:
        """Answer what is said to /v1/files and /v1/batches; None if it is something else."""
        match request.method, *request.path.removeprefix("/v1/").split("/"):
            case _, "files", *_:
                return self._files.handle(request)
            case "POST", "batches":
                return self._create(request)
            case "GET", "batches":
                return json_answer(200, page([batch.fields for batch in self._batches.values()], request))
            case "GET", "batches", name if name in self._batches:
                return json_answer(200, self._batches[name].fields)
            case "POST", "batches", name, "cancel" if name in self._batches:
                return self._cancel(self._batches[name])
            case _, "batches", name, *_:
                return json_answer(404, error_body(f"No such Batch object: {name}", param="id"))
        return None

    def _create(self, request: Request) -> Answer:
        try:
            asked = json.loads(request.body)
            file = self._files.by_id[asked["input_file_id"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            return json_answer(400, error_body("no such input file", param="input_file_id"))
        if asked.get("endpoint") != "/v1/chat/completions" or asked.get("completion_window") != "24h":
            return json_answer(400, error_body("expected endpoint /v1/chat/completions and completion_window 24h"))
        now = int(time.time())
        stamps = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        batch = _Batch(
            {
                "id": f"batch_{len(self._batches) + 1:06d}",
                "object": "batch",
                "endpoint": asked["endpoint"],
                "errors": None,
                "input_file_id": file.file_id,
                "completion_window": "24h",
                "status": "validating",
                "output_file_id": None,
                "error_file_id": None,
                "created_at": now,
                "expires_at": now + _WINDOW_SECONDS,
                **{f"{stamp}_at": None for stamp in stamps},
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "metadata": asked.get("metadata"),
            }
        )
        self._batches[batch.fields["id"]] = batch
        self.started += 1
        answer = json_answer(200, batch.fields)
        task = asyncio.get_running_loop().create_task(self._run(batch, file.content))
        self._work.add(task)
        task.add_done_callback(self._end)
        return answer

    def _end(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)

    def _cancel(self, batch: _Batch) -> Answer:
        if batch.fields["status"] not in _OPEN:
            return json_answer(409, error_body(f"Cannot cancel a batch with status '{batch.fields['status']}'."))
        batch.turn("cancelling")
        batch.cancelled.set()
        return json_answer(200, batch.fields)

    async def _run(self, batch: _Batch, content: bytes) -> None:
        start = asyncio.get_running_loop().time()
        await asyncio.sleep(0)  # the answer that made it says "validating"
        batch.lines, problems = _read_lines(content)
        if problems:
            batch.fields["errors"] = {"object": "list", "data": problems}
            batch.turn("failed")
            return
        counts = batch.fields["request_counts"]
        counts["total"] = len(batch.lines)
        if not batch.cancelled.is_set():
            batch.turn("in_progress")
        late = False
        for number, line in enumerate(batch.lines):
            if number % _LINES_A_TURN == 0:
                await batch.wait(start + self._delay * number / len(batch.lines))
            if batch.cancelled.is_set():
                _leave_out(batch, line, "batch_cancelled", "This request was not executed: the batch was cancelled.")
            elif self._expires(line["body"]):
                late = True
                _leave_out(
                    batch,
                    line,
                    "batch_expired",
                    "This request could not be executed before the completion window expired.",
                )
            else:
                status, body = self._judge(line["body"])
                _report(batch, line, status, body)
        if not batch.cancelled.is_set():
            batch.turn("finalizing")
            await batch.wait(start + self._delay)
        for name, rows in (("output", batch.output), ("error", batch.errors)):
            if rows:
                text = "".join(json.dumps(row) + "\n" for row in reversed(rows))  # the API promises no order
                file = self._files.keep(f"{batch.fields['id']}_{name}.jsonl", "batch_output", text.encode())
                batch.fields[f"{name}_file_id"] = file.file_id
        if batch.cancelled.is_set():
            batch.turn("cancelled")
        else:
            batch.turn("expired" if late else "completed")


def _report(batch: _Batch, line: dict[str, Any], status: int, body: Any) -> None:
    row = _row(batch, line)
    row["response"] = {"status_code": status, "request_id": row["id"], "body": body}
    good = status == 200
    (batch.output if good else batch.errors).append(row)
    batch.fields["request_counts"]["completed" if good else "failed"] += 1


def _leave_out(batch: _Batch, line: dict[str, Any], code: str, message: str) -> None:
    batch.errors.append(_row(batch, line) | {"error": {"code": code, "message": message}})
    batch.fields["request_counts"]["failed"] += 1


def _row(batch: _Batch, line: dict[str, Any]) -> dict[str, Any]:
    number = len(batch.output) + len(batch.errors)
    row_id = f"batch_req_{batch.fields['id'].removeprefix('batch_')}_{number}"
    return {"id": row_id, "custom_id": line["custom_id"], "response": None, "error": None}


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
