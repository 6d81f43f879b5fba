"""Log-probabilities of every pair under the policies its loss is held to, to disk: numbers, never a second model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from dno_jax import stopping
from dno_jax.config import RunConfig
from dno_jax.console import Meter, say
from dno_jax.data.pair_table import PairRows, PairTable
from dno_jax.errors import DnoError
from dno_jax.parallel.cluster import barrier, broadcast_from_primary, is_primary, wait_until
from dno_jax.parallel.sharding import owned_rows
from dno_jax.records import ReferenceScore
from dno_jax.run_dir import RunDir
from dno_jax.runtime.exhausted import explained, training_settings
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.scheme import Update, update_of
from dno_jax.runtime.scoring import frozen_logprobs, scoring_batches
from dno_jax.stage_dir import Manifest, StageDir
from dno_jax.stages import audit
from dno_jax.training.checkpoint import policy_fingerprint

INITIAL = "initial"  # sub-folder of the scores under the initial policy
SCORED, SAMPLED = "scored", "sampled"  # where log pi_t of the policy's own samples comes from


def run(runtime: Runtime[RunConfig], iteration: int) -> Manifest:
    """Write log pi_t of iteration t's pairs, replayed ones too, and, where the loss reads it, log pi_ref.

    With `sampling.as_reference`, log pi_t of a pair of pi_t's own samples is what the sampler recorded: at temperature
    1 and over the whole vocabulary, whatever temperature and truncation it drew with. All other pairs are scored.
    When the option has changed, what an earlier call wrote is discarded, unless a finished training has read it.
    """
    start = time.perf_counter()
    config, run_dir = runtime.config, runtime.run_dir
    update = update_of(config, run_dir, iteration)
    stage = run_dir.stage("score", iteration)
    paired = run_dir.stage("pair", iteration)
    paired.require()
    policies = [update.previous] if update.initial is None else [update.previous, update.initial]
    inputs = stage.input_digest(paired.manifest_path) | runtime.policy_inputs(*policies)
    manifest = stage.finished(config, inputs)
    if manifest and run_dir.stage("train", iteration).manifest():
        return manifest
    source = _source(config, run_dir, update)
    if manifest and manifest.details.get("source") == source:
        return manifest
    if is_primary():
        stage.start(config)
    _discard_others(stage, keep=source)

    pairs = PairTable.load(paired)
    samples = samples_of(run_dir, update.previous)
    taken = np.zeros(len(pairs), bool)
    if source == SAMPLED:
        taken = _recorded(pairs, iteration=samples.iteration)
    if is_primary() and config.sampling.as_reference:
        say(f"score     {iteration}: {taken.sum()} of {len(pairs)} pairs have log pi_t from the sampler")
    if is_primary() and taken.any():
        rows = np.flatnonzero(taken)
        stage.write_shard(SAMPLED, _scores(pairs, rows, pairs.sampler_logprob[rows]))
    with explained(f"score of iteration {iteration}", training_settings(runtime.programs)):
        for policy, out in zip(policies, (stage, stage.sub(INITIAL)), strict=False):
            _score(
                runtime,
                policy,
                pairs,
                np.flatnonzero(~taken) if out is stage else np.arange(len(pairs)),
                out=out,
                prefix=f"{SAMPLED}-others-" if out is stage and source == SAMPLED else "",
                description=f"score     {iteration}",
            )
    if is_primary():
        stage.finish(
            config,
            inputs=inputs,
            rows=len(pairs),
            seconds=time.perf_counter() - start,
            details=reference_identity(runtime, update) | {SAMPLED: int(taken.sum())},
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


def samples_of(run_dir: RunDir, policy: epath.Path) -> StageDir:
    """The stage that samples from a policy."""
    return run_dir.stage("sample", int(policy.name))


def _recorded(pairs: PairTable, *, iteration: int) -> Bool[np.ndarray, " N"]:
    """Which pairs are of two samples of one policy, so that its sampler recorded both log-probabilities.

    Samples of the mixture count, as their record is pi_t's own. The teacher's and the data's responses have none, and
    what is recorded of replayed pairs is another policy's.
    """
    return (pairs.iteration == iteration) & ~np.isnan(pairs.sampler_logprob).any(axis=1)


def _scores(
    pairs: PairTable, rows: Int[np.ndarray, " rows"], logprobs: Float[np.ndarray, "rows 2"]
) -> Iterator[ReferenceScore]:
    for row, (chosen, rejected) in zip(rows, logprobs.tolist(), strict=True):
        name = pairs.pair_ids[int(row)].as_py()
        yield ReferenceScore(pair_id=name, chosen_logprob=chosen, rejected_logprob=rejected)


def _discard_others(stage: StageDir, *, keep: str) -> None:
    """Remove the manifest, and shards of log pi_t that came the other way: batches, and so shards, were others."""
    if is_primary():
        stage.manifest_path.unlink(missing_ok=True)
        for name, path in stage.shard_paths().items():
            if name.startswith(SAMPLED) != (keep == SAMPLED):
                path.unlink()
    barrier(f"reference {stage.path}")


def _score(
    runtime: Runtime[RunConfig],
    policy: epath.Path,
    pairs: PairTable,
    left: Int[np.ndarray, " left"],
    *,
    out: StageDir,
    prefix: str,
    description: str,
) -> None:
    """Write what is missing of one policy's scores; each process writes the rows that its devices hold.

    Args:
        left: the pairs to score.
    """
    if not left.size:
        return
    size = runtime.config.training.micro_batch_size or runtime.config.training.batch_size
    # A batch is a shard, so that a restart scores the very same batches.
    batches = [left[batch] for batch in scoring_batches(runtime, pairs.lengths[left], size=size)]
    prefix += "packed-" if runtime.programs.packing.packed else ""
    scored = pairs.placed(out.read(ReferenceScore))[1] if is_primary() else np.zeros(len(pairs), bool)
    missing = np.asarray([not scored[batch].all() for batch in batches])
    pending = np.flatnonzero(broadcast_from_primary(missing)).tolist()
    if not pending:
        return
    done = left.size - sum(batches[b].size for b in pending)
    rows = PairRows(pairs)
    found = frozen_logprobs(runtime, policy, rows, batches, size=size, wanted=pending)
    with Meter(description, total=left.size, unit="pairs", done=done, enabled=is_primary()) as meter:
        for index, logprobs in zip(pending, found, strict=True):
            batch = batches[index]
            mine = {row: value for row, value in owned_rows(logprobs).items() if row < batch.size}
            if mine:
                own = sorted(mine)
                values = np.asarray([mine[row] for row in own], np.float64)
                _check_finite(values, [pairs.pair_ids[int(row)].as_py() for row in batch[own]], policy=policy)
                out.write_shard(f"{prefix}{index * size + own[0]:07d}", _scores(pairs, batch[own], values))
            meter.advance(batch.size)
            stopping.heed()
    barrier(f"scored {out.path}")


def _check_finite(values: Float[np.ndarray, "rows 2"], pair_ids: Sequence[str], *, policy: epath.Path) -> None:
    """Raise DnoError where a log-probability is no number: nothing could be trained on it."""
    wrong = [name for name, own in zip(pair_ids, values, strict=True) if not np.isfinite(own).all()]
    if wrong:
        raise DnoError(
            f"{policy}: log-probabilities of {len(wrong)} pairs are NaN or infinite, such as that of {wrong[0]!r}: the "
            "policy's weights overflow. Nothing of that batch is kept. Try model.dtype=float32, or train the policy "
            "anew with a smaller optimizer.learning_rate"
        )


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
    manifest = samples.manifest() if config.sampling.as_reference else None
    if manifest is None or "audit" not in manifest.details:
        return SCORED
    audit.check(manifest.details["audit"], config=config, place=samples.path)
    return SAMPLED
