"""Training rows to their log-probabilities under a frozen policy, in batches that pad little."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int

from dno_jax.config import RunConfig
from dno_jax.parallel.sharding import TRAIN
from dno_jax.runtime.runtime import ConfigT, Runtime
from dno_jax.training.batches import TrainingRow, make_batch, text_lengths
from dno_jax.training.packing import plan_batches
from dno_jax.training.step import score_step


def scoring_batches(runtime: Runtime[ConfigT], lengths: Int[np.ndarray, " N"], *, size: int) -> list[np.ndarray]:
    """Indices of the rows of every batch of up to `size`.

    Packed, each has its share of the long ones and of the short, so that all are of one size; otherwise rows of like
    lengths are together.
    """
    order = np.argsort(lengths, kind="stable")
    if runtime.programs.packing.packed:
        return [order[first :: -(-len(order) // size)] for first in range(-(-len(order) // size))]
    return [order[first : first + size] for first in range(0, len(order), size)]


def frozen_logprobs(
    runtime: Runtime[RunConfig],
    policy: epath.Path,
    rows: Sequence[TrainingRow],
    batches: Sequence[np.ndarray],
    *,
    size: int,
    wanted: Iterable[int] | None = None,
) -> Iterator[jax.Array]:
    """Yield log pi(y|x) of batches, [P, C] float32 nats in their order, filler after them, as training computes it.

    A batch's come when the next one is on its way: the device works while the host reads them.

    Args:
        batches: indices of the rows of each; their shapes follow from all of them.
        wanted: which batches to go through; None: all.
    """
    yield from logprobs_of(runtime, runtime.load_trained(policy), rows, batches, size=size, wanted=wanted)


def logprobs_of(
    runtime: Runtime[ConfigT],
    weights: tuple[Any, Any],
    rows: Sequence[TrainingRow],
    batches: Sequence[np.ndarray],
    *,
    size: int,
    wanted: Iterable[int] | None = None,
) -> Iterator[jax.Array]:
    """Yield the same under weights that are here; of a reward model its rewards.

    Args:
        weights: what is trained, and what stands beside it, or None.
    """
    config, programs = runtime.config, runtime.programs
    lengths = text_lengths(rows)
    plan = plan_batches(lengths, batches, programs.packing, batch_size=size, max_length=config.max_length)
    (params, frozen), model = weights, programs.model(TRAIN)
    before: jax.Array | None = None
    for index in range(len(batches)) if wanted is None else wanted:
        batch = make_batch([rows[i] for i in batches[index]], batch_size=size, max_length=config.max_length, plan=plan)
        chunk = config.training.logprob_chunk
        logprobs = score_step(params, batch.place(runtime.mesh), model=model, chunk=chunk, frozen=frozen)
        if before is not None:
            yield before
        before = logprobs
    if before is not None:
        yield before
