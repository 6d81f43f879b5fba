"""The one client of OpenAI-compatible endpoints: keys protected, pauses polite, failures classified.

Retries are `retried`'s, not the client's, because an answer that cannot be used is retried as well, and all count.

The key is read from the environment when the client is made. What others wrote (errors, replies) is scrubbed of it
before it is raised, logged or stored. Errors are raised outside `except` blocks, so that they do not carry the client's
exception, which holds the request's headers, as their context.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dno_jax.display import hide_keys, printable
from dno_jax.faults import EndpointError, Fault, Then, Trouble, parse_retry_after
from dno_jax.keys import Secrets, checked_url, read_headers, read_key

if TYPE_CHECKING:
    import httpx2
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
MAX_REPLY_BYTES = 16 * 2**20  # decompressed; the longest completions with log-probabilities are some megabytes
_SHOWN = 20_000  # characters of what others wrote, of which 300 are shown: they may have written megabytes

_LIMIT: contextvars.ContextVar[int] = contextvars.ContextVar("bytes of a response")


@dataclass(frozen=True)
class Response:
    """The answer to a request that succeeded."""

    text: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # as they came: they may hold a key


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
    is_free: Callable[[Trouble], bool] = lambda trouble: False,
) -> T | GaveUp:
    """Try until it succeeds, no further try would help, or enough were made; pauses between tries grow.

    Args:
        attempt: one try; a `Trouble` that says "retry" is worth another, any other ends it. What it raises is raised.
        who: as the log names it.
        max_tries: no more are made.
        min_tries: so many are made, whatever the time.
        max_outage: seconds after which no further one is made; a pause ends by then, whatever Retry-After says.
        pause: waits, or raises what it likes where nothing more is to be sent.
        is_free: whether a try does not count as one of `max_tries`.
    """
    began, tries, free = time.monotonic(), 0, 0
    while isinstance(result := await attempt(), Trouble):
        free += is_free(result)
        tries += 1
        seconds = time.monotonic() - began
        left = max_outage - seconds
        if result.then != "retry" or tries - free >= max_tries or (tries >= min_tries and left <= 0.0):
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

        headers, query: that are sent with every request; $NAME in a header is what that variable holds.

    Raises:
        DnoError: a missing key, an unusable URL.
    """

    def __init__(
        self,
        *,
        who: str,
        place: str,
        url: str,
        api_key_env: str | None,
        timeout: float,
        address: str | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ):
        self.who = who
        self.place = place
        self.address = address or place
        self.url, own_query = checked_url(url, place=self.address)
        self._api_key_env = api_key_env
        self._timeout = timeout
        self._secrets = Secrets()
        self._omitted: dict[str, Any] = {}
        self._key = read_key(api_key_env, url=self.url, place=self.address)
        if api_key_env is not None:
            self._secrets.add(self._key)
        own_headers = read_headers(headers or {}, url=self.url, place=self.address, secrets=self._secrets)
        self._client = self._open(own_headers, {**own_query, **(query or {})})

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
        self,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        timeout: float | None = None,
        limit: int = MAX_REPLY_BYTES,
    ) -> Response | Trouble:
        """Fetch what lies at a path, of so many bytes at most; `timeout` and errors as in `post`."""
        options = {"params": dict(query)} if query else {}
        return await self._answer(self._client.get, path, timeout=timeout, options=options, limit=limit)

    async def _answer(
        self,
        send: Callable[..., Awaitable[Any]],
        path: str,
        *,
        timeout: float | None,
        options: Any,
        limit: int = MAX_REPLY_BYTES,
        **sent: Any,
    ) -> Response | Trouble:
        import openai

        from dno_jax.bodies import BadBody

        if self._omitted:
            options = options | {"headers": {**options.get("headers", {}), **self._omitted}}
        if timeout is not None:
            options = options | {"timeout": timeout}
        timeout = timeout or self._timeout
        _LIMIT.set(limit)
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
        except BadBody as error:
            trouble = Trouble(self.words(str(error)))
        except Exception as error:  # the client's own, and what it makes of a body that is not what its headers say
            trouble = Trouble(f"the client failed: {type(error).__name__}")
        return self.raised(trouble)

    @staticmethod
    def raised(trouble: Trouble) -> Trouble:
        """Return what says something of this request, and raise what says it of all."""
        if trouble.then == "raise":
            said, doubtful = trouble.said or trouble.detail, trouble.is_doubtful
            raise EndpointError(trouble.detail, status=trouble.status or 0, said=said, is_doubtful=doubtful)
        return trouble

    async def close(self) -> None:
        await self._client.close()

    def without_key(self, text: str) -> str:
        """Take the key out of a text that is to be kept as it is."""
        return self._secrets.without(text)

    def _open(self, headers: Mapping[str, str], query: Mapping[str, str]) -> openai.AsyncOpenAI:
        """Make the client. It sends by aiohttp: httpx's own pool looks at all its connections for each request.

        With 64 in flight a judgement took 1.9 ms of CPU with it and 2.6 with httpcore2 (docs/benchmarks.md).
        """
        import httpx2
        import openai

        from dno_jax.bodies import ENCODINGS

        timeout = openai.Timeout(self._timeout, connect=min(10.0, self._timeout / 2))
        # Zero is no limit: how many are in flight is counted by who sends.
        limits = httpx2.Limits(max_connections=0, keepalive_expiry=_KEPT_SECONDS)
        # A redirect would send prompts and keys wherever a server likes.
        http = openai.DefaultAioHttpClient(
            limits=limits, timeout=timeout, follow_redirects=False, event_hooks={"response": [_bound]}
        )
        sent = {"Accept-Encoding": ENCODINGS, **headers}
        if self._api_key_env is None and headers:  # else "none" would be sent, beside a key in a header of its own
            self._omitted = {} if "authorization" in map(str.lower, headers) else {"Authorization": openai.Omit()}
        return openai.AsyncOpenAI(
            api_key=self._key, base_url=self.url, max_retries=0, timeout=timeout, http_client=http,
            default_headers=sent, default_query=dict(query) or None,
        )  # fmt: skip

    def scrub(self, text: str) -> str:
        """Take the key, and what looks like one, out of a text that others wrote; halves of characters, too.

        JSON may spell a lone surrogate, which no file and no database takes.
        """
        return hide_keys(self.without_key(text.encode(errors="replace").decode()))

    def words(self, text: str) -> str:
        """Make others' words fit for one line; scrubbed first, since a key cut in two would not be found."""
        if len(text) > _SHOWN:
            text = re.sub(r"\s\S*\Z", "", text[:_SHOWN])  # whole words, of which none is half a key
        line = printable(" ".join(self.scrub(text).split()))
        return line if len(line) <= 300 else line[:297] + "..."

    def trouble(self, status: int, body: object, *, headers: Mapping[str, str]) -> Trouble:
        """Say what follows from an answer that is none.

        Args:
            status: of HTTP.
            body: of the response, as JSON or as it came; an "error" object's contents or the whole.
        """
        fault = Fault(body)
        said = f"HTTP {status}: {self.words(fault.message)}"
        where = f"{self.who} at {self.url} answered {said}"

        def found(detail: str, then: Then, *, is_doubtful: bool = False) -> Trouble:
            named = self.words(fault.parameter) if isinstance(fault.parameter, str) else None
            pause = parse_retry_after(headers, now=time.time())
            if pause is None and status in (429, 503, 529):
                pause = fault.pause
            return Trouble(detail, then, status=status, parameter=named, headers=headers, retry_after=pause,
                           said=said, is_doubtful=is_doubtful)  # fmt: skip

        if 400 <= status < 500 and status not in (401, 402, 429) and fault.is_refusal:
            return found(said, "refused")
        if status in (401, 403) or (status == 400 and fault.is_about_the_key):
            remedy = f"name the environment variable of its key in {self.address}.api_key_env"
            if self._api_key_env is not None:
                remedy = f"put a key that may use this model into the environment variable {self._api_key_env}"
            return found(f"{where}; {remedy}", "raise", is_doubtful=status == 403 and not fault.is_about_the_key)
        if status == 402 or (status < 500 and fault.is_about_money):
            remedy = "the account is used up: fill it, then start again; what is already paid for is kept"
            return found(f"{where}; {remedy}", "raise")
        if status == 404:
            remedy = f"fix {self.place}.model, or base_url (it usually ends in /v1)"
            return found(f"{where}; {remedy}", "raise", is_doubtful=True)
        if status < 400:
            to = f" to {self.words(headers.get('location') or 'nowhere').partition('?')[0]}"
            remedy = f"a redirect{to} is not followed, for it would take prompts there; fix {self.address}.base_url"
            return found(f"{where}; {remedy}", "raise", is_doubtful=True)
        if status < 500 and status not in _RETRIED:
            return found(said, "give up")
        trouble = found(said, "retry")
        if trouble.retry_after is not None and trouble.retry_after > MAX_RETRY_AFTER_SECONDS:
            return found(f"{said} (asks to come back in {trouble.retry_after:.0f} s)", "give up")
        return trouble


async def _bound(response: httpx2.Response) -> None:
    """Have the body of a response read to a limit: called by the client before it reads it."""
    import httpx2

    from dno_jax.bodies import BoundedBody

    assert isinstance(response.stream, httpx2.AsyncByteStream)
    encoding = response.headers.pop("content-encoding", "")
    response.stream = BoundedBody(response.stream, encoding=encoding, limit=_LIMIT.get(MAX_REPLY_BYTES))


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
