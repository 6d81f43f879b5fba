"""A headless Chromium, driven through its DevTools protocol: what a page logs, asks for and shows."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

READY = "document.documentElement?.dataset.samples === 'shown' && document.documentElement.dataset.plots === 'drawn'"
DRAWN = "document.documentElement?.dataset.plots === 'drawn'"
SHOWN = "document.documentElement?.dataset.samples === 'shown'"
_KEYS = {"Escape": ("Escape", 27), "Tab": ("Tab", 9), "Enter": ("Enter", 13), "ArrowDown": ("ArrowDown", 40),
         "ArrowUp": ("ArrowUp", 38), "End": ("End", 35), "Home": ("Home", 36)}  # fmt: skip


def chromium() -> str | None:
    """Debian's browser, where it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Tab:
    """One page.

    Attributes:
        events: what the browser told of it meanwhile.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._number, self._session = socket, 0, ""
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        while (found := await self._socket.receive_json(timeout=120)).get("id") != self._number:
            self.events.append(found)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return found["result"]

    async def attach(self) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        self._session = (await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True))[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")

    async def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Take the size of a window, and a colour scheme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def open(self, path: Path, *, until: str, patience: float = 120.0) -> float:
        """Open a file; return the seconds until something holds in it."""
        start = time.perf_counter()
        await self.call("Page.navigate", url=path.resolve().as_uri())
        while not await self.evaluate(until):
            if time.perf_counter() - start > patience:
                raise TimeoutError(f"{path}: not {until} after {patience:.0f} s; {self.logged}")
            await asyncio.sleep(0.02)
        return time.perf_counter() - start

    async def evaluate(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    async def press(self, *keys: str) -> None:
        """Press keys, one after the other; a word of several letters is typed."""
        for key in keys:
            name, code = _KEYS.get(key, ("", 0))
            if name:
                for kind in ("rawKeyDown", "keyUp"):
                    await self.call(
                        "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code
                    )
                continue
            for char in key:
                await self.call("Input.dispatchKeyEvent", type="keyDown", key=char, text=char)
                await self.call("Input.dispatchKeyEvent", type="keyUp", key=char)

    async def picture(self, path: Path) -> None:
        """Write a screenshot of all of the page."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16_000), "scale": 1}
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    @property
    def logged(self) -> list[str]:
        """Errors, warnings and words of the console."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"])[:500] for event in self.events if event.get("method") in kinds]

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for."""
        found = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in found]


@contextlib.asynccontextmanager
async def opened(program: str) -> AsyncIterator[Tab]:
    """Start a browser with a profile of its own, and end it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        if os.geteuid() == 0:
            command.insert(1, "--no-sandbox")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = Path(profile, "DevToolsActivePort")
            for _ in range(1200):
                if port.exists() and len(found := port.read_text().split("\n")) > 1:
                    break
                await asyncio.sleep(0.1)
            else:
                raise TimeoutError("Chromium did not start")
            address = f"ws://127.0.0.1:{found[0]}{found[1]}"
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
                tab = Tab(socket)
                await tab.attach()
                yield tab
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
