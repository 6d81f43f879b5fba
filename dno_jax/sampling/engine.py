"""The sampler's host side: keeps the queue full, hands the programs on to the device, gives finished prompts out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dno_jax.errors import DnoError
from dno_jax.model.params import unstack_layers
from dno_jax.parallel.sharding import num_row_shards, replicated, reshard, row_sharding, to_device
from dno_jax.sampling.decode import decode, fill
from dno_jax.sampling.requests import Finished, Request, Response, response_limit
from dno_jax.sampling.state import (
    CompiledPrograms,
    Counts,
    Mixture,
    Outputs,
    Prompts,
    prompt_bucket,
    start,
)

# Given the number of a request and the ids of a response so far, says how many of them stay and what text they are,
# or None where the response continues. Asked once for every piece that a response grows by.
Stop = Callable[[int, Sequence[int]], tuple[int, str] | None]


@dataclass
class Statistics:
    """What a pass over all requests did; filled in while it runs."""

    slot_steps: int = 0  # of all slots, busy or not
    busy_slot_steps: int = 0  # of slots that drew a token
    tokens: int = 0  # in responses
    decode_calls: int = 0
    fill_calls: int = 0

    @property
    def utilisation(self) -> float:
        """Tokens of responses over slot-steps: what share of the decoding was useful."""
        return self.tokens / max(self.slot_steps, 1)


def generate(
    params: Any,
    requests: Iterable[Request],
    programs: CompiledPrograms,
    *,
    iteration: int = 0,
    mixture: Mixture | None = None,
    stop: Stop | None = None,
    statistics: Statistics | None = None,
) -> Iterator[Finished]:
    """Sample K responses to every prompt; yield each prompt as soon as all of its responses are there.

    Text depends on (seed, iteration, prompt name, sample) and the weights; on slots, order, chunk or mesh only where
    they make the compiler round otherwise (docs/architecture.md). The device works ahead: while one call's responses
    are looked at, the next call runs.

    Args:
        params: pi_t, the decoder's parameters, in the DECODE layout on a mesh of several devices.
        requests: taken as slots and queue allow, and started in this order; prompts of like length side by side pad
            little.
        programs: the model, how it is sampled from, how much is decoded at once, and on which mesh.
        mixture: draw from the geometric mixture with this policy; temperature and truncation then apply to the
            mixture, log-probabilities stay pi_t's own. None holds no second cache.
        stop: ends responses by their text.
        statistics: filled in.

    Raises:
        ValueError: a prompt is empty, or longer than `shape.prompt_length`, or leaves no room for a response.
        DnoError: the policy's logits are not finite.
    """
    mesh = programs.mesh
    assert isinstance(mesh, Mesh), "an abstract mesh is for plans"
    policies = tuple(map(unstack_layers, (params,) if mixture is None else (params, mixture.params)))
    statistics = Statistics() if statistics is None else statistics
    books = _Books.open(requests, programs)
    if books.finished:
        return
    state, outputs = start(programs, policies=len(policies))
    number = jnp.int32(iteration)
    weight = jnp.float32(0.0 if mixture is None else mixture.weight)
    dispatched: tuple[int, Outputs, Counts] | None = None
    rows = row_sharding(mesh, ndim=1)
    while not books.finished:
        while prompts := books.next_prompts():
            places = jax.tree.map(lambda leaf: row_sharding(mesh, ndim=leaf.ndim), prompts)
            state = fill(policies, state, to_device(prompts, places), iteration=number, programs=programs)
            statistics.fill_calls += 1
        fresh, cancelled, call = books.next_call()
        state, outputs, counts = decode(
            policies,
            state,
            outputs,
            weight,
            fresh=to_device(fresh, rows),
            cancelled=to_device(cancelled, rows),
            programs=programs,
        )
        statistics.decode_calls += 1
        # Behind this call and before the next: the host must not wait for work that stands in line after that one.
        shown = _whole((outputs, counts), replicated(mesh))
        if dispatched is not None:
            yield from books.harvest(*dispatched, stop=stop, statistics=statistics)
        dispatched = (call, *shown)


def _checked(index: int, request: Request, programs: CompiledPrograms) -> Request:
    length, longest = len(request.token_ids), programs.shape.prompt_length
    if not 1 <= length <= longest:
        raise ValueError(
            f"request {index} has a prompt of {length} tokens; the cache holds prompts of 1 to {longest}: cut it, or "
            "raise shape.prompt_length"
        )
    if response_limit(request, programs.sampling_params) < 1:
        raise ValueError(
            f"request {index} has a prompt of {length} tokens, max_new_tokens {request.max_new_tokens}, and "
            f"max_total_tokens is {programs.sampling_params.max_total_tokens}, which leaves no room for a response"
        )
    return request


@dataclass
class _Place:
    """A prompt whose responses are being drawn, or wait to be."""

    request: int
    since: int  # the first call whose outputs speak of it
    read: list[list[int]]  # ids of each response, as far as `stop` has looked at them
    cut: dict[int, tuple[int, str]] = field(default_factory=dict)  # sample -> what `stop` left of it


@dataclass
class _Shard:
    """What the host knows of one row shard's queue and outputs."""

    free: list[int]  # places of prompts in the outputs
    places: dict[int, _Place] = field(default_factory=dict)
    filled: int = 0
    started: int = 0  # samples, as of the last call that was looked at


