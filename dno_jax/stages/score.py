"""Log-probabilities of every pair under the policies its loss is held to, to disk: numbers, never a second model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from etils import epath

from dno_jax.config import RunConfig
from dno_jax.console import Meter, say
from dno_jax.data.rows import batches_by_length, frozen_logprobs, load_pairs, training_rows
from dno_jax.parallel.mesh import barrier, broadcast_from_primary, is_primary, wait_until
from dno_jax.parallel.sharding import owned_rows
from dno_jax.records import Pair, ReferenceScore, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.scheme import Update, update_of
from dno_jax.stage_dir import Manifest, StageDir
from dno_jax.stages import audit
from dno_jax.training.batches import TrainingRow
from dno_jax.training.checkpoint import policy_fingerprint

INITIAL = "initial"  # sub-folder of the scores under pi_ref
SCORED, SAMPLED = "scored", "sampled"  # where log pi_t of the policy's own samples comes from


def run(runtime: Runtime[RunConfig], iteration: int, *, stage_name: str = "score") -> Manifest:
    """Write log pi_t of iteration t's pairs, replayed ones too, and, where the loss reads it, log pi_ref.

    With `sampling.as_reference`, log pi_t of a pair of pi_t's own samples is what the sampler recorded: at temperature
    1 and over the whole vocabulary, whatever temperature and truncation it drew with. All other pairs are scored.
    When the option was switched, what an earlier call wrote is discarded, unless a finished training has read it.
    """
    start = time.perf_counter()
    config, run_dir = runtime.config, runtime.run_dir
    update = update_of(config, run_dir, iteration, stage=stage_name)
    stage = run_dir.stage(stage_name, iteration)
    paired = run_dir.stage("pair", iteration)
    paired.require()
    policies = [update.previous] if update.initial is None else [update.previous, update.initial]
    inputs = stage.input_digest(paired.manifest_path) | runtime.policy_inputs(*policies)
    manifest = stage.finished(config, inputs)
    if manifest and run_dir.stage(update.train, iteration).manifest():
        return manifest
    source = _source(config, run_dir, update)
    if manifest and manifest.details.get("source") == source:
        return manifest
    if is_primary():
        stage.start(config)
    _discard_others(stage, keep=source)

    pairs = load_pairs(run_dir, iteration)
    rows = training_rows(run_dir, pairs)
    samples = samples_of(run_dir, update.previous)
    taken = _recorded(samples, pairs) if source == SAMPLED and samples else {}
    if is_primary() and config.sampling.as_reference:
        say(f"{stage_name:<9} {iteration}: {len(taken)} of {len(pairs)} pairs have log pi_t from the sampler")
    if is_primary() and taken:
        stage.write_shard(SAMPLED, taken.values())
    for policy, out in zip(policies, (stage, stage.sub(INITIAL)), strict=False):
        left = [i for i, pair in enumerate(pairs) if out is not stage or pair.pair_id not in taken]
        _score(
            runtime,
            policy,
            [pairs[i] for i in left],
            [rows[i] for i in left],
            out=out,
            prefix=f"{SAMPLED}-others-" if out is stage and source == SAMPLED else "",
            description=f"{stage_name:<9} {iteration}",
        )
    if is_primary():
        stage.finish(
            config,
            inputs=inputs,
            rows=len(pairs),
            seconds=time.perf_counter() - start,
            details=reference_identity(runtime, update) | {SAMPLED: len(taken)},
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


def samples_of(run_dir: RunDir, policy: epath.Path) -> StageDir | None:
    """The stage that samples from a policy; None for the optimistic scheme's auxiliary ones, which nobody samples."""
    return run_dir.stage("sample", int(policy.name)) if policy.name.isdecimal() else None


