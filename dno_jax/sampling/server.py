"""Sampling from an OpenAI-compatible completion server that serves the exported policy.

Prompts are sent as token ids, so that no template is applied twice, and each response is a request of its own: some
servers take no `n`, and some give n equal answers to one seed. Servers with a prefix cache compute a prompt once all
the same.

A request's seed is made of (seed, iteration, prompt, sample). A server that honours seeds then gives the same response
whenever it computes the same numbers. That is less than the engine of this package promises: batch size, hardware,
version and settings of the server change roundings and so, now and then, a token (SGLang honours seeds only with
--enable-deterministic-inference); and no server draws what this package's engine draws. What a server does with top-p,
min-p and the repetition penalty together is its own order.

A refused answer is drawn again from the next seed: what is kept is the policy given that its answers can be read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from typing import Any, TypeVar

from dno_jax.endpoint import Endpoint, GaveUp, Trouble, retried
from dno_jax.errors import DnoError
from dno_jax.sampling import completion
from dno_jax.sampling.completion import Answer, Refused, Task
from dno_jax.sampling.requests import Finished, Request, Response, response_limit

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# Tokenizers part over capitals, digits, blanks, accents, rare scripts and emoji.
PROBE = "The 2nd GRÜNE Schildkröte  costs 1,234.50 €\n\tdef f(x): return x**2  # 東京 🐢 isn't it?"
_CLONES_ARE_SUSPECT = 8  # prompts, all of whose responses are equal


def complete(
    requests: Sequence[Request],
    task: Task,
    *,
    counts: Counter[str] | None = None,
    num_prompts: int | None = None,
    num_lost: int = 0,
) -> Generator[Finished, None, None]:
    """Yield prompts with their responses, as they are done; requests continue while the caller works. Closing ends it.

    Args:
        counts: what was asked, drawn and refused is added here.
        num_prompts: of the whole list that these requests are left of, which `max_refused` is a share of; None where
            they are all of it.
        num_lost: prompts of that list that earlier calls left without responses.

    Yields:
        `Response.logprobs` is there where the section says that the server's are the policy's, and the server returned
        ids with them. `Response.text` is there where it is more than the decoded ids: from servers without ids, and
        where a stop string was cut off. A prompt that no answer could be kept for in `max_tries` is left out.

    Raises:
        DnoError: the server cannot be reached, refuses, does not list the model, reads prompts otherwise than they were
            sent, has another tokenizer, or more than `max_refused` of the whole list got no responses.
    """
    if not requests:
        return
    for request in requests:
        if response_limit(request, task.sampling_params) < 1:
            raise DnoError(
                f"a prompt of {len(request.token_ids)} tokens leaves no room for a response within sampling."
                f"max_total_tokens={task.sampling_params.max_total_tokens}; raise it, or lower prompts.max_length"
            )
    calls = _Calls(
        requests,
        task,
        counts=Counter() if counts is None else counts,
        num_prompts=len(requests) if num_prompts is None else num_prompts,
        num_lost=num_lost,
    )
    yield from stream(calls.run)


def stream(produce: Callable[[Callable[[Any], None]], Coroutine[Any, Any, None]]) -> Generator[Any, None, None]:
    """Run `produce(put)` on an event loop in a thread, and yield what it puts.

    Closing this cancels it, waits until its tasks have ended, and ends the thread. What it raises is raised here.
    """
    outbox: queue.SimpleQueue[tuple[Any] | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    # A daemon: an interpreter that ends must not wait for a server.
    thread = threading.Thread(target=loop.run_forever, name="completions", daemon=True)
    thread.start()
    work = asyncio.run_coroutine_threadsafe(produce(lambda item: outbox.put((item,))), loop)
    work.add_done_callback(lambda _: outbox.put(None))
    try:
        while (item := outbox.get()) is not None:
            yield item[0]
        work.result()
    finally:
        asyncio.run_coroutine_threadsafe(_settle(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _settle() -> None:
    """Cancel all other tasks, and wait for them."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
    await asyncio.get_running_loop().shutdown_default_executor()


