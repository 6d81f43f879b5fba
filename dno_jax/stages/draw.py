"""Sampled responses as rows: prompts in, closed shards of Rollout rows out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from dno_jax import stopping
from dno_jax.config import RunConfig
from dno_jax.console import Meter
from dno_jax.data.prompts import TokenizedPrompt
from dno_jax.parallel.cluster import barrier, broadcast_from_primary, is_primary, wait_until
from dno_jax.records import Rollout
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.sampler import Sampler, SampleSpec, Stream
from dno_jax.sampling.requests import Finished, Response
from dno_jax.stage_dir import StageDir


@dataclass(frozen=True)
class Draws:
    """What is drawn for each prompt, and from whom.

    Attributes:
        specs: one per distribution.
        policies: paths by name: "policy" that samples, and the mixture's "initial" where a spec has one.
        policy: index t of pi_t, the "policy" of `policies`.
    """

    specs: Sequence[SampleSpec]
    policies: Mapping[str, epath.Path]
    policy: int


def sample_to_shards(
    runtime: Runtime[RunConfig],
    prompts: Sequence[TokenizedPrompt],
    draws: Draws,
    *,
    out: StageDir,
    description: str,
    also: Callable[[str, TokenizedPrompt], Sequence[Rollout]] = lambda *_: (),
    after_shard: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Sample every shard of prompts that is not closed yet.

    Shards are cut from the whole list, alike on every machine. All candidates of a prompt are in one shard, which is
    closed, and can be judged, as soon as the last of its prompts is finished. Each submesh takes every n-th
    shard and runs by itself.

    Args:
        also: rows that go beside a prompt's responses, by the shard's name and the prompt.
        after_shard: called whenever this process has closed a shard; what it raises ends sampling there.

    Returns:
        For the manifest: how the slots of this process's own submesh were used, or what it asked the server.
        What other submeshes did is not in it, so the manifest holds the primary's. Empty if nothing was left to sample.
    """
    size, specs = runtime.config.sampling.shard_prompts, draws.specs
    cuts = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    pending = _unfinished(out, cuts, size=size)
    submesh, server = runtime.submesh, runtime.config.sampling.engine == "openai"
    # A server is asked by one process; no device takes part.
    own = pending[submesh.index :: submesh.count] if not server else pending if is_primary() else []
    shards = [_Shard(_name(index * size), cuts[index]) for index in own]
    places = [(shard, place) for shard in shards for place in range(len(shard.prompts))]
    sampler = Sampler(
        runtime,
        [shard.prompts[place] for shard, place in places],
        specs,
        draws.policy,
        num_prompts=len(prompts),
        num_lost=_lost(out, cuts, pending, size=size) if server and own else 0,
    )

    def close(shard: _Shard) -> None:
        rows: list[Rollout] = []
        for place, responses in sorted(shard.found.items()):
            if len(responses) == len(specs):
                rows += _rollouts(sampler, shard.prompts[place], responses)
                rows += also(shard.name, shard.prompts[place])
        out.write_shard(shard.name, rows)
        shard.found.clear()  # an iteration's responses need not all be held
        shard.closed = True
        stopping.heed()
        after_shard()

    if pending:
        done = len(prompts) - sum(len(cuts[index]) for index in pending)
        with contextlib.ExitStack() as stack:
            streams = sampler.streams(draws.policies)
            for stream in streams:
                stack.enter_context(contextlib.closing(stream))
            meter = stack.enter_context(
                Meter(description, total=done + len(places), unit="prompts", done=done, enabled=is_primary())
            )
            # Drawn in turn, so that a prompt's candidates of all distributions are there together.
            for number, found in _in_turn(streams):
                shard, place = places[found.index]
                responses = shard.found.setdefault(place, {})
                responses[number] = found.responses
                if len(responses) < len(specs):
                    continue
                meter.advance(1)
                if shard.is_whole(len(specs)) and (submesh.leads or server):
                    close(shard)
        for shard in shards:  # prompts that a server had no usable answers for have no rows, and are not asked again
            if server and not shard.closed:
                close(shard)
        # Not in a collective: others may sample for hours yet, or wait for a server that one of them asks.
        names = {_name(index * size) for index in pending}
        wait_until(lambda: names <= set(out.shard_names()))
    barrier(f"sampled {out.path}")
    return sampler.details


@dataclass
class _Shard:
    """A file of rollouts in the making."""

    name: str
    prompts: Sequence[TokenizedPrompt]
    found: dict[int, dict[int, tuple[Response, ...]]] = field(default_factory=dict)  # prompt -> draw -> responses
    closed: bool = False

    def is_whole(self, specs: int) -> bool:
        return len(self.found) == len(self.prompts) and all(len(own) == specs for own in self.found.values())


def _in_turn(streams: Sequence[Stream]) -> Iterator[tuple[int, Finished]]:
    """Take one item of each stream in turn, with the stream's number, until all have ended."""
    left = dict(enumerate(streams))
    while left:
        for number, stream in list(left.items()):
            if (found := next(stream, None)) is None:
                del left[number]
            else:
                yield number, found


def _name(first: int) -> str:
    """What a shard is called, by the place of its first prompt in the whole list."""
    return f"{first:07d}"


def _unfinished(out: StageDir, cuts: Sequence[Sequence[TokenizedPrompt]], *, size: int) -> list[int]:
    """Indices of the shards that are not closed; process 0 says which, for all."""
    closed = set(out.shard_names()) if is_primary() else set()
    missing = [_name(index * size) not in closed for index in range(len(cuts))]
    return [int(index) for index in np.flatnonzero(broadcast_from_primary(np.asarray(missing, bool)))]


def _lost(out: StageDir, cuts: Sequence[Sequence[TokenizedPrompt]], pending: Sequence[int], *, size: int) -> int:
    """Count the prompts of closed shards that have no rows: those that a server had no usable answers for."""
    closed = sorted(set(range(len(cuts))) - set(pending))
    answered = ({row.prompt_id for row in out.read_shard(Rollout, _name(index * size))} for index in closed)
    return sum(len(cuts[index]) - len(ids) for index, ids in zip(closed, answered, strict=True))


def _rollouts(
    sampler: Sampler, item: TokenizedPrompt, responses: Mapping[int, Sequence[Response]]
) -> Iterator[Rollout]:
    """The rows of a prompt's responses, by the number of their draw."""
    for number, spec in enumerate(sampler.specs):
        for sample, response in enumerate(responses[number], spec.first_sample):
            text, drawn = response.text, response.drawn_logprobs
            if text is None:
                text = sampler.runtime.tokenizer.decode(response.token_ids, after=item.text_ids_before)
            yield Rollout(
                rollout_id=f"{sampler.policy:03d}/{item.prompt.prompt_id}/{sample}",
                prompt_id=item.prompt.prompt_id,
                sample=sample,
                source=spec.source,
                policy=sampler.policy,
                text=text,
                token_ids=response.token_ids,
                prompt_token_ids=item.token_ids,
                logprob=None if response.logprobs is None else float(np.sum(response.logprobs)),
                finish=response.finish,
                drawn_logprob=None if drawn is None else float(np.sum(drawn)),
                in_thought=item.opens_thought,
            )
