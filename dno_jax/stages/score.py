"""Log-probabilities of every pair under the policies its loss is held to, to disk: numbers, never a second model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from dno_jax.config import RunConfig
from dno_jax.parallel.mesh import barrier, is_primary, same_everywhere, wait_until
from dno_jax.parallel.sharding import TRAIN, owned_rows, row_sharding, to_device
from dno_jax.records import Pair, ReferenceScore
from dno_jax.report.console import Meter
from dno_jax.run_dir import Manifest, StageDir
from dno_jax.stages.rows import load_pairs, training_rows
from dno_jax.stages.runtime import Runtime
from dno_jax.stages.scheme import Update, update_of
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.checkpoint import policy_fingerprint
from dno_jax.training.step import score_step

INITIAL = "initial"  # sub-folder of the scores under pi_ref


def run(config: RunConfig, iteration: int, *, stage_name: str = "score") -> Manifest:
    """Score iteration t's pairs, replayed ones too, under pi_t and, where the loss reads it, under pi_ref."""
    start = time.perf_counter()
    runtime = Runtime.start(config)
    update = update_of(config, iteration, stage=stage_name)
    stage = runtime.run_dir.stage(stage_name, iteration)
    paired = runtime.run_dir.stage("pair", iteration)
    paired.require()
    policies = [update.previous] if update.initial is None else [update.previous, update.initial]
    inputs = stage.reference_of(paired.manifest_path) | runtime.policy_inputs(*policies)
    if manifest := stage.finished(inputs, config_digest=runtime.config_digest):
        return manifest

    pairs = load_pairs(runtime.run_dir, iteration)
    rows = training_rows(runtime.run_dir, pairs)
    for policy, out in zip(policies, (stage, stage.sub(INITIAL)), strict=False):
        _score(runtime, policy, pairs, rows, out=out, description=f"{stage_name:<9} {iteration}")
    if is_primary():
        stage.finish(
            config_digest=runtime.config_digest,
            inputs=inputs,
            rows=len(pairs),
            seconds=time.perf_counter() - start,
            details=reference_identity(runtime, update),
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


def _score(
    runtime: Runtime[RunConfig],
    policy: epath.Path,
    pairs: Sequence[Pair],
    rows: Sequence[TrainingRow],
    *,
    out: StageDir,
    description: str,
) -> None:
    """Write what is missing of one policy's scores; each process writes the rows that its devices hold."""
    config = runtime.config
    # By length, so that a batch pads little; a batch is a shard, so that a restart scores the very same batches.
    order = sorted(range(len(rows)), key=lambda i: (rows[i].length, i))
    size = config.training.micro_batch_size or config.training.batch_size
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    scored = {score.pair_id for score in out.read(ReferenceScore)} if is_primary() else set()
    missing = [any(pairs[i].pair_id not in scored for i in batch) for batch in batches]
    pending = [int(b) for b in np.flatnonzero(same_everywhere(np.asarray(missing, bool)))]
    if not pending:
        return
    params = runtime.load_policy(policy, TRAIN)
    model = runtime.model(TRAIN)

    def write(index: int, logprobs: jax.Array) -> None:
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
            out.write_shard(f"{index * size + min(mine):07d}", scores)
        meter.advance(len(batches[index]))

    done = len(pairs) - sum(len(batches[b]) for b in pending)
    with Meter(description, total=len(pairs), unit="pairs", done=done, enabled=is_primary()) as meter:
        before: tuple[int, jax.Array] | None = None
        for index in pending:
            batch = make_batch([rows[i] for i in batches[index]], batch_size=size, max_length=config.max_length)
            shardings = jax.tree.map(lambda leaf: row_sharding(runtime.mesh, ndim=leaf.ndim), batch)
            logprobs = score_step(params, to_device(batch, shardings), model=model, chunk=config.training.logprob_chunk)
            if before is not None:
                write(*before)
            before = (index, logprobs)
        if before is not None:
            write(*before)
    barrier(f"scored {out.path}")


def reference_identity(runtime: Runtime[RunConfig], update: Update) -> dict[str, str | int]:
    """What the numbers on disk are numbers of; training refuses any other."""
    config = runtime.config
    return {
        "policy": update.previous.name,
        "fingerprint": policy_fingerprint(update.previous) or "missing",
        "initial": (update.initial and policy_fingerprint(update.initial)) or "",
        "tokenizer": runtime.tokenizer.digest,
        "max_length": config.max_length,
        "dtype": config.model.dtype,
    }
