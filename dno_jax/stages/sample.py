"""Sample K responses a prompt from the current policy into shards of Rollout rows."""

from __future__ import annotations

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
from dno_jax.records import Prompt, Rollout
from dno_jax.report.console import Meter
from dno_jax.run_dir import Manifest, StageDir, write_atomically
from dno_jax.sampling.engine import Generation, PromptBatch, Responses, generate, prompt_bucket
from dno_jax.sampling.transforms import Truncation
from dno_jax.stages.prompts import TokenizedPrompt, split_prompts, tokenize_prompts
from dno_jax.stages.runtime import Runtime
from dno_jax.training.checkpoint import policy_fingerprint


def run(config: RunConfig, iteration: int) -> Manifest:
    """Sample iteration t's prompts from policy t; rows already in closed shards are not sampled again."""
    start = time.perf_counter()
    runtime = Runtime.start(config)
    stage = runtime.run_dir.stage("sample", iteration)
    prompts = split_prompts(config).training[iteration]
    prompts_path = runtime.run_dir.prompts_path(iteration)
    if is_primary():
        _keep_prompts(prompts_path, prompts)
    barrier(f"prompts {iteration}")
    inputs = stage.reference_of(prompts_path) | policy_input(runtime, iteration)
    if manifest := stage.finished(inputs, config_digest=runtime.config_digest):
        return manifest
    tokenized, dropped = tokenize_prompts(prompts, encode=runtime.tokenizer.prompt_ids, section=config.prompts)
    params = runtime.load_for_decoding(iteration)
    sample_to_shards(
        runtime,
        params,
        tokenized,
        out=stage,
        policy=iteration,
        num_samples=config.sampling.num_samples,
        description=f"sample    {iteration}",
        gold_too=True,
    )
    if is_primary():
        rollouts = list(stage.read(Rollout))
        dropped.update(_gold_drops(rollouts, prompts))
        stage.finish(
            config_digest=runtime.config_digest,
            inputs=inputs,
            rows=len(rollouts),
            dropped=dropped,
            seconds=time.perf_counter() - start,
            details=response_statistics(rollouts),
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


def _keep_prompts(path: epath.Path, prompts: Sequence[Prompt]) -> None:
    """Write the iteration's prompts, once: what was sampled from must not change under its samples."""
    text = "".join(prompt.model_dump_json() + "\n" for prompt in prompts)
    if not path.exists():
        write_atomically(path, text)
    elif path.read_text() != text:
        raise DnoError(
            f"{path}: the prompt file has changed since this iteration began; restore it, or start another run_dir"
        )


def policy_input(runtime: Runtime[RunConfig], policy: int) -> dict[str, str]:
    """The entry of a manifest's `inputs` that names a policy by its fingerprint."""
    return {f"policies/{policy:03d}": policy_fingerprint(runtime.run_dir.policy(policy)) or "missing"}


def sample_to_shards(
    runtime: Runtime[RunConfig],
    params: Any,
    prompts: Sequence[TokenizedPrompt],
    *,
    out: StageDir,
    policy: int,
    num_samples: int,
    description: str,
    gold_too: bool = False,
) -> None:
    """Sample every prompt that has no closed shard yet; each process writes the prompts that its devices hold.

    Batches are cut from the whole list, so that a restart, another mesh or another number of processes runs the same
    programs on the same rows.
    """
    config = runtime.config
    generation = Generation(
        num_samples=num_samples,
        max_new_tokens=config.sampling.max_new_tokens,
        end_ids=runtime.end_ids,
        truncation=Truncation(
            temperature=config.sampling.temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            min_p=config.sampling.min_p,
        ),
        seed=config.seed,
    )
    size = config.sampling.batch_prompts
    batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    pending = _unfinished(out, batches)
    done = sum(len(batch) for index, batch in enumerate(batches) if index not in pending)
    written: _Batch | None = None
    with Meter(description, total=len(prompts), unit="prompts", done=done, enabled=is_primary()) as meter:
        for index in pending:
            responses = _dispatch(runtime, params, batches[index], generation=generation, policy=policy)
            # The device works on this batch while the host writes the one before.
            if written is not None:
                _write(runtime, written, out=out, policy=policy, gold_too=gold_too)
                meter.advance(len(written.prompts))
            written = _Batch(index * size, batches[index], responses)
        if written is not None:
            _write(runtime, written, out=out, policy=policy, gold_too=gold_too)
            meter.advance(len(written.prompts))
    barrier(f"sampled {out.path}")


@dataclass(frozen=True)
class _Batch:
    first: int  # place of its first prompt in the whole list
    prompts: Sequence[TokenizedPrompt]
    responses: Responses


def _unfinished(out: StageDir, batches: Sequence[Sequence[TokenizedPrompt]]) -> list[int]:
    """Indices of the batches with a prompt that no closed shard holds; process 0 says which, for all."""
    found = {rollout.prompt_id for rollout in out.read(Rollout)} if is_primary() else set()
    missing = [any(item.prompt.prompt_id not in found for item in batch) for batch in batches]
    return [int(index) for index in np.flatnonzero(same_everywhere(np.asarray(missing, bool)))]


def _dispatch(
    runtime: Runtime[RunConfig], params: Any, prompts: Sequence[TokenizedPrompt], *, generation: Generation, policy: int
) -> Responses:
    """Start the generation of one batch; short batches are filled up with rows of padding."""
    config = runtime.config
    rows = config.sampling.batch_prompts
    length = prompt_bucket(max(len(item.token_ids) for item in prompts), max_length=config.prompts.max_length)
    token = np.zeros((rows, length), np.int32)
    position = np.full((rows, length), -1, np.int32)
    name = np.zeros(rows, np.uint32)
    for row, item in enumerate(prompts):
        token[row, : len(item.token_ids)] = item.token_ids
        position[row, : len(item.token_ids)] = np.arange(len(item.token_ids))
        name[row] = item.name
    batch = PromptBatch(token=token, position=position, name=name)
    shardings = jax.tree.map(lambda leaf: row_sharding(runtime.mesh, ndim=leaf.ndim), batch)
    return generate(
        params,
        to_device(batch, shardings),
        model=runtime.model(DECODE),
        generation=generation,
        iteration=jnp.int32(policy),
    )


def _write(runtime: Runtime[RunConfig], batch: _Batch, *, out: StageDir, policy: int, gold_too: bool) -> None:
    """Write the shard of those rows of a finished batch that this process owns."""
    columns = {name: owned_rows(getattr(batch.responses, name)) for name in ("token", "length", "logprob", "stopped")}
    num_samples = batch.responses.token.shape[0] // runtime.config.sampling.batch_prompts
    mine = sorted({row // num_samples for row in columns["token"]})
    mine = [index for index in mine if index < len(batch.prompts)]
    rollouts: list[Rollout] = []
    for index in mine:
        item = batch.prompts[index]
        for sample in range(num_samples):
            row = index * num_samples + sample
            token_ids = tuple(columns["token"][row][: columns["length"][row]].tolist())
            rollouts.append(
                Rollout(
                    rollout_id=f"{policy:03d}/{item.prompt.prompt_id}/{sample}",
                    prompt_id=item.prompt.prompt_id,
                    sample=sample,
                    policy=policy,
                    text=runtime.tokenizer.decode(token_ids),
                    token_ids=token_ids,
                    prompt_token_ids=item.token_ids,
                    logprob=float(columns["logprob"][row]),
                    finish="stop" if columns["stopped"][row] else "length",
                )
            )
        gold = item.prompt.gold
        if gold_too and gold and gold.strip():
            rollout_id = f"{policy:03d}/{item.prompt.prompt_id}/gold"
            rollouts.append(gold_rollout(runtime, item, gold=gold, rollout_id=rollout_id))
    if mine:
        out.write_shard(f"{batch.first + mine[0]:07d}", rollouts)


def gold_rollout(runtime: Runtime[RunConfig], item: TokenizedPrompt, *, gold: str, rollout_id: str) -> Rollout:
    """The teacher's response as a candidate like any other: tokenised once, cut where the student's would be."""
    config = runtime.config
    ids = runtime.tokenizer.response_ids(item.prompt.messages, gold, end_id=runtime.end_ids[0])
    whole = len(ids) <= config.sampling.max_new_tokens
    ids = ids[: config.sampling.max_new_tokens]
    return Rollout(
        rollout_id=rollout_id,
        prompt_id=item.prompt.prompt_id,
        sample=-1,
        policy=None,
        # The judge reads what is trained on, also where that was cut.
        text=gold if whole else runtime.tokenizer.decode(ids),
        token_ids=ids,
        prompt_token_ids=item.token_ids,
        logprob=None,
        finish="stop" if whole else "length",
    )


def _gold_drops(rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> Counter[str]:
    have = {rollout.prompt_id for rollout in rollouts if rollout.is_gold}
    empty = sum(prompt.gold is not None and prompt.prompt_id not in have for prompt in prompts)
    return Counter({"gold response empty": empty} if empty else {})


def response_statistics(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Lengths and endings of the policy's own responses."""
    own = [rollout for rollout in rollouts if not rollout.is_gold]
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
