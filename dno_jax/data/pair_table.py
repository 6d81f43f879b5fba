"""The pairs of an iteration as arrays: little more in memory than their token ids, however many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
from etils import epath
from jaxtyping import Bool, Float, Int

from dno_jax.data.pairs import NEW, REPLAYED, PairFile
from dno_jax.errors import DnoError
from dno_jax.records import ReferenceScore
from dno_jax.stage_dir import StageDir
from dno_jax.training.batches import TrainingRow
from dno_jax.training.packing import TextLengths

pc: Any = pyarrow.compute  # its functions are made when it is imported: a type checker sees none of them
_TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
_NUMBERS = (
    "chosen_reward", "rejected_reward", "target", "weight", "iteration", "chosen_logprob", "rejected_logprob",
)  # fmt: skip
_SCORES = 4096  # reference scores that are held as Python objects at once


@dataclass(frozen=True)
class PairTable:
    """N pairs, new and replayed, in order of id: the order that training permutes.

    Attributes:
        pair_ids: [N] strings.
        tokens: of all prompts, chosen and rejected responses, each kind one after the other: three flat int32 arrays.
        first, count: [N, 3] where a pair's own ids begin in each of them, and how many they are.
        reward: [N, 2] of chosen and rejected response, in the unit of `pairing.reward`.
        target: [N] P(chosen preferred), in [0, 1].
        weight: [N] how many pairs of samples a pair stands for.
        iteration: [N] the iteration whose rollouts a pair is made of.
        sampler_logprob: [N, 2] log pi_t(y|x), nats, t = `iteration`, as the sampler recorded it; NaN where it did not
            draw the response.
    """

    pair_ids: pa.ChunkedArray
    tokens: tuple[np.ndarray, np.ndarray, np.ndarray]
    first: Int[np.ndarray, "N 3"]
    count: Int[np.ndarray, "N 3"]
    reward: Float[np.ndarray, "N 2"]
    target: Float[np.ndarray, " N"]
    weight: Float[np.ndarray, " N"]
    iteration: Int[np.ndarray, " N"]
    sampler_logprob: Float[np.ndarray, "N 2"]

    @classmethod
    def load(cls, stage: StageDir) -> PairTable:
        """Read what a pair stage wrote, a row group at a time.

        Raises:
            DnoError: a file is missing, not as it was written, not one of pairs, or of fewer or more than were noted.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(PairFile(stage.table_path(name))) for name in (NEW, REPLAYED)]
            size = sum(map(len, files))
            if (manifest := stage.manifest()) is not None and manifest.rows != size:
                raise DnoError(
                    f"{stage.manifest_path}: says {manifest.rows} pairs, and the files have {size}; restore it, or "
                    f"pair again: {stage.redo}"
                )
            tokens = [np.empty(sum(file.num_values(name) for file in files), np.int32) for name in _TOKENS]
            count, numbers = np.empty((size, 3), np.int32), np.empty((size, len(_NUMBERS)))
            ids: list[pa.Array] = []
            row, filled = 0, [0, 0, 0]
            for table in chain.from_iterable(file.read(("pair_id", *_TOKENS, *_NUMBERS)) for file in files):
                ids += table["pair_id"].chunks
                rows = slice(row, row := row + len(table))
                for kind, name in enumerate(_TOKENS):
                    lists = table[name].combine_chunks()
                    values = lists.flatten().to_numpy()
                    tokens[kind][filled[kind] : filled[kind] + len(values)] = values
                    filled[kind] += len(values)
                    count[rows, kind] = lists.value_lengths().to_numpy()
                for place, name in enumerate(_NUMBERS):
                    numbers[rows, place] = table[name].to_numpy()  # a null becomes NaN
        pair_ids = pa.chunked_array(ids, pa.string())
        order = pc.sort_indices(pair_ids).to_numpy()
        pair_ids = pair_ids.take(order)
        _check_unique(pair_ids, place=stage.path)
        first = np.cumsum(count, axis=0, dtype=np.int64) - count
        reward, target, weight, iteration, logprob = np.split(numbers[order], (2, 3, 4, 5), axis=1)
        return cls(
            pair_ids=pair_ids,
            tokens=(tokens[0][: filled[0]], tokens[1][: filled[1]], tokens[2][: filled[2]]),
            first=first[order],
            count=count[order],
            reward=reward,
            target=target[:, 0],
            weight=weight[:, 0],
            iteration=iteration[:, 0].astype(np.int32),
            sampler_logprob=logprob,
        )

    def __len__(self) -> int:
        return len(self.target)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of the longer of a pair's two chats."""
        return self.count[:, 0] + self.count[:, 1:].max(axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the table takes."""
        arrays = (self.first, self.count, self.reward, self.target, self.weight, self.iteration, self.sampler_logprob)
        return self.pair_ids.nbytes + sum(array.nbytes for array in (*self.tokens, *arrays))

    def ids(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids of a pair's prompt, chosen and rejected response: int32 views."""
        prompt, chosen, rejected = (
            tokens[first : first + count]
            for tokens, first, count in zip(self.tokens, self.first[index], self.count[index], strict=True)
        )
        return prompt, chosen, rejected

    def placed(self, scores: Iterable[ReferenceScore]) -> tuple[Float[np.ndarray, "N 2"], Bool[np.ndarray, " N"]]:
        """Return reference scores beside their pairs, and which pairs have one; those of other pairs are left out.

        Returns:
            log-probabilities of chosen and rejected response, nats, NaN where there are none; and the pairs that have
            them.
        """
        names: list[pa.Array] = []
        values: list[np.ndarray] = []
        rows = iter(scores)
        while some := list(islice(rows, _SCORES)):
            names.append(pa.array([row.pair_id for row in some], pa.string()))
            values.append(np.asarray([(row.chosen_logprob, row.rejected_logprob) for row in some], np.float64))
        logprob = np.full((len(self), 2), np.nan)
        there = np.zeros(len(self), bool)
        if names:
            place = pc.index_in(pa.chunked_array(names), value_set=self.pair_ids)
            known = place.is_valid().to_numpy()
            rows_of = place.drop_null().to_numpy()
            logprob[rows_of] = np.concatenate(values)[known]
            there[rows_of] = True
        return logprob, there

    def logprobs(self, scores: Iterable[ReferenceScore]) -> Float[np.ndarray, "N 2"]:
        """Return reference scores beside their pairs, nats.

        Raises:
            DnoError: a pair has none.
        """
        logprob, there = self.placed(scores)
        if not there.all():
            missing = self.pair_ids[int(np.argmin(there))].as_py()
            raise DnoError(f"pair {missing!r} has no reference score; remove the reference folder and score again")
        return logprob


class PairRows(Sequence[TrainingRow]):
    """The pairs as rows to train on, each made when it is asked for.

    Args:
        previous, initial: [N, 2] log pi_t and log pi_ref of every pair, nats; None gives zeros, which only a loss that
            does not read them may take.
        sampled_from: whose samples are the policy's own: the policy of that iteration's; None: nobody's.
        anchored_from: whose samples are the reference's; None: nobody's.
    """

    def __init__(
        self,
        table: PairTable,
        previous: np.ndarray | None = None,
        initial: np.ndarray | None = None,
        *,
        sampled_from: int | None = None,
        anchored_from: int | None = None,
    ) -> None:
        self.table = table
        self._previous = previous
        self._initial = initial
        recorded = ~np.isnan(table.sampler_logprob)
        self._own, self._anchor = (
            recorded & (table.iteration == iteration)[:, None] for iteration in (sampled_from, anchored_from)
        )

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: SupportsIndex) -> TrainingRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrainingRow]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> TrainingRow | list[TrainingRow]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        table, index = self.table, int(index)
        prompt, chosen, rejected = table.ids(index)
        return TrainingRow(
            prompt_ids=(prompt, prompt),
            response_ids=(chosen, rejected),
            previous_logprob=_two(self._previous, index),
            initial_logprob=_two(self._initial, index),
            reward=_two(table.reward, index),
            target=float(table.target[index]),
            weight=float(table.weight[index]),
            own=tuple(map(float, self._own[index])),
            anchor=tuple(map(float, self._anchor[index])),
            name=table.pair_ids[index].as_py(),
        )

    @property
    def text_lengths(self) -> TextLengths:
        """Tokens of every pair's texts, which need not be read for it."""
        prompt, responses = self.table.count[:, :1], self.table.count[:, 1:]
        return TextLengths(np.repeat(prompt, 2, axis=1), responses, np.ones(len(self), bool))

    def __iter__(self) -> Iterator[TrainingRow]:
        return (self[place] for place in range(len(self)))


def _two(column: np.ndarray | None, index: int) -> tuple[float, float]:
    return (0.0, 0.0) if column is None else (float(column[index, 0]), float(column[index, 1]))


def _check_unique(ordered: pa.ChunkedArray, *, place: epath.Path) -> None:
    if len(ordered) > 1 and pc.any(again := pc.equal(ordered[1:], ordered[:-1])).as_py():
        name = ordered[pc.index(again, True).as_py()].as_py()
        raise DnoError(f"{place}: pair {name!r} is there twice; remove the pairs folder and pair again")
