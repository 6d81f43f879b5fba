"""What goes wrong on the way: answers that are lost, cut or never end, and keys told where they should not be."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from contextlib import suppress

from aiohttp import web

ENDINGS = ("close", "reset", "truncated")

_TRICKLE_SECONDS = 0.02
_RESET = struct.pack("ii", 1, 0)  # without lingering, what is closed is reset


async def trickle(request: web.Request) -> None:
    """Send a byte now and then until the client has gone."""
    stream = web.StreamResponse(headers={"Content-Type": "application/json"})
    stream.content_length = 10**6  # never reached
    with suppress(ConnectionError):
        await stream.prepare(request)
        while True:
            await stream.write(b" ")
            await asyncio.sleep(_TRICKLE_SECONDS)


class Cut(Exception):
    """A response that does not arrive whole, and which of the endings it has."""

    def __init__(self, response: web.Response, ending: str):
        super().__init__(ending)
        self.response = response
        self.ending = ending


async def cut_off(request: web.Request, response: web.Response, ending: str) -> None:
    """Close or reset the connection in place of sending the response, or after half of its body ("truncated")."""
    if (transport := request.transport) is None:
        return
    if ending == "truncated" and isinstance(response.body, bytes):
        response.headers["Content-Length"] = str(len(response.body))
        response.body = response.body[: len(response.body) // 2]
        with suppress(ConnectionError):
            await response.prepare(request)
            await response.write_eof()
    if ending == "reset":
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()
    else:
        transport.close()


def tell_key(response: web.Response, key: str) -> None:
    """Have a response tell a key wherever an endpoint may: in a header, an error, the model's name, what it says."""
    response.headers["x-key"] = key
    body = response.body if isinstance(response.body, bytes) else b""
    try:
        content = json.loads(body)
    except ValueError:
        response.body = body + key.encode()
        return
    if content.get("error"):
        content["error"]["message"] += f" (a request with the key {key})"
    if "model" in content:
        content["model"] += f"-{key}"
    for choice in content.get("choices", ()):
        for name, text in choice["message"].items():
            if text and " " in text:  # a sentence, or a verdict with its reasons
                told = text.replace("as planted", f"as planted by {key}")
                choice["message"][name] = told if told != text else f"{text} ({key})"
    response.body = json.dumps(content).encode()
