"""The files of the Batch API: what goes in and what comes out."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from dno_jax.fake_judge.completion import error_body
from dno_jax.fake_judge.http import Answer, Request, json_answer

_FIELD = re.compile(r'; *(name|filename)="([^"]*)"')


@dataclass
class File:
    file_id: str
    filename: str
    purpose: str
    content: bytes
    created_at: int

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created_at,
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Files:
    """The files of one endpoint, by id."""

    def __init__(self) -> None:
        self.by_id: dict[str, File] = {}
        self._made = 0

    def keep(self, filename: str, purpose: str, content: bytes) -> File:
        self._made += 1
        file = File(f"file-{self._made:06d}", filename, purpose, content, int(time.time()))
        self.by_id[file.file_id] = file
        return file

    def handle(self, request: Request) -> Answer | None:
        """Answer what is said to /v1/files; None if it is something else."""
        match request.method, *request.path.removeprefix("/v1/files").split("/")[1:]:
            case ("POST",):
                return self._upload(request)
            case ("GET",):
                return json_answer(200, page([file.as_json() for file in self.by_id.values()], request))
            case _, name, *_ if name not in self.by_id:
                return json_answer(404, error_body(f"No such File object: {name}", param="id"))
            case "GET", name:
                return json_answer(200, self.by_id[name].as_json())
            case "GET", name, "content":
                return Answer(200, self.by_id[name].content, content_type="application/octet-stream")
            case "DELETE", name:
                del self.by_id[name]
                return json_answer(200, {"id": name, "object": "file", "deleted": True})
        return None

    def _upload(self, request: Request) -> Answer:
        parts = _multipart(request)
        name, content = parts.get("file", ("", b""))
        purpose = parts.get("purpose", ("", b""))[1].decode("utf-8", "replace")
        if not name or purpose != "batch":
            return json_answer(400, error_body("a file with a name and purpose=batch are needed", param="file"))
        return json_answer(200, self.keep(name, purpose, content).as_json())


def page(rows: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """The newest first, `limit` of those that come after the id `after`."""
    rows = rows[::-1]
    ids = [row["id"] for row in rows]
    after = request.query.get("after")
    start = ids.index(after) + 1 if after in ids else 0
    limit = int(asked) if (asked := request.query.get("limit", "20")).isdecimal() else 20
    shown = rows[start : start + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + limit < len(rows),
    }


def _multipart(request: Request) -> dict[str, tuple[str, bytes]]:
    """Name -> (file name, content) of a form."""
    _, _, boundary = request.headers.get("content-type", "").partition("boundary=")
    found = {}
    for part in request.body.split(b"--" + boundary.strip('"').encode())[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        fields = dict(_FIELD.findall(head.decode("utf-8", "replace")))
        found[fields.get("name", "")] = (fields.get("filename", ""), content.removesuffix(b"\r\n"))
    return found
