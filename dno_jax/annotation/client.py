"""A list-wise judge behind any chat.completions endpoint.

All candidates of a pool stand in one request, in an order drawn by seed and ids; their scores come back in that order.
Retries are ours, not the client's, because a reply that cannot be parsed is retried as well, and all of them count.

The key is read from the environment when the client is made. It is never stored here, and what others wrote (errors,
replies) is scrubbed of it before it is raised, logged or stored. Errors are raised outside `except` blocks, so that
they do not carry the client's exception, which holds the request's headers, as their context.

The endpoint's address is no part of a verdict's identity: the same model served from another node is the same judge.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from dno_jax.annotation.annotator import Pool, presentation_order
from dno_jax.annotation.rubric import Unparsable, load_rubric
from dno_jax.annotation.store import Verdict, VerdictStore
from dno_jax.config import OpenAISection
from dno_jax.errors import DnoError
from dno_jax.records import Judgement

if TYPE_CHECKING:
    import openai

_LOG = logging.getLogger(__name__)

BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
# An endpoint that wants a longer pause is not waited for while accelerators idle: the pool stays open for a later run.
MAX_RETRY_AFTER_SECONDS = 300.0

_DEFAULT_URL = "https://api.openai.com/v1"
_RETRIED = {408, 409, 425, 429}
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ProxyError"}
_SHORTEST_SECRET = 8  # "EMPTY", "none": placeholders for servers without keys; scrubbing them would garble words
_KEY_LIKE = re.compile(r"\b(sk-|Bearer )[\w*.-]{6,}")


class JudgeUnreachable(DnoError):
    """No connection to the endpoint could be made: true of every pool, not of one."""


@dataclass(frozen=True)
class _Request:
    """What is sent for a pool; `order[i]` is the index in the pool of the candidate presented as number i + 1."""

    key: str
    body: dict[str, Any]
    order: tuple[int, ...]


@dataclass(frozen=True)
class _Reply:
    text: str | None
    finish: str | None
    refusal: str | None
    model: str
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class _Trouble:
    """A try without a reply, and what follows from it: another try, none for this pool, or none for any."""

    detail: str
    then: Literal["retry", "give up", "refused", "raise"] = "retry"
    unreachable: bool = False
    retry_after: float | None = None


class OpenAIAnnotator:
    """Scores pools by a rubric, keeps every answer, and never makes one up."""

    def __init__(self, section: OpenAISection, *, store_path: str | os.PathLike[str], seed: int):
        """Read key and rubric, and open the store; nothing is sent yet.

        Raises:
            DnoError: a missing key, an unreadable rubric, an unusable URL, a store that cannot be opened.
        """
        self._section = section
        self._seed = seed
        self._rubric = load_rubric(section.rubric)
        self._url = _checked_url(section.base_url or os.environ.get("OPENAI_BASE_URL") or _DEFAULT_URL)
        self._client = _connect(section, self._url)
        self._store = VerdictStore(store_path)
        self._slots = asyncio.Semaphore(section.max_concurrency)
        self._jitter = random.Random()  # spreads retries over time; decides no result

    def __repr__(self) -> str:
        return f"OpenAIAnnotator({self.identity!r})"

    @property
    def identity(self) -> str:
        section = self._section
        return (
            f"openai {section.model} rubric={self._rubric.identity} temperature={section.temperature} "
            f"max_tokens={section.max_tokens} seed={self._seed}"
        )

    def recall(self, pool: Pool) -> Judgement | None:
        request = self._request(pool)
        verdict = self._store.get(request.key)
        return None if verdict is None else self._judgement(pool, request, verdict)

    async def probe(self) -> None:
        """Send one small request with the very parameters of the real ones, which must be answered somehow.

        Raises:
            JudgeUnreachable: no connection.
            DnoError: the endpoint refuses the key, the model or a parameter, or does not answer.
        """
        body = self._body([{"role": "user", "content": "Reply with the one word: ready"}])
        verdict = await self._ask(body, lambda reply: Verdict("ok", scores=()))
        if verdict.state != "ok":
            raise DnoError(
                f"the judge {self._section.model!r} at {self._url} does not take a request: {verdict.detail}; "
                "mend annotation.openai (model, temperature, max_tokens), or start again when the endpoint is well"
            )

    async def judge(self, pool: Pool) -> Judgement:
        """Return the stored answer, or ask; whatever comes of it is committed before this returns.

        Raises:
            JudgeUnreachable: no try reached the endpoint.
            DnoError: the endpoint refuses the key or does not have the model, or the store fails.
        """
        request = self._request(pool)
        verdict = self._store.get(request.key)
        if verdict is None:
            count = len(request.order)
            # The slot is kept between tries: a judge that says "slow down" gets fewer requests, not other ones.
            async with self._slots:
                verdict = await self._ask(request.body, lambda reply: self._verdict(reply, count))
            verdict = self._store.put(request.key, verdict, judge=self.identity, prompt_id=pool.prompt.prompt_id)
        return self._judgement(pool, request, verdict)

    async def close(self) -> None:
        try:
            await self._client.close()
        finally:
            self._store.close()

    def totals(self) -> dict[str, int]:
        """Count what the store holds: rows by state, tries, tokens (all runs)."""
        return self._store.totals()

    def _request(self, pool: Pool) -> _Request:
        order = presentation_order(pool, seed=self._seed)
        texts = [pool.candidates[index].text for index in order]
        body = self._body(self._rubric.messages(pool.prompt.messages, texts))
        canonical = json.dumps({"judge": self.identity, "request": body}, sort_keys=True, separators=(",", ":"))
        return _Request(key=hashlib.sha256(canonical.encode()).hexdigest(), body=body, order=order)

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        section = self._section
        return {
            "model": section.model,
            "messages": messages,
            section.max_tokens_field: section.max_tokens,
            **({} if section.temperature is None else {"temperature": section.temperature}),
        }

    async def _ask(self, body: dict[str, Any], read: Callable[[_Reply], Verdict]) -> Verdict:
        """Try until there is an answer, a refusal, or no try left."""
        tokens_in = tokens_out = unreachable = 0
        tries = 0
        while True:
            tries += 1
            result = await self._call(body)
            if isinstance(result, _Reply):
                tokens_in += result.tokens_in
                tokens_out += result.tokens_out
                verdict, again = read(result), True
            else:
                verdict = Verdict("refused" if result.then == "refused" else "failed", detail=result.detail)
                unreachable += result.unreachable
                again = result.then == "retry"
            if verdict.state in ("ok", "refused") or not again or tries >= self._section.max_tries:
                break
            _LOG.info("judge: try %d of %d: %s", tries, self._section.max_tries, verdict.detail)
            if isinstance(result, _Trouble):  # a reply that does not parse is no reason to wait
                await _pause(wait_seconds(tries, retry_after=result.retry_after, jitter=self._jitter.random()))
        if unreachable == tries:
            raise JudgeUnreachable(
                f"no connection to the judge at {self._url} in {tries} tries ({verdict.detail}); start it, or mend "
                "annotation.openai.base_url, then start again: verdicts already paid for are kept"
            )
        return replace(verdict, tries=tries, tokens_in=tokens_in, tokens_out=tokens_out)

    async def _call(self, body: dict[str, Any]) -> _Reply | _Trouble:
        """Send one request.

        Raises:
            DnoError: no request of this configuration can succeed.
        """
        import openai

        try:
            # The client's own timeout counts silence only; a server that trickles would hold the slot for ever.
            async with asyncio.timeout(self._section.timeout):
                response = await self._client.chat.completions.with_raw_response.create(**body)
                text = response.http_response.text
                result = _read_completion(text) or _Trouble(f"HTTP 200 without a chat completion: {self._words(text)}")
        except openai.APIStatusError as error:
            result = self._status_trouble(error)
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__
            result = _Trouble(f"no connection ({cause})", unreachable=cause in _NO_CONNECTION)
            if isinstance(error, openai.APITimeoutError) and not result.unreachable:
                result = _Trouble(f"no answer within {self._section.timeout:g} s")
        except TimeoutError:
            result = _Trouble(f"no answer within {self._section.timeout:g} s")
        except openai.OpenAIError as error:
            result = _Trouble(f"the client failed: {type(error).__name__}")
        if isinstance(result, _Trouble) and result.then == "raise":
            raise DnoError(result.detail)
        return result

    def _status_trouble(self, error: openai.APIStatusError) -> _Trouble:
        status, model = error.status_code, self._section.model
        fault = error.body if isinstance(error.body, dict) else {}
        said = f"HTTP {status}: {self._words(str(fault.get('message') or error.body or error.message))}"
        where = f"the judge {model!r} at {self._url} answered {said}"
        if status in (401, 403):
            variable = self._section.api_key_env
            remedy = "name the environment variable of its key in annotation.openai.api_key_env"
            if variable is not None:
                remedy = f"put a key that may use this model into the environment variable {variable}"
            return _Trouble(f"{where}; {remedy}", then="raise")
        if status == 404:
            remedy = "mend annotation.openai.model, or base_url (it usually ends in /v1)"
            return _Trouble(f"{where}; {remedy}", then="raise")
        if status == 402 or fault.get("code") == "insufficient_quota":
            remedy = "the account is used up: fill it, then start again; verdicts already paid for are kept"
            return _Trouble(f"{where}; {remedy}", then="raise")
        if status == 400 and fault.get("code") in ("content_filter", "content_policy_violation"):
            return _Trouble(said, then="refused")
        if status < 500 and status not in _RETRIED:
            return _Trouble(said, then="give up")
        retry_after = parse_retry_after(error.response.headers, now=time.time())
        if retry_after is not None and retry_after > MAX_RETRY_AFTER_SECONDS:
            return _Trouble(f"{said} (asks to come back in {retry_after:.0f} s)", then="give up")
        return _Trouble(said, retry_after=retry_after)

    def _verdict(self, reply: _Reply, count: int) -> Verdict:
        verdict = Verdict("unparsable", raw=self._scrub(reply.text or ""), model=self._scrub(reply.model))
        if reply.refusal is not None or reply.finish == "content_filter":
            return replace(verdict, state="refused", detail=self._words(reply.refusal or "content filter"))
        if reply.finish == "length":
            return replace(verdict, detail=f"the reply was cut at max_tokens={self._section.max_tokens}")
        try:
            scores = self._rubric.parse(reply.text or "", count=count)
        except Unparsable as error:
            return replace(verdict, detail=self._words(str(error)))
        return replace(verdict, state="ok", scores=scores)

    def _judgement(self, pool: Pool, request: _Request, verdict: Verdict) -> Judgement:
        scores = None
        if verdict.scores is not None:
            by_index = dict(zip(request.order, verdict.scores, strict=True))
            scores = tuple(float(by_index[index]) for index in range(len(request.order)))
        return Judgement(
            prompt_id=pool.prompt.prompt_id,
            candidate_ids=pool.candidate_ids,
            judge=self.identity,
            state=verdict.state,
            scores=scores,
            raw=verdict.raw,
            detail=verdict.detail,
        )

    def _scrub(self, text: str) -> str:
        """Take the key, and what looks like one, out of a text that others wrote."""
        key = self._client.api_key
        if self._section.api_key_env and len(key) >= _SHORTEST_SECRET:
            text = text.replace(key, "[key]")
        return _KEY_LIKE.sub("[key]", text)

    def _words(self, text: str) -> str:
        """Make others' words fit for one line; scrubbed first, since a key cut in two would not be found."""
        line = " ".join(self._scrub(text).split())
        return line if len(line) <= 300 else line[:297] + "..."


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


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\s*\d{1,9}(\.\d{0,9})?\s*", text) else None


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