def _recorded(samples: StageDir, pairs: Sequence[Pair]) -> dict[str, ReferenceScore]:
    """Scores, by id, of the pairs of two samples of one policy, as its sampler recorded them.

    Samples of the mixture count, as their record is pi_t's own. The teacher's and the data's responses have none;
    replayed ones are in other iterations' samples.
    """
    wanted = {name for pair in pairs for name in (pair.chosen_id, pair.rejected_id)}
    found = {
        rollout.rollout_id: rollout.logprob
        for rollout in samples.read(Rollout)
        if rollout.policy == samples.iteration and rollout.logprob is not None and rollout.rollout_id in wanted
    }
    return {
        pair.pair_id: ReferenceScore(
            pair_id=pair.pair_id, chosen_logprob=found[pair.chosen_id], rejected_logprob=found[pair.rejected_id]
        )
        for pair in pairs
        if pair.chosen_id in found and pair.rejected_id in found
    }


def _discard_others(stage: StageDir, *, keep: str) -> None:
    """Remove the manifest, and shards of log pi_t that came the other way: batches, and so shards, were others."""
    if is_primary():
        for name in stage.shard_names():
            if name.startswith(SAMPLED) != (keep == SAMPLED):
                (stage.path / f"{name}.jsonl").unlink()
        stage.manifest_path.unlink(missing_ok=True)
    barrier(f"reference {stage.path}")


def _score(
    runtime: Runtime[RunConfig],
    policy: epath.Path,
    pairs: Sequence[Pair],
    rows: Sequence[TrainingRow],
    *,
    out: StageDir,
    prefix: str,
    description: str,
) -> None:
    """Write what is missing of one policy's scores; each process writes the rows that its devices hold."""
    if not rows:
        return
    size = runtime.config.training.micro_batch_size or runtime.config.training.batch_size
    batches = batches_by_length(rows, size=size)  # a batch is a shard, so that a restart scores the very same batches
    scored = {score.pair_id for score in out.read(ReferenceScore)} if is_primary() else set()
    missing = [any(pairs[i].pair_id not in scored for i in batch) for batch in batches]
    pending = [int(b) for b in np.flatnonzero(broadcast_from_primary(np.asarray(missing, bool)))]
    if not pending:
        return
    done = len(pairs) - sum(len(batches[b]) for b in pending)
    batched = ([rows[i] for i in batches[b]] for b in pending)
    with Meter(description, total=len(pairs), unit="pairs", done=done, enabled=is_primary()) as meter:
        for index, logprobs in zip(pending, frozen_logprobs(runtime, policy, batched, size=size), strict=True):
            mine = {row: value for row, value in owned_rows(logprobs).items() if row < len(batches[index])}
            scores = [
                ReferenceScore(
                    pair_id=pairs[batches[index][row]].pair_id,
                    chosen_logprob=float(value[0]),
                    rejected_logprob=float(value[1]),
                )
                for row, value in sorted(mine.items())
            ]
            if scores:
                out.write_shard(f"{prefix}{index * size + min(mine):07d}", scores)
            meter.advance(len(batches[index]))
    barrier(f"scored {out.path}")


def reference_identity(runtime: Runtime[RunConfig], update: Update) -> dict[str, str | int]:
    """What the numbers on disk are numbers of, and who gave them; training refuses any other."""
    config = runtime.config
    return {
        "policy": update.previous.name,
        "fingerprint": policy_fingerprint(update.previous) or "missing",
        "initial": (update.initial and policy_fingerprint(update.initial)) or "",
        "tokenizer": runtime.tokenizer.digest,
        "max_length": config.max_length,
        "dtype": config.model.dtype,
        "source": _source(config, runtime.run_dir, update),
    }


def _source(config: RunConfig, run_dir: RunDir, update: Update) -> str:
    """Whether log pi_t of pi_t's own samples is scored or the sampler's; what nobody audited is scored.

    Raises:
        DnoError: the sampler's is asked for and is too far from the trainer's (see `audit.check`).
    """
    samples = samples_of(run_dir, update.previous)
    manifest = samples.manifest() if samples and config.sampling.as_reference else None
    if samples is None or manifest is None or "audit" not in manifest.details:
        return SCORED
    audit.check(manifest.details["audit"], config=config, place=samples.path)
    return SAMPLED
