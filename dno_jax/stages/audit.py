"""Whether sampler and trainer agree: the log-probabilities of the same responses, from both, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dno_jax.addresses import Purpose, order
from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.errors import DnoError
from dno_jax.parallel.cluster import is_primary
from dno_jax.parallel.sharding import replicated, reshard
from dno_jax.records import Rollout
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.scoring import frozen_logprobs, scoring_batches
from dno_jax.training.batches import TrainingRow

# Where sampling.audit_bound is not given. Rounding differs from token to token: the sums of n tokens part by about
# sqrt(n) times what one does. Largest `error` of 220 responses of stories260K, of 1 to 256 tokens, on a CPU: 1.2e-5 in
# float32, 0.16 in bfloat16 (about the same at all lengths); of a Mixtral with random weights 1.2e-5 and 0.26.
# By the dtype of the model and that of the cache, the coarser of them. Caches of int8 and float8 gave 0.10 and 0.23.
AUDIT_BOUNDS = {"float32": 1e-4, "bfloat16": 0.5, "int8": 0.5, "float8_e4m3fn": 1.0}

# Before the first update the policy is pi_t of its own loss, so log pi/pi_t is zero up to rounding. Nats per response:
# far above the rounding of each dtype, far below what another policy, tokenizer or mask gives.
STEP_ZERO_TOLERANCE = {"float32": 1e-2, "bfloat16": 1.0}


def run(runtime: Runtime[RunConfig], rollouts: Sequence[Rollout], *, policy: int, place: epath.Path) -> dict[str, Any]:
    """Compare, on all processes together, what the sampler recorded with what the trainer computes.

    It comes when all is sampled, as
    it needs the weights as training lays them out. By then the judge has read most shards: its verdicts are of the
    texts, which a failed audit says nothing against. So nothing is thrown away. The shards stay, the stage stays
    unfinished, nothing is paired or trained, and a rerun samples nothing: it audits again, by what then is set.

    Args:
        rollouts: of every closed shard what `audited` picks, the same on every process.
        policy: index t of pi_t, which drew them, alone or in the mixture.
        place: the folder that they lie in, for messages.

    Returns:
        `statistics`, with the bound and the dtype; empty where nothing was to be audited.

    Raises:
        DnoError: the two disagree (see `check`).
    """
    config = runtime.config
    if config.sampling.engine == "openai":  # a server need not give log-probs; ours always does
        rollouts = [rollout for rollout in rollouts if rollout.logprob is not None]
    if not rollouts:
        return {}
    trainer = _trainer_logprobs(runtime, runtime.run_dir.policy(policy), rollouts)
    found = statistics(rollouts, trainer) | {"bound": bound_of(config), "dtype": config.model.dtype}
    if is_primary():
        say(
            f"audit     {policy}: {found['responses']} responses, {found['tokens']} tokens: sampler and trainer differ "
            f"by {found['mean']:.1e} nats per token, at most {found['max']:.1e}; largest error {found['error']:.1e}, "
            f"bound {found['bound']:g}"
        )
    check(found, config=config, place=place)
    return found


def bound_of(config: RunConfig) -> float:
    """The largest `error` that is agreement, nats."""
    given, dtype, cache = config.sampling.audit_bound, config.model.dtype, config.sampling.kv_dtype
    if given is not None:
        return given
    return max(AUDIT_BOUNDS[dtype], AUDIT_BOUNDS[dtype if cache == "auto" else cache])


def statistics(rollouts: Sequence[Rollout], trainer: Sequence[float]) -> dict[str, Any]:
    """Absolute differences of log pi_t(y|x) between the sampler's record and the trainer's figure.

    Args:
        rollouts: the policy's responses.
        trainer: log pi_t(y|x) of each, nats.

    Returns:
        responses, tokens; mean, max: of |difference| / tokens of a response, nats per token; mean_sum, max_sum: of
        |difference|, nats per response; error: the largest |difference| / sqrt(tokens), which does not depend on length
        where tokens err independently; worst, worst_sum: the responses of error and max_sum, with both numbers.
    """
    sampler = np.asarray([rollout.logprob for rollout in rollouts], np.float64)  # None, JSON's NaN, is NaN
    tokens = np.asarray([max(len(rollout.token_ids), 1) for rollout in rollouts])
    difference = np.abs(sampler - np.asarray(trainer, np.float64))
    error = difference / np.sqrt(tokens)

    def response(index: int) -> dict[str, Any]:
        return {
            "rollout_id": rollouts[index].rollout_id,
            "tokens": int(tokens[index]),
            "sampler": float(sampler[index]),
            "trainer": float(trainer[index]),
        }

    return {
        "responses": len(rollouts),
        "tokens": int(tokens.sum()),
        "mean": float(np.mean(difference / tokens)),
        "max": float(np.max(difference / tokens)),
        "mean_sum": float(np.mean(difference)),
        "max_sum": float(np.max(difference)),
        "error": float(np.max(error)),
        "worst": response(int(np.argmax(error))),  # a NaN is the worst
        "worst_sum": response(int(np.argmax(difference))),
    }


def check(found: Mapping[str, Any], *, config: RunConfig, place: epath.Path) -> None:
    """Raise where an audit's figures forbid using its samples.

    Raises:
        DnoError: a response differs by more than the bound times sqrt(tokens); or, with `sampling.as_reference`, one by
            more than the guard of training's first step lets pass, whose reference the sampler's figures would be.
    """
    dtype, bound, worst = config.model.dtype, bound_of(config), found["worst"]
    if not found["error"] <= bound:
        raise DnoError(
            f"{place}: sampler and trainer disagree on {_shown(worst)}: in {dtype} they may differ by "
            f"{bound * worst['tokens'] ** 0.5:.4g} nats, sampling.audit_bound={bound:g} times sqrt(tokens). If this is "
            f"rounding (bfloat16's, or a coarse KV cache's; on average it is {found['mean']:.2g} nats per token), set "
            f"sampling.audit_bound above {found['error']:.4g}: the samples are kept, a rerun only repeats the audit. "
            "Else a program is wrong: see in another run_dir whether model.attention=xla or model.dtype=float32 agrees"
        )
    tolerance = STEP_ZERO_TOLERANCE[dtype]
    if config.sampling.as_reference and not found["max_sum"] <= tolerance:
        raise DnoError(
            f"{place}: sampling.as_reference cannot hold: sampler and trainer differ by {found['max_sum']:.4g} nats "
            f"on {_shown(found['worst_sum'])}, and training's first step allows at most {tolerance:g} per response in "
            f"{dtype}; set sampling.as_reference=false (a score pass; nothing is sampled again)"
        )


def _shown(response: Mapping[str, Any]) -> str:
    return (
        f"rollout {response['rollout_id']!r} of {response['tokens']} tokens "
        f"(log pi_t: sampler {response['sampler']:.6g}, trainer {response['trainer']:.6g})"
    )


def audited(shard: Sequence[Rollout], *, policy: int, count: int) -> list[Rollout]:
    """The policy's responses to `count` prompts of a shard, drawn by their ids."""
    drawn = [row for row in shard if row.policy == policy] if count else []
    ids = sorted({row.prompt_id for row in drawn})
    chosen = {ids[index] for index in order(Purpose.AUDITED_PROMPTS, names=ids)[:count]}
    return [row for row in drawn if row.prompt_id in chosen]


