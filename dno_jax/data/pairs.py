"""A preference dataset as Parquet, one row per pair: all that scoring and training read, and what others can train on.

Prompts and responses lie in it as chats (`prompt`, `chosen`, `rejected`), the form in which Hugging Face `datasets` and
TRL take preferences, and as the token ids that were sampled. No column of ids has a name by which TRL would take the
rows for tokenised (`chosen_ids`, `chosen_input_ids`, `input_ids`): it tokenises the chats itself.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Int

from dno_jax.errors import DnoError
from dno_jax.files import written_atomically
from dno_jax.records import Message, Pair, Prompt, Rollout

NEW, REPLAYED = "new", "replayed"

_MESSAGE = pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)])
_CHAT = pa.list_(pa.field("element", _MESSAGE, False))
_IDS = pa.list_(pa.field("element", pa.int32(), False))
# Pair's fields as they are; then what they name. A response's chat message begins with the prompt's assistant_prefix,
# so that prompt + chosen is the whole chat; its text and token ids are what comes after, which alone is trained on.
# The log-probabilities are log pi_t(y|x), nats, as the sampler of the pair's iteration t recorded them; null where it
# did not draw the response.
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), False) for name in ("pair_id", "prompt_id", "chosen_id", "rejected_id")),
        *(pa.field(name, _CHAT, False) for name in ("prompt", "chosen", "rejected")),
        *(pa.field(name, pa.string(), False) for name in ("chosen_text", "rejected_text")),
        *(pa.field(name, _IDS, False) for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens")),
        *(pa.field(name, pa.float64(), False) for name in ("chosen_reward", "rejected_reward", "target", "weight")),
        pa.field("kind", pa.string(), False),
        pa.field("iteration", pa.int32(), False),
        *(pa.field(name, pa.string(), False) for name in ("chosen_finish", "rejected_finish")),
        *(pa.field(name, pa.float64()) for name in ("chosen_logprob", "rejected_logprob")),
    ]
)
_ROWS = 1024  # of a row group, which is what reading and writing hold besides their results


def pair_table(pairs: Sequence[Pair], rollouts: Mapping[str, Rollout], prompts: Mapping[str, Prompt]) -> pa.Table:
    """Return the rows of pairs with everything that they name, in their order.

    Args:
        rollouts, prompts: by id.

    Raises:
        DnoError: the two responses of a pair were drawn after different ids.
    """
    rows = []
    for pair in pairs:
        chosen, rejected = rollouts[pair.chosen_id], rollouts[pair.rejected_id]
        if chosen.prompt_token_ids != rejected.prompt_token_ids:
            raise DnoError(
                f"pair {pair.pair_id!r}: rollouts {chosen.rollout_id!r} and {rejected.rollout_id!r} have different "
                "prompt_token_ids, expected those of one prompt; remove the rollouts folder of this iteration and "
                "sample again"
            )
        prompt = prompts[pair.prompt_id]
        row: dict[str, Any] = pair.model_dump()
        row["prompt"] = [message.model_dump() for message in prompt.messages]
        row["prompt_tokens"] = np.asarray(chosen.prompt_token_ids)
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            message = Message(role="assistant", content=prompt.assistant_prefix + response.text)
            row[name] = [message.model_dump()]
            row[f"{name}_text"] = response.text
            row[f"{name}_tokens"] = np.asarray(response.token_ids)
            row[f"{name}_finish"] = response.finish
            row[f"{name}_logprob"] = response.logprob if response.policy == pair.iteration else None
        rows.append(row)
    return pa.Table.from_pylist(rows, SCHEMA)


class PairFile:
    """A closed file of pairs.

    Raises:
        DnoError: it is no Parquet file, or one of other columns.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(path.open("rb"))
                self._file = pq.ParquetFile(opened)
            except (pa.ArrowInvalid, OSError) as error:
                raise DnoError(f"{path}: cannot be read ({error}); remove the pairs folder and pair again") from None
            if not self._file.schema_arrow.equals(SCHEMA):
                raise DnoError(
                    f"{path}: not the columns of this version's pairs; remove the pairs folder and pair again"
                )
            stack.pop_all()  # it is to stay open

    def __enter__(self) -> PairFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close(force=True)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def num_values(self, column: str) -> int:
        """At least as many values as the lists of a column hold together (an empty list counts for one)."""
        metadata = self._file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
        return sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)

    def read(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows, a row group at a time."""
        for index in range(self._file.num_row_groups):
            yield self._file.read_row_group(index, columns=None if columns is None else list(columns))

    def take(self, rows: Int[np.ndarray, " rows"]) -> Iterator[pa.Table]:
        """Yield some of the rows, given by their places in ascending order."""
        first = 0
        for index in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(index).num_rows
            here = rows[(first <= rows) & (rows < first + count)] - first
            if here.size:
                yield self._file.read_row_group(index).take(here)
            first += count


def write_pairs(path: epath.Path, tables: Iterable[pa.Table]) -> None:
    """Write rows as one file, there whole or not at all.

    Raises:
        DnoError: it cannot be written.
    """
    with written_atomically(path) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for table in _regrouped(tables):
            writer.write_table(table, row_group_size=_ROWS)


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, `_ROWS` at a time."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= _ROWS:
            joined = pa.concat_tables(held)
            whole = len(joined) - len(joined) % _ROWS
            yield joined.slice(0, whole)
            held = [joined.slice(whole).combine_chunks()]
    if held and len(rest := pa.concat_tables(held)):
        yield rest


class Spool:
    """Rows that come in one order and are written in another, on disk in between.

    Args:
        folder: where they fit on disk; a file without a name, which goes when the process does.
    """

    def __init__(self, folder: epath.Path):
        local = "://" not in os.fspath(folder)
        if local:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder if local else None)  # noqa: SIM115
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._runs: list[tuple[str, int, int, int]] = []  # prompt id, batch, first row, rows
        self._batches = 0
        self._rows = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._file.close()

    def __len__(self) -> int:
        return self._rows

    def add(self, table: pa.Table) -> None:
        """Add rows, those of a prompt side by side."""
        for batch in table.combine_chunks().to_batches():
            ids = np.asarray(batch.column("prompt_id").to_pylist(), object)
            starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist()]
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                self._runs.append((ids[start], self._batches, start, end - start))
            self._writer.write_batch(batch)
            self._batches += 1
            self._rows += len(batch)

    def by_prompt(self) -> Iterator[pa.Table]:
        """Yield all rows in order of prompt id; those of one prompt in the order in which they came."""
        self._writer.close()
        if not self._runs:
            return
        self._file.flush()
        reader = pa.ipc.open_file(pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)))
        for _, batch, first, count in sorted(self._runs, key=lambda run: run[0]):
            yield pa.Table.from_batches([reader.get_batch(batch).slice(first, count)])