@dataclass
class _Books:
    """Which request stands where. All decisions follow from what calls returned, so that processes agree on them."""

    programs: CompiledPrograms
    shards: list[_Shard]
    coming: Iterator[tuple[int, Request]]
    pending: deque[tuple[int, Request]]  # looked at, and not filled yet
    fresh: np.ndarray  # [shards, O, K] bool
    cancelled: np.ndarray  # [shards, O, K] bool
    calls: int = 0  # of decode, so far

    @classmethod
    def open(cls, requests: Iterable[Request], programs: CompiledPrograms) -> _Books:
        count, outputs = num_row_shards(programs.mesh), programs.shape.outputs
        marks = np.zeros((count, outputs, programs.sampling_params.num_samples), bool)
        return cls(
            programs=programs,
            shards=[_Shard(free=list(reversed(range(outputs)))) for _ in range(count)],
            coming=((index, _checked(index, request, programs)) for index, request in enumerate(requests)),
            pending=deque(),
            fresh=marks,
            cancelled=marks.copy(),
        )

    @property
    def finished(self) -> bool:
        """Whether every prompt has been given out."""
        return self._waiting(1) == 0 and not any(shard.places for shard in self.shards)

    def _waiting(self, wanted: int) -> int:
        """Look at the next requests; return how many there are, at most `wanted`."""
        while len(self.pending) < wanted and (found := next(self.coming, None)) is not None:
            self.pending.append(found)
        return min(wanted, len(self.pending))

    def next_prompts(self) -> Prompts | None:
        """Take the next prompts that fit, a full call's where there are so many; None: nothing now.

        They are dealt one by one to the shard with the largest reserve, so that none is left with more than its share.
        """
        shape, samples = self.programs.shape, self.programs.sampling_params.num_samples
        rows = shape.fill_rows
        wanted = self._waiting(rows * len(self.shards))
        share = -(-wanted // len(self.shards))  # the rows of a full call, until few are left
        rooms = [min(shape.entries - shard.filled + shard.started // samples, len(shard.free)) for shard in self.shards]
        taken: list[list[tuple[int, Request]]] = [[] for _ in self.shards]
        ready = [(-room, number) for number, room in enumerate(rooms) if room >= share]
        heapify(ready)
        for _ in range(wanted):
            if not ready:
                break
            room, number = ready[0]
            taken[number].append(self.pending.popleft())
            if len(taken[number]) == rows or room == -1:
                heappop(ready)
            else:
                heapreplace(ready, (room + 1, number))
        if not any(taken):
            return None
        longest = max(len(request.token_ids) for own in taken for _, request in own)
        width = prompt_bucket(longest, max_length=shape.prompt_length, piece=shape.prefill_chunk)
        count = len(self.shards)
        token = np.zeros((count, rows, width), np.int32)
        length, output, limit = np.zeros((3, count, rows), np.int32)
        name = np.zeros((count, rows), np.uint32)
        for number, (shard, own) in enumerate(zip(self.shards, taken, strict=True)):
            for row, (index, request) in enumerate(own):
                place = shard.free.pop()
                shard.places[place] = _Place(index, since=self.calls, read=[[] for _ in range(samples)])
                token[number, row, : len(request.token_ids)] = request.token_ids
                length[number, row], name[number, row] = len(request.token_ids), request.name
                output[number, row] = place * samples
                limit[number, row] = response_limit(request, self.programs.sampling_params)
                self.fresh[number, place] = True
            shard.filled += len(own)
        flat = (count * rows,)
        return Prompts(
            token=token.reshape(*flat, width),
            length=length.reshape(flat),
            name=name.reshape(flat),
            output=output.reshape(flat),
            limit=limit.reshape(flat),
        )

    def next_call(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Return what the next decoding is to be told, once: fresh and cancelled rows; and its number."""
        fresh, cancelled, number = self.fresh.reshape(-1), self.cancelled.reshape(-1), self.calls
        self.fresh, self.cancelled = np.zeros_like(self.fresh), np.zeros_like(self.cancelled)
        self.calls += 1
        return fresh, cancelled, number

    def harvest(
        self, call: int, outputs: Outputs, counts: Counts, *, stop: Stop | None, statistics: Statistics
    ) -> Iterator[Finished]:
        """Wait for a call and yield the prompts that it finished."""
        outputs, counts = _on_host(outputs), _on_host(counts)
        statistics.slot_steps += int(counts.steps) * len(self.shards) * self.programs.shape.slots
        statistics.busy_slot_steps += int(counts.busy)
        samples = self.programs.sampling_params.num_samples
        for number, shard in enumerate(self.shards):
            shard.started = int(counts.started[number])
            for name, place in sorted(shard.places.items()):
                if place.since > call:
                    continue
                first = (number * self.programs.shape.outputs + name) * samples
                if stop is not None:
                    self.cancelled[number, name] |= _cut(place, outputs, first, stop)
                if not outputs.done[first : first + samples].all():
                    continue
                responses = tuple(_response(outputs, first + k, cut=place.cut.get(k)) for k in range(samples))
                del shard.places[name]
                shard.free.append(name)
                statistics.tokens += sum(len(response.token_ids) for response in responses)
                yield Finished(place.request, responses)


def _cut(place: _Place, outputs: Outputs, first: int, stop: Stop) -> np.ndarray:
    """Look for stop strings where a response is longer than it was; return which of them [K] are to be ended."""
    cancelled = np.zeros(len(place.read), bool)
    for k, ids in enumerate(place.read):
        row = first + k
        if k in place.cut or not (new := outputs.token[row, len(ids) : outputs.length[row]].tolist()):
            continue
        ids += new
        if (found := stop(place.request, ids)) is not None:
            place.cut[k] = found
            cancelled[k] = not outputs.done[row]
    return cancelled


def _response(outputs: Outputs, row: int, *, cut: tuple[int, str] | None) -> Response:
    count, text = (int(outputs.length[row]), None) if cut is None else cut
    if not np.isfinite(outputs.logprob[row, :count]).all():
        raise DnoError(
            "the logits of the policy, or of the reference that it is mixed with, are not finite, so what was drawn "
            "means nothing; look at the training that made it (its loss and gradient norm in metrics.jsonl), or at the "
            "checkpoint that was imported"
        )
    drawn = outputs.drawn_logprob
    return Response(
        token_ids=tuple(outputs.token[row, :count].tolist()),
        logprobs=tuple(outputs.logprob[row, :count].tolist()),
        finish="stop" if cut is not None or outputs.stopped[row] else "length",
        drawn_logprobs=None if drawn is None else tuple(drawn[row, :count].tolist()),
        text=text,
    )


def _whole(tree: Any, place: NamedSharding) -> Any:
    """Have arrays gathered on every process of a mesh that spans several; dispatched, not waited for."""

    def one(array: jax.Array) -> jax.Array:
        return array if array.is_fully_addressable else reshard(array, place).addressable_data(0)

    return jax.tree.map(one, tree)


def _on_host(tree: Any) -> Any:
    """Wait for arrays."""
    return jax.tree.map(np.asarray, tree)
