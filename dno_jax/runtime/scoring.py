"""Training rows to their log-probabilities under a frozen policy, in batches of like lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Int

from dno_jax.config import RunConfig
from dno_jax.parallel.sharding import TRAIN, row_sharding, to_device
from dno_jax.runtime.runtime import Runtime
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.step import score_step


def batches_by_length(lengths: Int[np.ndarray, " N"], *, size: int) -> list[Int[np.ndarray, " B"]]:
    """Indices of the rows of every batch: rows of like lengths together, so that a batch pads little."""
    order = np.argsort(lengths, kind="stable")
    return [order[first : first + size] for first in range(0, len(order), size)]


def frozen_logprobs(
    runtime: Runtime[RunConfig], policy: epath.Path, batches: Iterable[Sequence[TrainingRow]], *, size: int
) -> Iterator[jax.Array]:
    """Yield log pi(y|x) of every batch, [size, C] float32 nats, filler included, as training computes it.

    A batch's come when the next one is on its way: the device works while the host reads them.
    """
    config = runtime.config
    (params, frozen), model = runtime.load_trained(policy), runtime.programs.model(TRAIN)
    before: jax.Array | None = None
    for rows in batches:
        batch = make_batch(rows, batch_size=size, max_length=config.max_length)
        shardings = jax.tree.map(lambda leaf: row_sharding(runtime.mesh, ndim=leaf.ndim), batch)
        logprobs = score_step(
            params, to_device(batch, shardings), model=model, chunk=config.training.logprob_chunk, frozen=frozen
        )
        if before is not None:
            yield before
        before = logprobs
    if before is not None:
        yield before
