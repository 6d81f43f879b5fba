"""From Pair rows to training rows, the token ids that were sampled, and from those to their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import jax
from etils import epath

from dno_jax.config import RunConfig
from dno_jax.errors import DnoError
from dno_jax.parallel.sharding import TRAIN, row_sharding, to_device
from dno_jax.records import Pair, ReferenceScore, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.step import score_step


def load_pairs(run_dir: RunDir, iteration: int) -> list[Pair]:
    """Every pair of an iteration, new and replayed, in order of id: the order that training permutes."""
    return sorted(run_dir.stage("pair", iteration).read(Pair), key=lambda pair: pair.pair_id)


def training_rows(
    run_dir: RunDir,
    pairs: Iterable[Pair],
    previous: Iterable[ReferenceScore] | None = None,
    initial: Iterable[ReferenceScore] | None = None,
) -> list[TrainingRow]:
    """Return one row a pair: the token ids of its rollouts, its rewards, and its reference log-probabilities.

    Args:
        previous, initial: log pi_t and log pi_ref of every pair; None gives zeros, which only a loss that does not read
            them may take.

    Raises:
        DnoError: a rollout or a reference score that a pair names is missing.
    """
    pairs = list(pairs)
    wanted = {name for pair in pairs for name in (pair.chosen_id, pair.rejected_id)}
    rollouts: dict[str, Rollout] = {}
    for iteration in sorted({pair.iteration for pair in pairs}):
        for rollout in run_dir.stage("sample", iteration).read(Rollout):
            if rollout.rollout_id in wanted:
                rollouts[rollout.rollout_id] = rollout
    for pair in pairs:
        for name in (pair.chosen_id, pair.rejected_id):
            if name not in rollouts:
                raise DnoError(f"pair {pair.pair_id!r} names rollout {name!r}, which is in no shard of {run_dir.path}")
    columns = zip(pairs, _logprobs(pairs, previous), _logprobs(pairs, initial), strict=True)
    rows = []
    for pair, previous_logprob, initial_logprob in columns:
        chosen, rejected = rollouts[pair.chosen_id], rollouts[pair.rejected_id]
        rows.append(
            TrainingRow(
                prompt_ids=(chosen.prompt_token_ids, rejected.prompt_token_ids),
                response_ids=(chosen.token_ids, rejected.token_ids),
                previous_logprob=previous_logprob,
                initial_logprob=initial_logprob,
                reward=(pair.chosen_reward, pair.rejected_reward),
                target=pair.target,
                weight=pair.weight,
            )
        )
    return rows


def _logprobs(pairs: list[Pair], scores: Iterable[ReferenceScore] | None) -> list[tuple[float, float]]:
    if scores is None:
        return [(0.0, 0.0)] * len(pairs)
    found = {score.pair_id: (score.chosen_logprob, score.rejected_logprob) for score in scores}
    for pair in pairs:
        if pair.pair_id not in found:
            raise DnoError(f"pair {pair.pair_id!r} has no reference score; remove the reference folder and score again")
    return [found[pair.pair_id] for pair in pairs]


def batches_by_length(rows: Sequence[TrainingRow], *, size: int) -> list[list[int]]:
    """Indices of the rows of every batch: rows of like lengths together, so that a batch pads little."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].length, i))
    return [order[first : first + size] for first in range(0, len(order), size)]


def frozen_logprobs(
    runtime: Runtime[RunConfig], policy: epath.Path, batches: Iterable[Sequence[TrainingRow]], *, size: int
) -> Iterator[jax.Array]:
    """Yield log pi(y|x) of every batch, [size, C] float32 nats, filler included, as training computes it.

    A batch's come when the next one is on its way: the device works while the host reads them.
    """
    config = runtime.config
    params, model = runtime.load_policy(policy, TRAIN), runtime.programs.model(TRAIN)
    before: jax.Array | None = None
    for rows in batches:
        batch = make_batch(rows, batch_size=size, max_length=config.max_length)
        shardings = jax.tree.map(lambda leaf: row_sharding(runtime.mesh, ndim=leaf.ndim), batch)
        logprobs = score_step(params, to_device(batch, shardings), model=model, chunk=config.training.logprob_chunk)
        if before is not None:
            yield before
        before = logprobs
    if before is not None:
        yield before
