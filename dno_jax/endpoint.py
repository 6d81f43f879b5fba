"""The one client of OpenAI-compatible endpoints: keys protected, pauses polite, failures classified.

Retries are `retried`'s, not the client's, because an answer that cannot be used is retried as well, and all count.

The key is read from the environment when the client is made. What others wrote (errors, replies) is scrubbed of it
before it is raised, logged or stored. Errors are raised outside `except` blocks, so that they do not carry the client's
exception, which holds the request's headers, as their context.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from dno_jax.display import hide_keys, printable
from dno_jax.errors import DnoError

if TYPE_CHECKING:
    import openai

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
# An endpoint that wants a longer pause is not waited for while accelerators idle.
MAX_RETRY_AFTER_SECONDS = 300.0

# How long an idle connection is kept: less than the 5 s after which many servers close it, maybe below a request.
_KEPT_SECONDS = 4.0
_RETRIED = {408, 409, 425, 429}
# What stands for a key at servers without any (in lower case): to scrub these would garble words.
_PLACEHOLDERS = {"none", "null", "empty", "dummy", "x", "xxx", "ollama", "lm-studio", "no-key", "not-needed"}
_SHORTEST_KEY = 4  # a shorter one stands in every other word


class EndpointError(DnoError):
    """No request of this configuration can succeed: the key, the model, the path or the account is refused."""

    def __init__(self, message: str, *, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Response:
    """The answer to a request that succeeded."""

    text: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # as they came: they may hold a key


@dataclass(frozen=True)
class Trouble:
    """A try without a reply, and what follows from it: another try, none for this request, or none for any.

    Attributes:
        detail: one line for people, free of keys.
        unreachable: nothing was sent, for there was no connection.
        retry_after: seconds the endpoint asks to be left alone; a try before that is wasted.
        status: of the HTTP response, None if none came.
        parameter: the request's field that the endpoint names as the culprit.
        headers: of the response, as they came: they may hold a key.
    """

    detail: str
    then: Literal["retry", "give up", "refused", "raise"] = "retry"
    unreachable: bool = False
    retry_after: float | None = None
    status: int | None = None
    parameter: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def asks_for_a_pause(self) -> bool:
        """Whether it speaks of the endpoint's limits, and not of the request."""
        return self.status == 429 or (self.retry_after is not None and (self.status or 0) >= 500)


@dataclass(frozen=True)
class GaveUp:
    """Why no more tries were made.

    Attributes:
        trouble: of the last one.
        tries: that were made.
        seconds: that they took, pauses included.
    """

    trouble: Trouble
    tries: int
    seconds: float


