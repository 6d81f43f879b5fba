"""A Hub on this machine: what huggingface_hub asks of one to fetch a repository and to push one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

GATED = "Access to model {} is restricted: visit its page"


@dataclass
class Hub:
    """Repositories by name; what was asked, and with which authorization.

    Attributes:
        repos: name -> revision -> commit; files by commit.
        gated: names that are refused, with a message of the Hub's own.
    """

    repos: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    private: dict[str, bool] = field(default_factory=dict)
    url: str = ""

    def add(self, repo: str, files: dict[str, bytes], *, revision: str = "main") -> str:
        """Make a commit; return it."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.files[commit] = files
        self.repos.setdefault(repo, {})[revision] = commit
        return commit

    def fetched(self) -> set[str]:
        """The files whose contents were asked for."""
        return {
            line.split("/resolve/")[1].split("/", 1)[1]
            for line in self.asked
            if line.startswith("GET ") and "/resolve/" in line
        }

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path}")
        self.tokens.add(request.headers.get("Authorization", ""))
        parts = request.path.strip("/").split("/")
        if request.path == "/api/repos/create":
            asked = await request.json()
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.gated:
                return _refusal(403, "", f"You have no right to create {name}")
            self.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            self.add(name, {}) if name not in self.repos else None
            return web.json_response({"url": f"{self.url}/{name}", "id": name, "name": name})
        if request.path == "/api/validate-yaml":
            return web.json_response({"errors": [], "warnings": []})
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo in self.gated:
            return _refusal(403, "GatedRepo", GATED.format(repo))
        if repo not in self.repos:
            return _refusal(404, "RepoNotFound", "Repository not found")
        rest = parts[4:] if api else parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.repos[repo].get(revision, revision)
        if commit not in self.files:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not api:
            return self._file(request, commit, "/".join(rest[2:]))
        if not rest or rest[0] == "revision":
            names = [{"rfilename": name} for name in self.files[commit]]
            return web.json_response({"id": repo, "modelId": repo, "sha": commit, "siblings": names})
        if rest[0] == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files[commit].items()
            ]
            return web.json_response(rows)
        if rest[0] == "preupload":
            rows = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in (await request.json())["files"]
            ]
            return web.json_response({"files": rows})
        return self._commit(repo, [json.loads(line) for line in (await request.text()).splitlines() if line])

    def _file(self, request: web.Request, commit: str, name: str) -> web.Response:
        if name not in self.files[commit]:
            return _refusal(404, "EntryNotFound", "Entry not found")
        data = self.files[commit][name]
        head = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return web.Response(body=data, headers=head)

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> web.Response:
        files = dict(self.files[self.repos[repo]["main"]])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commit = self.add(repo, files)
        return web.json_response(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"}
        )


def _refusal(status: int, code: str, message: str) -> web.Response:
    return web.json_response(
        {"error": message}, status=status, headers={"X-Error-Code": code, "X-Error-Message": message}
    )


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a Hub from a thread of its own, on a free port."""
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", hub.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield hub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
