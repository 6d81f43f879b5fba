"""Rows of token ids -> batches of few shapes, in an order that is a pure function of (seed, iteration, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dno_jax.addresses import Purpose, rng
from dno_jax.model.places import Places
from dno_jax.parallel.sharding import ROW_AXES, AnyMesh, to_device
from dno_jax.training.packing import BatchShape, Layout, Packing, Plan, TextLengths, plan_batches

_WINDOW = 16  # batches among which rows are sorted by length

Ids = Sequence[int] | np.ndarray  # token ids of one text


@dataclass(frozen=True)
class TrainingRow:
    """One pair (two texts: chosen, rejected) or one supervised example (one text).

    Attributes:
        prompt_ids, response_ids: token ids of each text; the loss covers `response_ids`, end id included.
        previous_logprob, initial_logprob: log pi_t and log pi_ref of each response, nats; 0 where nothing reads them.
        reward: of each response, points or a win rate; zeros where nothing reads it.
        anchor: 1 for each response that the reference sampled: the forward KL divergence is of these.
        target: P(chosen preferred).
        own: 1 for each response that the policy sampled itself: estimates of its KL divergence are made of these.
        weight: 1 for a pair; the number of response tokens for an example, so that its loss is a mean over tokens.
        name: the pair's id or the example's place, for messages.
    """

    prompt_ids: tuple[Ids, ...]
    response_ids: tuple[Ids, ...]
    previous_logprob: tuple[float, ...] = (0.0, 0.0)
    initial_logprob: tuple[float, ...] = (0.0, 0.0)
    reward: tuple[float, ...] = (0.0, 0.0)
    own: tuple[float, ...] = (1.0, 1.0)
    anchor: tuple[float, ...] = (1.0, 1.0)
    target: float = 1.0
    weight: float = 1.0
    name: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens of its texts, each with its prompt."""
        return sum(map(len, self.prompt_ids)) + sum(map(len, self.response_ids))


@flax.struct.dataclass
class PairBatch:
    """M micro-batches: R rows of T tokens each, and P pairs of C texts whose tokens those are.

    C = 2 (chosen, rejected) for pairs, 1 for supervised examples. Devices split rows of tokens; what is of pairs lies
    on all of them, as a pair's texts may lie in any rows of its micro-batch. A micro-batch is the same without axis M.
    The fields are annotated loosely because the same structure carries arrays of either kind, shapes and shardings.
    """

    token: Any  # [M, R, T] int32
    places: Places  # of [M, R, T]; packed, a text is a segment and responses to a shared prompt are its branches
    source: Any  # [M, R, W] int32, token of the row whose hidden state predicts a response token
    response_token: Any  # [M, R, W] int32, that response token
    text: Any  # [M, R, W] int32, p * C + c of the text it is of; -1 is padding
    num_tokens: Any  # [M, P, C] int32, response tokens of each text
    previous_logprob: Any  # [M, P, C] float32, log pi_t, nats
    initial_logprob: Any  # [M, P, C] float32, log pi_ref, nats
    reward: Any  # [M, P, C] float32
    target: Any  # [M, P] float32
    weight: Any  # [M, P] float32, 0 on filler
    own: Any = None  # [M, P, C] float32, 1 on the policy's own samples; None: on all
    anchor: Any = None  # [M, P, C] float32, 1 on the reference's samples; None: on all

    def part(self, index: int) -> PairBatch:
        """Return one micro-batch, without axis M."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def place(self, mesh: Mesh) -> PairBatch:
        """Lay a host's batch out on devices."""
        return to_device(self, self.shardings(mesh))

    def specs(self, rows: tuple[str, ...]) -> PairBatch:
        """Return over which axes its arrays are split: rows of tokens over `rows`, what is of pairs over none."""
        of_tokens = {"token", "places", "source", "response_token", "text"}
        split, whole = PartitionSpec(None, rows), PartitionSpec()
        specs = {
            name: jax.tree.map(lambda _, spec=split if name in of_tokens else whole: spec, getattr(self, name))
            for name in self.__dataclass_fields__
        }
        return PairBatch(**specs)

    def shardings(self, mesh: AnyMesh) -> PairBatch:
        """Return where its arrays lie on a mesh."""
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(ROW_AXES))


def text_lengths(rows: Sequence[TrainingRow]) -> TextLengths:
    """Return the lengths of all texts; rows that know them say so themselves (`PairRows.text_lengths`)."""
    known = getattr(rows, "text_lengths", None)
    if known is not None:
        return known
    return TextLengths(
        prompt=np.asarray([[len(ids) for ids in row.prompt_ids] for row in rows], np.int64),
        response=np.asarray([[len(ids) for ids in row.response_ids] for row in rows], np.int64),
        same_prompt=np.asarray([_same(row.prompt_ids) for row in rows], bool),
    )


def _same(prompts: Sequence[Ids]) -> bool:
    return all(ids is prompts[0] or np.array_equal(ids, prompts[0]) for ids in prompts[1:])


