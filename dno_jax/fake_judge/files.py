"""The files of the Batch API: what goes in and what comes out."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from dno_jax.fake_judge.checks import ApiError

_FIELD = re.compile(r'; *(name|filename)="([^"]*)"')


@dataclass(frozen=True)
class File:
    """A file's bytes, and what the API tells of it."""

    content: bytes
    fields: dict[str, Any]


class Files:
    """The files of one endpoint, by id."""

    def __init__(self) -> None:
        self.by_id: dict[str, File] = {}
        self._made = 0

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/files", self._upload),
            web.get("/v1/files", self._list),
            web.get("/v1/files/{id}", self._show),
            web.get("/v1/files/{id}/content", self._content),
            web.delete("/v1/files/{id}", self._delete),
        ]

    def keep(self, filename: str, purpose: str, content: bytes) -> dict[str, Any]:
        """Make a file; return what the API tells of it."""
        self._made += 1
        fields = {
            "id": f"file-{self._made:06d}",
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "expires_at": None,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
        }
        self.by_id[fields["id"]] = File(content, fields)
        return fields

    async def _upload(self, request: web.Request) -> web.Response:
        form = _read_form(request.headers.get("Content-Type", ""), await request.read())
        name, content = form.get("file", ("", b""))
        if not name or form.get("purpose") != ("", b"batch"):
            raise ApiError(400, "a file with a name and purpose=batch are needed", param="file")
        return web.json_response(self.keep(name, "batch", content))

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response(page([file.fields for file in self.by_id.values()], request))

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response(self._named(request).fields)

    async def _content(self, request: web.Request) -> web.Response:
        return web.Response(body=self._named(request).content, content_type="application/octet-stream")

    async def _delete(self, request: web.Request) -> web.Response:
        name = self._named(request).fields["id"]
        del self.by_id[name]
        return web.json_response({"id": name, "object": "file", "deleted": True})

    def _named(self, request: web.Request) -> File:
        name = request.match_info["id"]
        if name not in self.by_id:
            raise ApiError(404, f"No such File object: {name}", param="id")
        return self.by_id[name]


def page(rows: Sequence[dict[str, Any]], request: web.Request) -> dict[str, Any]:
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


def _read_form(content_type: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """Name -> (file name, content) of a multipart form.

    Not read by aiohttp, whose reader calls what it has deprecated and silences the warning for a moment: where warnings
    are errors, another thread may end that moment too early.
    """
    boundary = content_type.partition("boundary=")[2].strip('"').encode()
    found = {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        fields = dict(_FIELD.findall(head.decode("utf-8", "replace")))
        found[fields.get("name", "")] = (fields.get("filename", ""), content.removesuffix(b"\r\n"))
    return found