async def retried(
    attempt: Callable[[], Awaitable[T | Trouble]],
    *,
    who: str,
    max_tries: float = math.inf,
    min_tries: int = 1,
    max_outage: float = math.inf,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T | GaveUp:
    """Try until it succeeds, no further try would help, or enough were made; pauses between tries grow.

    Args:
        attempt: one try; a `Trouble` that says "retry" is worth another, any other ends it. What it raises is raised.
        who: as the log names it.
        max_tries: no more are made.
        min_tries: so many are made, whatever the time.
        max_outage: seconds after which no further one is made; a pause ends by then, whatever Retry-After says.
        pause: waits, or raises what it likes where nothing more is to be sent.
    """
    began, tries = time.monotonic(), 0
    while isinstance(result := await attempt(), Trouble):
        tries += 1
        seconds = time.monotonic() - began
        left = max_outage - seconds
        if result.then != "retry" or tries >= max_tries or (tries >= min_tries and left <= 0.0):
            return GaveUp(result, tries, seconds)
        limit = f" of {max_tries}" if max_tries < math.inf else ""
        _LOG.info("%s: try %d%s: %s", who, tries, limit, result.detail)
        wanted = None if result.retry_after is None else min(result.retry_after, max(0.0, left))
        wait = wait_seconds(tries, retry_after=wanted, jitter=random.random())
        await pause(min(wait, left) if left > 0.0 else wait)
    return result


class Endpoint:
    """A server, by the name that messages give it.

    Args:
        who: as in "the judge 'gpt' at http://... answered HTTP 500".
        place: the section of the configuration that remedies name.
        address: the section that names URL and key, where it is another.
        url: of the API; it usually ends in /v1.
        api_key_env: environment variable of the key; None for no key.
        timeout: seconds a request may take, all of it.

    Raises:
        DnoError: a missing key, an unusable URL.
    """

    def __init__(
        self, *, who: str, place: str, url: str, api_key_env: str | None, timeout: float, address: str | None = None
    ):
        self.who = who
        self.place = place
        self.address = address or place
        self.url = _checked_url(url, place=self.address)
        self._api_key_env = api_key_env
        self._timeout = timeout
        self._key = _read_key(api_key_env, url=self.url, place=self.address)
        is_secret = api_key_env is not None and self._key.lower() not in _PLACEHOLDERS
        self._spelt = _spellings(self._key) if is_secret else None
        self._client = self._open()

    async def post(
        self, path: str, body: Mapping[str, Any], *, file: tuple[str, bytes] | None = None, timeout: float | None = None
    ) -> Response | Trouble:
        """Send one request, and return its answer as it came: the client's own models cost as much as the request.

        Args:
            path: after the URL, as in "/chat/completions".
            body: sent as JSON; as a form where there is a file.
            file: name and contents.
            timeout: seconds, where another than the endpoint's is due.

        Raises:
            EndpointError: no request of this configuration can succeed.
        """
        options = {} if file is None else {"headers": {"Content-Type": "multipart/form-data"}}
        files = None if file is None else [("file", file)]
        return await self._answer(self._client.post, path, timeout=timeout, options=options, body=body, files=files)

    async def get(
        self, path: str, *, query: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> Response | Trouble:
        """Fetch what lies at a path; `timeout` and errors as in `post`."""
        return await self._answer(self._client.get, path, timeout=timeout, options={"params": dict(query or {})})

    async def _answer(
        self, send: Callable[..., Awaitable[Any]], path: str, *, timeout: float | None, options: Any, **sent: Any
    ) -> Response | Trouble:
        import openai

        if timeout is not None:
            options = options | {"timeout": timeout}
        timeout = timeout or self._timeout
        try:
            # The client's own timeout counts silence only; a server that trickles would hold the slot for ever.
            async with asyncio.timeout(timeout):
                found = await send(path, cast_to=openai.HttpxBinaryResponseContent, options=options, **sent)
                # JSON is UTF-8, whatever the header says: Python has charsets that are none of text.
                return Response(found.response.content.decode("utf-8", "replace"), found.response.headers)
        except openai.APIStatusError as error:
            trouble = self.trouble(error.status_code, error.body or error.message, headers=error.response.headers)
        except openai.APIConnectionError as error:
            trouble = _broken_connection(error, timeout=timeout)
        except TimeoutError:
            trouble = Trouble(f"no answer within {timeout:g} s")
        except Exception as error:  # the client's own, and what it makes of a body that is not what its headers say
            trouble = Trouble(f"the client failed: {type(error).__name__}")
        if trouble.then == "raise":
            raise EndpointError(trouble.detail, status=trouble.status or 0)
        return trouble

    async def close(self) -> None:
        await self._client.close()

    def without_key(self, text: str) -> str:
        """Take the key out of a text that is to be kept as it is."""
        if self._spelt is None:
            return text
        text = text.replace(self._key, "[key]")
        return self._spelt.sub("[key]", text) if "\\" in text or "%" in text else text

    def _open(self) -> openai.AsyncOpenAI:
        """Make the client. It sends by aiohttp: httpx's own pool looks at all its connections for each request.

        With 64 in flight a judgement took 1.9 ms of CPU with it and 2.6 with httpcore2 (docs/benchmarks.md).
        """
        import httpx2
        import openai

        timeout = openai.Timeout(self._timeout, connect=min(10.0, self._timeout / 2))
        # Zero is no limit: how many are in flight is counted by who sends.
        limits = httpx2.Limits(max_connections=0, keepalive_expiry=_KEPT_SECONDS)
        http = openai.DefaultAioHttpClient(limits=limits, timeout=timeout)
        return openai.AsyncOpenAI(
            api_key=self._key, base_url=self.url, max_retries=0, timeout=timeout, http_client=http
        )

    def scrub(self, text: str) -> str:
        """Take the key, and what looks like one, out of a text that others wrote; halves of characters, too.

        JSON may spell a lone surrogate, which no file and no database takes.
        """
        return hide_keys(self.without_key(text.encode(errors="replace").decode()))

    def words(self, text: str) -> str:
        """Make others' words fit for one line; scrubbed first, since a key cut in two would not be found."""
        line = printable(" ".join(self.scrub(text).split()))
        return line if len(line) <= 300 else line[:297] + "..."

    def trouble(self, status: int, body: object, *, headers: Mapping[str, str]) -> Trouble:
        """Say what follows from an answer that is none.

        Args:
            status: of HTTP.
            body: of the response, as JSON or as it came; an "error" object's contents or the whole.
        """
        fault = body if isinstance(body, dict) else {}
        if isinstance(fault.get("error"), dict):
            fault = fault["error"]
        said = f"HTTP {status}: {self.words(str(fault.get('message') or body))}"
        where = f"{self.who} at {self.url} answered {said}"
        code, parameter = fault.get("code"), fault.get("param")

        def found(detail: str, then: Literal["retry", "give up", "refused", "raise"]) -> Trouble:
            named = self.words(parameter) if isinstance(parameter, str) else None
            pause = parse_retry_after(headers, now=time.time())
            return Trouble(detail, then, status=status, parameter=named, headers=headers, retry_after=pause)

        if status == 403 and _was_flagged(fault.get("metadata")):
            return found(said, "refused")
        if status in (401, 403):
            remedy = f"name the environment variable of its key in {self.address}.api_key_env"
            if self._api_key_env is not None:
                remedy = f"put a key that may use this model into the environment variable {self._api_key_env}"
            return found(f"{where}; {remedy}", "raise")
        if status == 404:
            return found(f"{where}; fix {self.place}.model, or base_url (it usually ends in /v1)", "raise")
        if status == 402 or code == "insufficient_quota":
            remedy = "the account is used up: fill it, then start again; what is already paid for is kept"
            return found(f"{where}; {remedy}", "raise")
        if status == 400 and code in ("content_filter", "content_policy_violation"):
            return found(said, "refused")
        if status < 500 and status not in _RETRIED:
            return found(said, "give up")
        trouble = found(said, "retry")
        if trouble.retry_after is not None and trouble.retry_after > MAX_RETRY_AFTER_SECONDS:
            return found(f"{said} (asks to come back in {trouble.retry_after:.0f} s)", "give up")
        return trouble


def wait_seconds(failures: int, *, retry_after: float | None, jitter: float) -> float:
    """Return the pause after the n-th failure in a row, in seconds.

    Args:
        failures: n, at least 1.
        retry_after: the least pause the endpoint asked for, or None.
        jitter: uniform in [0, 1).
    """
    step = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16))
    if retry_after is None:
        return step * (0.5 + 0.5 * jitter)
    return retry_after + BACKOFF_SECONDS * jitter  # never before the time asked for, nor all at that very time