def _connect(section: OpenAISection, url: str) -> openai.AsyncOpenAI:
    import openai

    key = "none"
    if section.api_key_env is not None:
        # A trailing newline, usual in mounted secrets, makes an illegal header, and the error would quote the key.
        key = os.environ.get(section.api_key_env, "").strip()
        if not key:
            raise DnoError(
                f"annotation.openai: the environment variable {section.api_key_env} is not set; put the key of "
                f"{url} there, or set annotation.openai.api_key_env=null for a server without keys"
            )
        if not (key.isascii() and key.isprintable()):
            raise DnoError(f"annotation.openai: the variable {section.api_key_env} holds no key: it has odd characters")
    timeout = openai.Timeout(section.timeout, connect=min(10.0, section.timeout / 2))
    return openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0, timeout=timeout)


def _checked_url(url: str) -> str:
    """Return the URL if it can be used and shown: it stands in config.yaml, in messages and in logs."""
    try:
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        raise DnoError("annotation.openai.base_url: not a URL; expected http(s)://host[:port]/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DnoError(f"annotation.openai.base_url: {shown!r}: expected http(s)://host[:port]/path")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise DnoError(
            f"annotation.openai.base_url: {shown} with a user, a query or a fragment; give the bare URL, and the key "
            "in the environment variable that annotation.openai.api_key_env names"
        )
    return url


def _read_completion(text: str) -> _Reply | None:
    """Read the body of a 200; None if it is anything but a chat completion."""
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        usage = body.get("usage") or {}
        if not isinstance(content, str | None) or not isinstance(refusal, str | None):
            raise TypeError
        return _Reply(
            text=content,
            finish=choice.get("finish_reason"),
            refusal=refusal or None,
            model=str(body.get("model") or ""),
            tokens_in=int(usage.get("prompt_tokens") or 0),
            tokens_out=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