def make_batch(
    rows: Sequence[TrainingRow],
    *,
    batch_size: int,
    max_length: int,
    parts: int = 1,
    packing: Packing | None = None,
    plan: Plan | None = None,
) -> PairBatch:
    """Lay rows out in one batch, and fill it up with pairs of weight 0.

    Args:
        batch_size: pairs that a full batch holds.
        parts: micro-batches; they divide batch_size.
        packing: None gives each text a row of its own.
        plan: of the training that the batch is of; None plans for this batch alone.

    Raises:
        ValueError: no rows, more rows than the batch holds, or a text longer than `max_length`.
    """
    if not 0 < len(rows) <= batch_size:
        raise ValueError(f"{len(rows)} rows for a batch of {batch_size}")
    lengths = text_lengths(rows)
    longest = int((lengths.prompt + lengths.response).max())
    if longest > max_length:
        raise ValueError(f"a text of {longest} tokens exceeds max_length {max_length}")
    if plan is None:
        plan = plan_batches(
            lengths,
            [np.arange(len(rows))],
            packing or Packing(),
            batch_size=batch_size,
            parts=parts,
            max_length=max_length,
        )
    layout, shape = plan.lay_out(lengths)
    return _filled(rows, layout, shape, plan.packing)


def _filled(rows: Sequence[TrainingRow], layout: Layout, shape: BatchShape, packing: Packing) -> PairBatch:
    width = len(rows[0].prompt_ids)
    of_tokens = (shape.parts, shape.rows, shape.length)
    of_window = (shape.parts, shape.rows, shape.window)
    token, position = np.zeros(of_tokens, np.int32), np.full(of_tokens, -1, np.int32)
    segment, branch = np.full(of_tokens, -1, np.int32), np.zeros(of_tokens, np.int32)
    source, response_token = np.zeros(of_window, np.int32), np.zeros(of_window, np.int32)
    text = np.full(of_window, -1, np.int32)
    answered = np.zeros(of_window[:2], np.int64)
    # By where they lie, so that segments ascend along a row.
    for index in np.argsort(layout.prompt, axis=None, kind="stable"):
        i, c = divmod(int(index), width)
        m, r = int(layout.part[i]), int(layout.row[i, c])
        prompt, response = rows[i].prompt_ids[c], rows[i].response_ids[c]
        first, start = int(layout.prompt[i, c]), int(layout.response[i, c])
        end, before = start + len(response), len(prompt)
        token[m, r, first : first + before] = prompt
        position[m, r, first : first + before] = np.arange(before)
        token[m, r, start:end] = response
        position[m, r, start:end] = np.arange(before, before + len(response))
        segment[m, r, first : first + before] = segment[m, r, start:end] = first
        if layout.shared[i]:
            branch[m, r, start:end] = c + 1
        if not before:  # nothing predicts the first token of a text without a prompt
            response, start = response[1:], start + 1
        window = slice(int(answered[m, r]), int(answered[m, r]) + len(response))
        source[m, r, window] = np.arange(start - 1, end - 1)
        if len(response):
            source[m, r, window.start] = first + before - 1 if before else start - 1
        response_token[m, r, window] = response
        text[m, r, window] = layout.place[i] * width + c
        answered[m, r] = window.stop
    # Which of these there are depends on settings alone, or batches would be of several programs.
    places = Places(
        position,
        segment if packing.packed else None,
        branch if packing.packed and packing.share_prompt and width > 1 else None,
    )

    def of_pairs(values: list, dtype: Any = np.float32) -> np.ndarray:
        array = np.asarray(values, dtype)
        laid = np.zeros((shape.parts, shape.pairs, *array.shape[1:]), dtype)
        laid[layout.part, layout.place] = array
        return laid

    return PairBatch(
        token=token,
        places=places,
        source=source,
        response_token=response_token,
        text=text,
        num_tokens=of_pairs([[len(ids) for ids in row.response_ids] for row in rows], np.int32),
        previous_logprob=of_pairs([row.previous_logprob[:width] for row in rows]),
        initial_logprob=of_pairs([row.initial_logprob[:width] for row in rows]),
        reward=of_pairs([row.reward[:width] for row in rows]),
        target=of_pairs([row.target for row in rows]),
        weight=of_pairs([row.weight for row in rows]),
        own=of_pairs([row.own[:width] for row in rows]),
        anchor=of_pairs([row.anchor[:width] for row in rows]),
    )


def num_steps(num_rows: int, *, batch_size: int, num_epochs: int) -> int:
    """Optimiser steps; the last batch of an epoch may be partly filler, so that every row is used."""
    return -(-num_rows // batch_size) * num_epochs


def batch_order(
    num_rows: int,
    *,
    batch_size: int,
    num_epochs: int,
    seed: int,
    iteration: int,
    lengths: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yield the row indices of every batch.

    Each epoch is one permutation drawn from (seed, iteration, epoch) alone: a restart, another mesh or another number
    of processes sees the same order.

    Args:
        lengths: [N] of the rows, to put rows of like lengths into a batch: those of every _WINDOW batches are sorted
            among each other, and their batches shuffled again. None leaves the permutation.
    """
    for epoch in range(num_epochs):
        random = rng(Purpose.BATCH_ORDER, seed, iteration, epoch)
        order = random.permutation(num_rows)
        if lengths is not None:
            windows = [order[at : at + _WINDOW * batch_size] for at in range(0, num_rows, _WINDOW * batch_size)]
            order = np.concatenate([own[np.argsort(lengths[own], kind="stable")] for own in windows])
        batches = [order[at : at + batch_size] for at in range(0, num_rows, batch_size)]
        if lengths is not None:
            batches = [batches[index] for index in random.permutation(len(batches))]
        yield from batches
