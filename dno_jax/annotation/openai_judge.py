"""A list-wise judge behind any chat.completions endpoint.

All candidates of a pool stand in one request, in an order drawn by seed and ids; their scores come back in that order.
The endpoint's address is no part of a verdict's identity: the same model served from another node is the same judge.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dno_jax.annotation.annotator import Pool, presentation_order
from dno_jax.annotation.rubric import Unparsable, load_rubric
from dno_jax.annotation.store import Verdict, VerdictStore
from dno_jax.config import OpenAISection
from dno_jax.endpoint import Endpoint, Trouble, wait_seconds
from dno_jax.errors import DnoError
from dno_jax.records import Judgement

_LOG = logging.getLogger(__name__)

_DEFAULT_URL = "https://api.openai.com/v1"


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


class OpenAIAnnotator:
    """Scores pools by a rubric, keeps every answer, and never makes one up."""

    def __init__(self, section: OpenAISection, *, store_path: str | os.PathLike[str], seed: int):
        """Read key and rubric, and open the store; nothing is sent yet.

        Raises:
            DnoError: a missing key, an unreadable rubric, an unusable URL, a store that cannot be opened.
        """
        self._section = section
        self._seed = seed
        self._rubric = load_rubric(section.rubric or "listwise_6point")
        self._endpoint = Endpoint(
            who=f"the judge {section.model!r}",
            place="annotation.openai",
            url=section.base_url or os.environ.get("OPENAI_BASE_URL") or _DEFAULT_URL,
            api_key_env=section.api_key_env,
            timeout=section.timeout,
        )
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
                f"the judge {self._section.model!r} at {self._endpoint.url} does not take a request: {verdict.detail}; "
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
            await self._endpoint.close()
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
            if isinstance(result, Trouble):  # a reply that does not parse is no reason to wait
                await _pause(wait_seconds(tries, retry_after=result.retry_after, jitter=self._jitter.random()))
        if unreachable == tries:
            raise JudgeUnreachable(
                f"no connection to the judge at {self._endpoint.url} in {tries} tries ({verdict.detail}); start it, or "
                "mend annotation.openai.base_url, then start again: verdicts already paid for are kept"
            )
        return replace(verdict, tries=tries, tokens_in=tokens_in, tokens_out=tokens_out)

    async def _call(self, body: dict[str, Any]) -> _Reply | Trouble:
        """Send one request.

        Raises:
            DnoError: no request of this configuration can succeed.
        """
        response = await self._endpoint.post("/chat/completions", body)
        if isinstance(response, Trouble):
            return response
        text = response.text
        return _read_completion(text) or Trouble(f"HTTP 200 without a chat completion: {self._endpoint.words(text)}")

    def _verdict(self, reply: _Reply, count: int) -> Verdict:
        verdict = Verdict(
            "unparsable", raw=self._endpoint.scrub(reply.text or ""), model=self._endpoint.scrub(reply.model)
        )
        if reply.refusal is not None or reply.finish == "content_filter":
            return replace(verdict, state="refused", detail=self._endpoint.words(reply.refusal or "content filter"))
        if reply.finish == "length":
            return replace(verdict, detail=f"the reply was cut at max_tokens={self._section.max_tokens}")
        try:
            scores = self._rubric.parse(reply.text or "", count=count)
        except Unparsable as error:
            return replace(verdict, detail=self._endpoint.words(str(error)))
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


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


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
