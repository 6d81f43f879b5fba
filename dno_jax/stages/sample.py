"""The candidates of an iteration: K samples a prompt and the teacher's response, in shards of Rollout rows."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from dno_jax.config import RunConfig
from dno_jax.errors import DnoError
from dno_jax.parallel.mesh import barrier, is_primary, same_everywhere, wait_until
from dno_jax.records import Prompt, Rollout, Source
from dno_jax.report.console import Meter
from dno_jax.run_dir import Manifest, StageDir, write_atomically
from dno_jax.sampling.engine import Statistics
from dno_jax.sampling.requests import Finished, Request, Response
from dno_jax.sampling.state import Mixture, Sizes
from dno_jax.stages import audit
from dno_jax.stages.prompts import TokenizedPrompt, split_prompts, tokenize_prompts
from dno_jax.stages.runtime import Runtime
from dno_jax.stages.sampler import Wanted, ask_server, draw, generation_of, plan
from dno_jax.stages.scheme import center_of, mixture_weight


def run(config: RunConfig, iteration: int) -> Manifest:
    """Draw iteration t's candidates; rows already in closed shards are not drawn again."""
    start = time.perf_counter()
    runtime = Runtime.start(config)
    run_dir = runtime.run_dir
    stage = run_dir.stage("sample", iteration)
    prompts = split_prompts(config).training[iteration]
    tokenized, dropped = tokenize_prompts(prompts, tokenizer=runtime.tokenizer, section=config.prompts)
    prompts_path = run_dir.prompts_path(iteration)
    if is_primary():
        # The judge reads what was sampled from, also where that was truncated.
        shown = {item.prompt.prompt_id: item.prompt for item in tokenized}
        _keep_prompts(prompts_path, [shown.get(prompt.prompt_id, prompt) for prompt in prompts])
    barrier(f"prompts {iteration}")
    weight = mixture_weight(config, iteration)
    policies = {"policy": run_dir.policy(iteration)}
    if config.sampling.source == "mixture" or config.sampling.num_opponents:
        policies["center"] = center_of(config, iteration)
    inputs = stage.reference_of(prompts_path) | runtime.policy_inputs(*policies.values())
    if manifest := stage.finished(inputs, config_digest=runtime.config_digest):
        return manifest
    drawn: dict[str, Any] = {}
    if config.sampling.source == "data":
        if is_primary():
            given_to_shards(runtime, tokenized, out=stage, iteration=iteration)
    else:
        draws = _draws(config, weight)
        drawn = sample_to_shards(
            runtime,
            policies,
            tokenized,
            out=stage,
            policy=iteration,
            draws=draws,
            description=f"sample    {iteration}",
            gold_too=True,
        )
    audited = audit.run(runtime, stage, policy=iteration)
    if is_primary():
        rollouts = list(stage.read(Rollout))
        dropped.update(_gold_drops(rollouts, tokenized))
        truncated = sum(item.truncated for item in tokenized)
        stage.finish(
            config_digest=runtime.config_digest,
            inputs=inputs,
            rows=len(rollouts),
            dropped=dropped,
            seconds=time.perf_counter() - start,
            details=response_statistics(rollouts)
            | drawn
            | ({"truncated_prompts": truncated} if truncated else {})
            | ({"audit": audited} if audited else {}),
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


@dataclass(frozen=True)
class Draw:
    """Samples of one distribution: `num_samples` a prompt, numbered from `first_sample`.

    Attributes:
        weight: the center's share of the mixture; None draws from the policy alone.
    """

    source: Source
    num_samples: int
    first_sample: int = 0
    weight: float | None = None


def _draws(config: RunConfig, weight: float) -> tuple[Draw, ...]:
    section = config.sampling
    if section.source == "mixture":
        return (Draw("mixture", section.num_samples, weight=weight),)
    own = Draw("policy", section.num_samples)
    if not section.num_opponents:
        return (own,)
    return own, Draw("mixture", section.num_opponents, first_sample=section.num_samples, weight=weight)


def _keep_prompts(path: epath.Path, prompts: Sequence[Prompt]) -> None:
    """Write the iteration's prompts, once: what was sampled from must not change under its samples."""
    text = "".join(prompt.model_dump_json() + "\n" for prompt in prompts)
    if not path.exists():
        write_atomically(path, text)
    elif path.read_text() != text:
        raise DnoError(
            f"{path}: the prompt file has changed since this iteration began; restore it, or start another run_dir"
        )


def sample_to_shards(
    runtime: Runtime[RunConfig],
    policies: Mapping[str, epath.Path],
    prompts: Sequence[TokenizedPrompt],
    *,
    out: StageDir,
    policy: int,
    draws: Sequence[Draw],
    description: str,
    gold_too: bool = False,
) -> dict[str, Any]:
    """Sample every prompt that has no closed shard yet; return how the slots were used, for the manifest.

    Shards are cut from the whole list, alike on every machine. All candidates of a prompt are in one shard, which is
    closed, and can be judged, as soon as the last of its prompts is finished. Each part of the mesh takes every n-th
    shard and runs by itself.

    Args:
        policies: paths by name: "policy" that samples, and the mixture's "center" where a draw has one.
    """
    size = runtime.config.sampling.shard_prompts
    cuts = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    pending = _unfinished(out, cuts)
    part, server = runtime.part, runtime.config.sampling.engine == "openai"
    # A server is asked by one process; no device takes part.
    own = pending[part.index :: part.count] if not server else pending if is_primary() else []
    shards = {index: _Shard(index * size, cuts[index], {}) for index in own}
    requests = [Request(item.token_ids, item.name) for shard in shards.values() for item in shard.prompts]
    places = [(shard, place) for shard in shards.values() for place in range(len(shard.prompts))]
    details: dict[str, Any] = {}
    done = len(prompts) - sum(len(cuts[index]) for index in pending)
    if pending:
        finished = (
            _of_server(runtime, requests, places, draws=draws, policy=policy, details=details)
            if server
            else _of_devices(runtime, policies, requests, places, draws=draws, policy=policy, details=details)
        )
        with Meter(description, total=done + len(requests), unit="prompts", done=done, enabled=is_primary()) as meter:
            # Drawn in turn, so that a prompt's candidates of all distributions are there together.
            for number, found in _in_turn(finished):
                shard, place = places[found.index]
                if shard.add(place, number, found) < len(draws):
                    continue
                meter.advance(1)
                if shard.is_whole(len(draws)) and (part.leads or server):
                    _write(runtime, shard, out=out, policy=policy, draws=draws, gold_too=gold_too)
        for shard in shards.values():  # prompts that a server had no usable answers for are not sampled
            if server and shard.found and not shard.is_whole(len(draws)):
                _write(runtime, shard, out=out, policy=policy, draws=draws, gold_too=gold_too)
    barrier(f"sampled {out.path}")
    return details


@dataclass
class _Shard:
    """A file of rollouts in the making."""

    first: int  # place of its first prompt in the whole list
    prompts: Sequence[TokenizedPrompt]
    found: dict[int, dict[int, tuple[Response, ...]]]  # prompt -> draw -> responses

    def add(self, place: int, draw: int, finished: Finished) -> int:
        """Keep a prompt's responses of one draw; return of how many draws there are now."""
        own = self.found.setdefault(place, {})
        own[draw] = finished.responses
        return len(own)

    def is_whole(self, draws: int) -> bool:
        return len(self.found) == len(self.prompts) and all(len(own) == draws for own in self.found.values())


def _in_turn(streams: Sequence[Iterator[Finished]]) -> Iterator[tuple[int, Finished]]:
    """Take one item of each stream in turn, with the stream's number, until all have ended."""
    left = dict(enumerate(streams))
    while left:
        for number, stream in list(left.items()):
            if (found := next(stream, None)) is None:
                del left[number]
            else:
                yield number, found


def _of_devices(
    runtime: Runtime[RunConfig],
    policies: Mapping[str, epath.Path],
    requests: Sequence[Request],
    places: Sequence[tuple[_Shard, int]],
    *,
    draws: Sequence[Draw],
    policy: int,
    details: dict[str, Any],
) -> list[Iterator[Finished]]:
    """One stream a draw, from the devices of this process's part of the mesh."""
    config = runtime.config
    sizes: list[Sizes] = []
    for own in draws:  # before weights take the memory that is asked about
        wanted = Wanted(
            num_samples=own.num_samples,
            num_prompts=len(requests),
            prompt_length=config.prompts.max_length,
            max_new_tokens=config.sampling.max_new_tokens,
            num_policies=1 if own.weight is None else 2,
            max_total_tokens=config.sampling.max_total_tokens,
        )
        sizes.append(plan(runtime, wanted).program.sizes)
    params = {name: runtime.load_for_decoding(path) for name, path in policies.items()}

    def stream(own: Draw, size: Sizes) -> Iterator[Finished]:
        statistics = Statistics()
        mixture = None if own.weight is None else Mixture(params["center"], jnp.float32(own.weight))
        yield from draw(
            runtime,
            params["policy"],
            requests,
            before=lambda index: _before(_prompt(places, index)),
            generation=generation_of(runtime, num_samples=own.num_samples, first_sample=own.first_sample),
            sizes=size,
            iteration=policy,
            mixture=mixture,
            statistics=statistics,
        )
        details[f"slots {own.source}" if len(draws) > 1 else "slots"] = {
            "slots": size.slots,
            "utilisation": round(statistics.utilisation, 4),
            "decode_calls": statistics.decode_calls,
        }

    return [stream(own, size) for own, size in zip(draws, sizes, strict=True)]


def _of_server(
    runtime: Runtime[RunConfig],
    requests: Sequence[Request],
    places: Sequence[tuple[_Shard, int]],
    *,
    draws: Sequence[Draw],
    policy: int,
    details: dict[str, Any],
) -> list[Iterator[Finished]]:
    """One stream a draw, from the configured server."""
    counts: Counter[str] = Counter()

    def stream(own: Draw) -> Iterator[Finished]:
        yield from ask_server(
            runtime,
            requests,
            prompts=lambda index: _prompt(places, index).prompt,
            before=lambda index: _before(_prompt(places, index)),
            generation=generation_of(runtime, num_samples=own.num_samples, first_sample=own.first_sample),
            iteration=policy,
            counts=counts,
        )
        details["server"] = dict(counts)

    return [stream(own) for own in draws]


def _prompt(places: Sequence[tuple[_Shard, int]], index: int) -> TokenizedPrompt:
    shard, place = places[index]
    return shard.prompts[place]


def _unfinished(out: StageDir, cuts: Sequence[Sequence[TokenizedPrompt]]) -> list[int]:
    """Indices of the shards with a prompt that no closed one holds; process 0 says which, for all."""
    found = {rollout.prompt_id for rollout in out.read(Rollout)} if is_primary() else set()
    missing = [any(item.prompt.prompt_id not in found for item in cut) for cut in cuts]
    return [int(index) for index in np.flatnonzero(same_everywhere(np.asarray(missing, bool)))]


def _write(
    runtime: Runtime[RunConfig], shard: _Shard, *, out: StageDir, policy: int, draws: Sequence[Draw], gold_too: bool
) -> None:
    """Close a shard: the rollouts of its prompts, in their order."""
    rollouts: list[Rollout] = []
    for place in sorted(shard.found):
        item = shard.prompts[place]
        for own, responses in zip(draws, (shard.found[place][number] for number in range(len(draws))), strict=True):
            rollouts += [
                _rollout(runtime, item, response, sample=own.first_sample + k, source=own.source, policy=policy)
                for k, response in enumerate(responses)
            ]
        if gold_too and (gold := _gold(runtime, item, iteration=policy)):
            rollouts.append(gold)
    out.write_shard(f"{shard.first:07d}", rollouts)


def _rollout(
    runtime: Runtime[RunConfig],
    item: TokenizedPrompt,
    response: Response,
    *,
    sample: int,
    source: Source,
    policy: int,
) -> Rollout:
    text, drawn = response.text, response.drawn_logprobs
    return Rollout(
        rollout_id=f"{policy:03d}/{item.prompt.prompt_id}/{sample}",
        prompt_id=item.prompt.prompt_id,
        sample=sample,
        source=source,
        policy=policy,
        text=runtime.tokenizer.decode(response.token_ids, after=_before(item)) if text is None else text,
        token_ids=response.token_ids,
        prompt_token_ids=item.token_ids,
        logprob=None if response.logprobs is None else float(np.sum(response.logprobs)),
        finish=response.finish,
        drawn_logprob=None if drawn is None else float(np.sum(drawn)),
    )


def _before(item: TokenizedPrompt) -> tuple[int, ...]:
    """What a response's text goes on from: the prompt where the assistant has begun, else nothing."""
    return item.token_ids if item.prompt.assistant_prefix else ()


def given_to_shards(
    runtime: Runtime[RunConfig], prompts: Sequence[TokenizedPrompt], *, out: StageDir, iteration: int
) -> None:
    """Turn the candidates that come with the data into rollouts: offline methods sample nothing.

    Raises:
        DnoError: a prompt without candidates.
    """
    size = runtime.config.sampling.shard_prompts
    for first in range(0, len(prompts), size):
        rollouts: list[Rollout] = []
        for item in prompts[first : first + size]:
            if not item.prompt.candidates:
                raise DnoError(
                    f"prompt {item.prompt.prompt_id!r} of {runtime.config.prompts.path} has no candidates, which "
                    'sampling.source=data trains on: give {"candidates": [{"text": ..., "score": ...}, ...]}'
                )
            name = f"{iteration:03d}/{item.prompt.prompt_id}"
            rollouts += [
                fixed_rollout(
                    runtime, item, text=given.text, rollout_id=f"{name}/{sample}", source="data", sample=sample
                )
                for sample, given in enumerate(item.prompt.candidates)
            ]
            if gold := _gold(runtime, item, iteration=iteration):
                rollouts.append(gold)
        out.write_shard(f"{first:07d}", rollouts)


def _gold(runtime: Runtime[RunConfig], item: TokenizedPrompt, *, iteration: int) -> Rollout | None:
    """The teacher's response as a candidate like any other, where there is one that can be ranked and tokenised."""
    gold = item.prompt.gold
    if not gold or not gold.strip():
        return None
    texts = {given.text.strip() for given in item.prompt.candidates}
    if runtime.config.annotation.kind == "given" and gold.strip() not in texts:
        return None  # nobody gave it points
    rollout_id = f"{iteration:03d}/{item.prompt.prompt_id}/gold"
    with contextlib.suppress(DnoError):  # counted in _gold_drops: one teacher's response is not worth a run
        return fixed_rollout(runtime, item, text=gold, rollout_id=rollout_id, source="gold", sample=-1)
    return None


def fixed_rollout(
    runtime: Runtime[RunConfig], item: TokenizedPrompt, *, text: str, rollout_id: str, source: Source, sample: int
) -> Rollout:
    """A response that no policy of this run wrote: tokenised once, cut where the student's would be."""
    config = runtime.config
    ids = runtime.tokenizer.response_ids(
        item.prompt.messages, text, end_id=runtime.end_ids[0], assistant_prefix=item.prompt.assistant_prefix
    )
    whole = len(ids) <= config.sampling.max_new_tokens
    ids = ids[: config.sampling.max_new_tokens]
    # The judge reads what is trained on, also where that was cut; points that came with the data are for all of it.
    keep = whole or config.annotation.kind == "given"
    return Rollout(
        rollout_id=rollout_id,
        prompt_id=item.prompt.prompt_id,
        sample=sample,
        source=source,
        policy=None,
        text=text if keep else runtime.tokenizer.decode(ids, after=_before(item)),
        token_ids=ids,
        prompt_token_ids=item.token_ids,
        logprob=None,
        finish="stop" if whole else "length",
    )


def _gold_drops(rollouts: Sequence[Rollout], prompts: Sequence[TokenizedPrompt]) -> Counter[str]:
    have = {rollout.prompt_id for rollout in rollouts if rollout.is_gold}
    lost = [item.prompt.gold for item in prompts if item.prompt.gold is not None and item.prompt.prompt_id not in have]
    return Counter("gold response without points or ids" if gold.strip() else "gold response empty" for gold in lost)


def response_statistics(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Lengths and endings of the policy's own responses."""
    own = [rollout for rollout in rollouts if rollout.policy is not None]
    if not own:
        return {}
    tokens = np.asarray([len(rollout.token_ids) for rollout in own])
    words = np.asarray([len(rollout.text.split()) for rollout in own])
    return {
        "responses": len(own),
        "tokens": int(tokens.sum()),
        "mean_tokens": round(float(tokens.mean()), 2),
        "mean_words": round(float(words.mean()), 2),
        "std_words": round(float(words.std()), 2),
        "stopped": round(float(np.mean([rollout.finish == "stop" for rollout in own])), 4),
    }