def _trainer_logprobs(runtime: Runtime[RunConfig], policy: epath.Path, rollouts: Sequence[Rollout]) -> list[float]:
    """log pi(y|x) of every rollout, on every process, in the very batches' shapes that pairs are scored in."""
    size = runtime.config.training.micro_batch_size or runtime.config.training.batch_size
    by_length = sorted(
        range(len(rollouts)), key=lambda i: len(rollouts[i].prompt_token_ids) + len(rollouts[i].token_ids)
    )
    couples = [(by_length[i], by_length[min(i + 1, len(by_length) - 1)]) for i in range(0, len(by_length), 2)]
    rows = [
        TrainingRow(
            prompt_ids=(rollouts[a].prompt_token_ids, rollouts[b].prompt_token_ids),
            response_ids=(rollouts[a].token_ids, rollouts[b].token_ids),
        )
        for a, b in couples
    ]
    batches = scoring_batches(runtime, np.asarray([row.num_tokens for row in rows]), size=size)
    found = [0.0] * len(rollouts)
    logprobs = frozen_logprobs(runtime, policy, rows, batches, size=size)
    for batch, values in zip(batches, logprobs, strict=True):
        whole = np.asarray(reshard(values, replicated(runtime.mesh)))  # a process holds only its own devices' rows
        for index, pair in zip(batch, whole[: len(batch)], strict=True):
            for rollout, value in zip(couples[index], pair, strict=True):
                found[rollout] = float(value)
    return found
