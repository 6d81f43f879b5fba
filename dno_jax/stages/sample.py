"""The candidates of an iteration: K samples a prompt and the teacher's response, in shards of Rollout rows."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dno_jax.config import RunConfig
from dno_jax.errors import DnoError
from dno_jax.parallel.mesh import barrier, is_primary, same_everywhere, wait_until
from dno_jax.parallel.sharding import DECODE, owned_rows, row_sharding, to_device
from dno_jax.records import Prompt, Rollout, Source
from dno_jax.report.console import Meter
from dno_jax.run_dir import Manifest, StageDir, write_atomically
from dno_jax.sampling.engine import Generation, Mixture, Responses, generate, pack_prompts, prompt_bucket
from dno_jax.sampling.transforms import Truncation
from dno_jax.stages import audit
from dno_jax.stages.prompts import TokenizedPrompt, split_prompts, tokenize_prompts
from dno_jax.stages.runtime import Runtime
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
    if config.sampling.source == "data":
        if is_primary():
            given_to_shards(runtime, tokenized, out=stage, iteration=iteration)
    else:
        params = {name: runtime.load_for_decoding(path) for name, path in policies.items()}
        mixture = Mixture(params["center"], jnp.float32(weight)) if "center" in params else None
        sample_to_shards(
            runtime,
            params["policy"],
            tokenized,
            out=stage,
            policy=iteration,
            draws=_draws(config, mixture),
            description=f"sample    {iteration}",
            gold_too=True,
        )
        del params, mixture  # the audit needs the trainer's
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
            | ({"truncated_prompts": truncated} if truncated else {})
            | ({"audit": audited} if audited else {}),
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


@dataclass(frozen=True)
class Draw:
    """Samples of one distribution: `num_samples` a prompt, numbered from `first_sample`."""

    source: Source
    num_samples: int
    first_sample: int = 0
    mixture: Mixture | None = None


def _draws(config: RunConfig, mixture: Mixture | None) -> tuple[Draw, ...]:
    section = config.sampling
    if section.source == "mixture":
        return (Draw("mixture", section.num_samples, mixture=mixture),)
    own = Draw("policy", section.num_samples)
    if not section.num_opponents:
        return (own,)
    return own, Draw("mixture", section.num_opponents, first_sample=section.num_samples, mixture=mixture)


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
    params: Any,
    prompts: Sequence[TokenizedPrompt],
    *,
    out: StageDir,
    policy: int,
    draws: Sequence[Draw],
    description: str,
    gold_too: bool = False,
) -> None:
    """Sample every prompt that has no closed shard yet; each process writes the prompts that its devices hold.

    Batches are cut from the whole list, so that a restart, another mesh or another number of processes runs the same
    programs on the same rows. All candidates of a prompt are in one shard, which can be judged as soon as it is closed.
    """
    size = runtime.config.sampling.batch_prompts
    batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    pending = _unfinished(out, batches)
    done = sum(len(batch) for index, batch in enumerate(batches) if index not in pending)
    written: _Batch | None = None
    with Meter(description, total=len(prompts), unit="prompts", done=done, enabled=is_primary()) as meter:
        for index in pending:
            responses = [_dispatch(runtime, params, batches[index], draw=draw, policy=policy) for draw in draws]
            # The device works on this batch while the host writes the one before.
            if written is not None:
                _write(runtime, written, out=out, policy=policy, gold_too=gold_too)
                meter.advance(len(written.prompts))
            written = _Batch(index * size, batches[index], list(zip(draws, responses, strict=True)))
        if written is not None:
            _write(runtime, written, out=out, policy=policy, gold_too=gold_too)
            meter.advance(len(written.prompts))
    barrier(f"sampled {out.path}")


@dataclass(frozen=True)
class _Batch:
    first: int  # place of its first prompt in the whole list
    prompts: Sequence[TokenizedPrompt]
    drawn: Sequence[tuple[Draw, Responses]]


def _unfinished(out: StageDir, batches: Sequence[Sequence[TokenizedPrompt]]) -> list[int]:
    """Indices of the batches with a prompt that no closed shard holds; process 0 says which, for all."""
    found = {rollout.prompt_id for rollout in out.read(Rollout)} if is_primary() else set()
    missing = [any(item.prompt.prompt_id not in found for item in batch) for batch in batches]
    return [int(index) for index in np.flatnonzero(same_everywhere(np.asarray(missing, bool)))]


def _dispatch(
    runtime: Runtime[RunConfig], params: Any, prompts: Sequence[TokenizedPrompt], *, draw: Draw, policy: int
) -> Responses:
    """Start the generation of one batch; short batches are filled up with rows of padding."""
    config = runtime.config
    generation = Generation(
        num_samples=draw.num_samples,
        first_sample=draw.first_sample,
        max_new_tokens=config.sampling.max_new_tokens,
        end_ids=runtime.end_ids,
        num_ids=runtime.tokenizer.vocab_size,
        truncation=Truncation(
            temperature=config.sampling.temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            min_p=config.sampling.min_p,
        ),
        seed=config.seed,
    )
    rows = config.sampling.batch_prompts
    length = prompt_bucket(max(len(item.token_ids) for item in prompts), max_length=config.prompts.max_length)
    names = [item.name for item in prompts]
    batch = pack_prompts([item.token_ids for item in prompts], names, num_rows=rows, length=length)
    shardings = jax.tree.map(lambda leaf: row_sharding(runtime.mesh, ndim=leaf.ndim), batch)
    return generate(
        params,
        to_device(batch, shardings),
        model=runtime.model(DECODE),
        generation=generation,
        iteration=jnp.int32(policy),
        mixture=draw.mixture,
    )


def _write(runtime: Runtime[RunConfig], batch: _Batch, *, out: StageDir, policy: int, gold_too: bool) -> None:
    """Write the shard of those rows of a finished batch that this process owns."""
    rollouts: dict[int, list[Rollout]] = {}
    for draw, responses in batch.drawn:
        columns = {name: owned_rows(getattr(responses, name)) for name in ("token", "length", "logprob", "stopped")}
        for row in sorted(columns["token"]):
            index, sample = divmod(row, draw.num_samples)
            if index >= len(batch.prompts):
                continue
            item, sample = batch.prompts[index], sample + draw.first_sample
            token_ids = tuple(columns["token"][row][: columns["length"][row]].tolist())
            rollouts.setdefault(index, []).append(
                Rollout(
                    rollout_id=f"{policy:03d}/{item.prompt.prompt_id}/{sample}",
                    prompt_id=item.prompt.prompt_id,
                    sample=sample,
                    source=draw.source,
                    policy=policy,
                    text=runtime.tokenizer.decode(token_ids, after=_before(item)),
                    token_ids=token_ids,
                    prompt_token_ids=item.token_ids,
                    logprob=float(columns["logprob"][row]),
                    finish="stop" if columns["stopped"][row] else "length",
                )
            )
    for index, own in rollouts.items():
        if gold_too and (gold := _gold(runtime, batch.prompts[index], iteration=policy)):
            own.append(gold)
    if rollouts:
        out.write_shard(f"{batch.first + min(rollouts):07d}", [row for own in rollouts.values() for row in own])


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
    size = runtime.config.sampling.batch_prompts
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