def parse_retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Read Retry-After (seconds or an HTTP date) or retry-after-ms; None if absent or senseless."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000.0
    value = headers.get("retry-after")
    if value is None or (seconds := _number(value)) is not None:
        return seconds if value is not None else None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _broken_connection(error: BaseException, *, timeout: float) -> Trouble:
    """Tell a connection that was never made, over which nothing was sent, from one that broke or fell silent.

    The classes between aiohttp's errors and ours do not: a server that hangs up is a ConnectTimeout to them.
    """
    import aiohttp

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, aiohttp.ClientError):
        cause = cause.__cause__
    unmade = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError)
    name = type(cause or error.__cause__).__name__
    if isinstance(cause, unmade):
        return Trouble(f"no connection ({name})", unreachable=True)
    silent = isinstance(cause, aiohttp.ServerTimeoutError)
    return Trouble(f"no answer within {timeout:g} s" if silent else f"the connection broke ({name})")


def _spellings(key: str) -> re.Pattern[str]:
    """Match a key with any of its characters as JSON or a URL may spell them: \\/, \\u002f, %2F."""
    return re.compile("".join(
        rf"(?:{re.escape(char)}|\\{re.escape(char)}|\\u(?i:{ord(char):04x})|%(?i:{ord(char):02x}))" for char in key
    ))  # fmt: skip


def _was_flagged(metadata: object) -> bool:
    """Whether this is what OpenRouter says of an input that the moderation of a model's provider objects to."""
    return isinstance(metadata, dict) and bool(metadata.get("reasons") or metadata.get("flagged_input"))


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\s*\d{1,9}(\.\d{0,9})?\s*", text) else None


def _read_key(api_key_env: str | None, *, url: str, place: str) -> str:
    if api_key_env is None:
        return "none"
    # A trailing newline, usual in mounted secrets, makes an illegal header, and the error would quote the key.
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise DnoError(
            f"{place}: the environment variable {api_key_env} is not set; put the key of "
            f"{url} there, or set {place}.api_key_env=null for a server without keys"
        )
    if len(key) < _SHORTEST_KEY and key.lower() not in _PLACEHOLDERS:
        raise DnoError(
            f"{place}: the variable {api_key_env} holds {len(key)} characters, too few to be kept out of logs; set "
            f"{place}.api_key_env=null for a server without keys, or a key of {_SHORTEST_KEY} characters or more"
        )
    if not (key.isascii() and key.isprintable()):
        raise DnoError(f"{place}: the variable {api_key_env} holds no key: it has odd characters")
    return key


def _checked_url(url: str, *, place: str) -> str:
    """Return the URL if it can be used and shown: it stands in config.yaml, in messages and in logs."""
    try:
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        raise DnoError(f"{place}.base_url: not a URL; expected http(s)://host[:port]/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        bare = shown if parts.scheme and parts.hostname else _without_secrets(url)
        raise DnoError(f"{place}.base_url: {bare!r}: expected http(s)://host[:port]/path")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise DnoError(
            f"{place}.base_url: {shown} with a user, a query or a fragment; give the bare URL, and the key "
            f"in the environment variable that {place}.api_key_env names"
        )
    return url


def _without_secrets(text: str) -> str:
    """Leave out what may be a user, a password or a query of a text that is no URL, whichever parts it has."""
    user, _, rest = text.rpartition("@")
    return "..." if re.search(r"[?#]", user) else re.split(r"[?#]", rest)[0]