class _Calls:
    """The requests of one `complete`."""

    def __init__(
        self,
        requests: Sequence[Request],
        task: Task,
        *,
        counts: Counter[str],
        num_prompts: int,
        num_lost: int,
    ):
        self._requests = requests
        self._task = task
        self._sampling_params = task.sampling_params
        self._section = section = task.section
        self._counts = counts
        self._num_prompts = num_prompts
        self._num_lost = num_lost
        self._model = section.model.replace("{iteration}", f"{task.iteration:03d}")
        self._endpoint = Endpoint(
            who=f"the completion server of {self._model!r}",
            place="sampling.server",
            url=section.base_url,
            api_key_env=section.api_key_env,
            timeout=section.timeout,
        )
        self._greedy = task.sampling_params.truncation.temperature == 0.0
        self._fields = completion.sampling_fields(task)
        self._done: dict[int, dict[int, Response | None]] = {}
        self._clones = 0

    async def run(self, put: Callable[[Finished], None]) -> None:
        """Put every prompt as soon as all its responses are there."""
        samples = range(self._sampling_params.num_samples)
        jobs = ((index, sample) for index in range(len(self._requests)) for sample in samples)
        workers = min(self._section.max_concurrency, len(self._requests) * len(samples))
        failure: BaseException | None = None
        try:
            self._refuse_if_too_many_lost()  # max_refused may be lower than it was
            await self._probe()
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(self._work(jobs, put))
            except BaseExceptionGroup as failures:
                failure = failures.exceptions[0]
        finally:
            await self._endpoint.close()
        if failure is not None:
            raise failure

    async def _work(self, jobs: Iterator[tuple[int, int]], put: Callable[[Finished], None]) -> None:
        for index, sample in jobs:
            responses = self._done.setdefault(index, {})
            responses[sample] = await self._response(index, self._sampling_params.first_sample + sample)
            if len(responses) == self._sampling_params.num_samples:
                self._finish(index, put)

    def _finish(self, index: int, put: Callable[[Finished], None]) -> None:
        by_sample = self._done.pop(index)
        responses = tuple(kept for sample in sorted(by_sample) if (kept := by_sample[sample]) is not None)
        if len(responses) < len(by_sample):
            self._num_lost += 1
            self._counts["prompts without responses"] += 1
            self._refuse_if_too_many_lost()
            return
        self._counts["responses"] += len(responses)
        if without := sum(item.logprobs is None for item in responses):
            self._counts["responses without log-probs"] += without
        if len(responses) > 1 and len({item.token_ids for item in responses}) == 1:
            self._clones += 1
            if self._clones == _CLONES_ARE_SUSPECT and not self._greedy:
                _LOG.warning(
                    "%s: all %d responses were equal for each of %d prompts: does it ignore the seed of a request?",
                    self._endpoint.who, len(responses), self._clones,
                )  # fmt: skip
        put(Finished(index=index, responses=responses))

    def _refuse_if_too_many_lost(self) -> None:
        # Seeds are addressed: what was refused before a restart is refused after it, and these requests may be just
        # those. Hence a share of the whole list, so that a run that was interrupted ends as one that was not.
        if self._num_lost <= self._section.max_refused * self._num_prompts:
            return
        refused = {name: count for name, count in self._counts.items() if name.startswith("refused")}
        raise DnoError(
            f"{self._endpoint.who}: no usable response to {self._num_lost} of {self._num_prompts} prompts, more than "
            f"sampling.server.max_refused={self._section.max_refused:g} allows; raise it to continue without them, or "
            f"fix what refuses them{f': {refused}' if refused else ''}"
        )

    async def _response(self, index: int, sample: int) -> Response | None:
        """Ask until there is an answer that can be kept; None where all were refused."""
        request, sampling_params = self._requests[index], self._sampling_params
        limit = response_limit(request, sampling_params)
        redraws = tries = 0
        while True:
            seed = completion.request_seed(
                seed=sampling_params.seed,
                iteration=self._task.iteration,
                prompt=request.name,
                sample=sample,
                redraw=redraws,
            )
            answer, tries = await self._ask(prompt=list(request.token_ids), max_tokens=limit, seed=seed, tries=tries)
            completion.check_prompt(answer, request)
            try:
                if answer.finish == "content_filter":
                    raise Refused("content filter")
                return completion.read_response(answer, index, task=self._task, limit=limit)
            except Refused as refused:
                self._counts[f"refused: {refused}"] += 1
                _LOG.info("%s: prompt %d, sample %d refused: %s", self._endpoint.who, index, sample, refused)
            redraws += 1
            if tries >= self._section.max_tries or self._greedy:  # greedy: the same again
                return None

    async def _ask(self, *, prompt: list[int] | str, max_tokens: int, seed: int, tries: int) -> tuple[Answer, int]:
        """Send a request until it is answered.

        Args:
            tries: requests that were sent for this response before.

        Returns:
            The answer, and the requests that were sent by then.

        Raises:
            DnoError: there is no answer, and no try left.
        """
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "seed": seed, **self._fields}

        async def attempt() -> Answer | Trouble:
            nonlocal tries
            tries += 1
            self._counts["requests"] += 1
            response = await self._endpoint.post("/completions", body)
            return response if isinstance(response, Trouble) else self._read(response.text)

        found = await self._retried(attempt, max_tries=self._section.max_tries - tries)
        if isinstance(found, GaveUp):
            start_it = "start it, or fix sampling.server.base_url" if found.trouble.unreachable else "see its log"
            raise DnoError(
                f"{self._endpoint.who} at {self._endpoint.url} gave no answer in {tries} "
                f"{'tries' if tries > 1 else 'try'}: {found.trouble.detail}; {start_it}, then start again: closed "
                "shards are kept"
            )
        self._counts["tokens"] += found.completion_tokens or 0
        return found, tries

    async def _retried(self, attempt: Callable[[], Awaitable[T | Trouble]], *, max_tries: int) -> T | GaveUp:
        return await retried(attempt, who=self._endpoint.who, max_tries=max_tries, pause=_pause)

    def _read(self, text: str) -> Answer | Trouble:
        answer = completion.parse_answer(text)
        if answer is None:
            return Trouble(f"HTTP 200 without one completion: {self._endpoint.words(text)}")
        if answer.finish not in ("stop", "length", "content_filter"):  # "abort": a server that shuts down
            return Trouble(f"the response ended by {self._endpoint.words(repr(answer.finish))}")
        return answer

    async def _probe(self) -> None:
        """See that the server lists the model and has our tokenizer, and takes the real requests' parameters."""
        await self._check_model()
        answer, _ = await self._ask(prompt=PROBE, max_tokens=1, seed=0, tries=0)
        if not completion.check_text(answer, self._task.codec.text_ids(PROBE)):
            _LOG.warning("%s does not count tokens: its tokenizer goes unchecked", self._endpoint.who)

    async def _check_model(self) -> None:
        found = await self._retried(lambda: self._endpoint.get("/models"), max_tries=self._section.max_tries)
        if isinstance(found, GaveUp):
            raise DnoError(
                f"{self._endpoint.who} at {self._endpoint.url} does not list its models: {found.trouble.detail}; start "
                "it, or fix sampling.server.base_url (it usually ends in /v1)"
            )
        try:
            names = [str(model["id"]) for model in json.loads(found.text)["data"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            names = None
        if names is None:
            raise DnoError(
                f"{self._endpoint.url}/models is no list of models: {self._endpoint.words(found.text)}; fix "
                "sampling.server.base_url (it usually ends in /v1)"
            )
        if self._model not in names:
            listed = self._endpoint.words(", ".join(names) or "none")
            raise DnoError(
                f"the completion server at {self._endpoint.url} serves {listed}, not {self._model!r}; serve the "
                "policy of this iteration under that name (vLLM: --served-model-name), or fix sampling.server.model"
            )


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)
