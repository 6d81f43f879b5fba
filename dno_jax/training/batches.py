"""Rows of token ids -> batches of few shapes, in an order that is a pure function of (seed, iteration, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import numpy as np

from dno_jax.addresses import Purpose, rng

Ids = Sequence[int] | np.ndarray  # token ids of one text


@dataclass(frozen=True)
class TrainingRow:
    """One pair (two sequences: chosen, rejected) or one supervised example (one sequence).

    Attributes:
        prompt_ids, response_ids: token ids of each sequence; the loss covers `response_ids`, end id included.
        previous_logprob, initial_logprob: log pi_t and log pi_ref of each response, nats; 0 where nothing reads them.
        reward: of each response, points or a win rate; zeros where nothing reads it.
        target: P(chosen preferred).
        weight: 1 for a pair; the number of response tokens for an example, so that its loss is a mean over tokens.
        name: the pair's id or the example's place, for messages.
    """

    prompt_ids: tuple[Ids, ...]
    response_ids: tuple[Ids, ...]
    previous_logprob: tuple[float, ...] = (0.0, 0.0)
    initial_logprob: tuple[float, ...] = (0.0, 0.0)
    reward: tuple[float, ...] = (0.0, 0.0)
    target: float = 1.0
    weight: float = 1.0
    name: str = ""

    @property
    def length(self) -> int:
        return max(len(p) + len(r) for p, r in zip(self.prompt_ids, self.response_ids, strict=True))

    @property
    def response_length(self) -> int:
        return max(len(response) for response in self.response_ids)


@flax.struct.dataclass
class PairBatch:
    """P rows of C sequences: C = 2 (chosen, rejected) for pairs, 1 for supervised examples. No shard splits a row.

    The fields are annotated loosely because the same structure carries arrays of either kind, shapes and shardings.
    """

    token: Any  # [P, C, T] int32
    position: Any  # [P, C, T] int32, -1 is padding
    response_mask: Any  # [P, C, T] bool
    previous_logprob: Any  # [P, C] float32, log pi_t, nats
    initial_logprob: Any  # [P, C] float32, log pi_ref, nats
    reward: Any  # [P, C] float32
    target: Any  # [P] float32
    weight: Any  # [P] float32, 0 on filler
    response_length: int = flax.struct.field(pytree_node=False)  # window that holds every response; static


def make_batch(rows: Sequence[TrainingRow], *, batch_size: int, max_length: int) -> PairBatch:
    """Pad rows to one shape, fill the batch up with rows of weight 0.

    Raises:
        ValueError: no rows, more rows than the batch holds, or a row longer than `max_length`.
    """
    if not 0 < len(rows) <= batch_size:
        raise ValueError(f"{len(rows)} rows for a batch of {batch_size}")
    longest = max(row.length for row in rows)
    if longest > max_length:
        raise ValueError(f"a row of {longest} tokens exceeds max_length {max_length}")
    length = length_bucket(longest, max_length=max_length)
    count = len(rows[0].prompt_ids)
    token = np.zeros((batch_size, count, length), np.int32)
    position = np.full((batch_size, count, length), -1, np.int32)
    mask = np.zeros((batch_size, count, length), bool)
    for i, row in enumerate(rows):
        for c, (prompt, response) in enumerate(zip(row.prompt_ids, row.response_ids, strict=True)):
            total = len(prompt) + len(response)
            token[i, c, : len(prompt)] = prompt
            token[i, c, len(prompt) : total] = response
            position[i, c, :total] = np.arange(total)
            mask[i, c, len(prompt) : total] = True
    filler = batch_size - len(rows)
    return PairBatch(
        token=token,
        position=position,
        response_mask=mask,
        previous_logprob=_column([row.previous_logprob[:count] for row in rows], filler),
        initial_logprob=_column([row.initial_logprob[:count] for row in rows], filler),
        reward=_column([row.reward[:count] for row in rows], filler),
        target=_column([row.target for row in rows], filler),
        weight=_column([row.weight for row in rows], filler),
        response_length=length_bucket(max(row.response_length for row in rows), max_length=length),
    )


def _column(values: list, filler: int) -> np.ndarray:
    array = np.asarray(values, np.float32)
    return np.concatenate([array, np.zeros((filler, *array.shape[1:]), np.float32)])


def length_bucket(length: int, *, max_length: int) -> int:
    """Return the padded length: max_length halved as often as the longest row allows, at least 32.

    Few shapes, few compiles.
    """
    bucket = max_length
    while bucket // 2 >= max(length, 32) and bucket % 2 == 0:
        bucket //= 2
    return bucket


def num_steps(num_rows: int, *, batch_size: int, num_epochs: int) -> int:
    """Optimiser steps; the last batch of an epoch may be partly filler, so that every row is used."""
    return -(-num_rows // batch_size) * num_epochs


def batch_order(
    num_rows: int, *, batch_size: int, num_epochs: int, seed: int, iteration: int, start: int = 0
) -> Iterator[np.ndarray]:
    """Yield the row indices of every batch from step `start` on.

    Each epoch is one permutation drawn from (seed, iteration, epoch) alone: a restart, another mesh or another number
    of processes sees the same order.
    """
    batches = -(-num_rows // batch_size)
    for epoch in range(start // batches, num_epochs):
        order = rng(Purpose.BATCH_ORDER, seed, iteration, epoch).permutation(num_rows)
        first = start % batches if epoch == start // batches else 0
        for batch in range(first, batches):
            yield order[batch * batch_size : (batch + 1) * batch_size]
