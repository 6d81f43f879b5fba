"""Peak host memory of reading a preference dataset, and how fast rows are made of it, on pairs of random ids.

    python benchmarks/pairs.py --pairs 200000

Ids are int32; a row has a prompt and two responses. `bytes_per_byte` is what the process has grown by at its peak, over
the bytes of all ids: reference scores of every pair are placed, and rows of every batch are made, as training does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dno_jax.data.pair_table import PairRows, PairTable
from dno_jax.data.pairs import NEW, REPLAYED, SCHEMA, write_pairs
from dno_jax.records import ReferenceScore
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import StageDir
from dno_jax.training.batches import batch_order

_TABLE = 2048  # rows made at once


def write_random_pairs(stage: StageDir, count: int, *, prompt: tuple[int, int], response: tuple[int, int]) -> None:
    """Write `count` pairs whose texts have so many tokens, from and to, a third of them replayed."""
    new = count - count // 3
    write_pairs(stage.path / f"{NEW}.parquet", _tables(0, new, prompt=prompt, response=response))
    write_pairs(stage.path / f"{REPLAYED}.parquet", _tables(new, count, prompt=prompt, response=response))


def _tables(first: int, end: int, *, prompt: tuple[int, int], response: tuple[int, int]) -> Iterator[pa.Table]:
    rng = np.random.default_rng(first)
    for start in range(first, end, _TABLE):
        yield _table(rng, range(start, min(start + _TABLE, end)), prompt=prompt, response=response)


def _table(rng: np.random.Generator, rows: range, *, prompt: tuple[int, int], response: tuple[int, int]) -> pa.Table:
    size = len(rows)
    names = [f"{index * 7919 % 100003:06d}/{index}" for index in rows]
    columns: dict[str, pa.Array] = {}
    for field in SCHEMA:
        kind, name = field.name.rsplit("_", 1)[-1], field.name
        if kind == "tokens":
            low, high = prompt if name.startswith("prompt") else response
            offsets = np.concatenate([[0], np.cumsum(rng.integers(low, high + 1, size))]).astype(np.int32)
            ids = rng.integers(0, 32000, offsets[-1], dtype=np.int32)
            columns[name] = pa.ListArray.from_arrays(offsets, ids, type=field.type)
        elif pa.types.is_floating(field.type):
            columns[name] = pa.array(rng.random(size))
        elif pa.types.is_integer(field.type):
            columns[name] = pa.array(np.zeros(size, np.int32))
        elif pa.types.is_list(field.type):
            columns[name] = pa.array([[{"role": "user", "content": "Say something."}]] * size, field.type)
        else:
            columns[name] = pa.array([f"pair {row}" for row in names] if kind == "id" else ["text"] * size)
    return pa.table(columns, SCHEMA)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(folder: str) -> dict[str, float]:
    """Read, place scores, make every batch's rows once; meant for a process of its own."""
    stage = RunDir(folder).stage("pair", 0)
    before, start = peak_bytes(), time.perf_counter()
    table = PairTable.load(stage)
    loaded = time.perf_counter()
    names = (name.as_py() for name in table.pair_ids)
    logprobs = table.logprobs(ReferenceScore(pair_id=name, chosen_logprob=-1, rejected_logprob=-2) for name in names)
    placed = time.perf_counter()
    rows, tokens = PairRows(table, logprobs, logprobs), 0
    for batch in batch_order(len(rows), batch_size=128, num_epochs=1, seed=0, iteration=0):
        for index in batch:
            row = rows[index]
            tokens += len(row.prompt_ids[0]) + len(row.response_ids[0]) + len(row.response_ids[1])
    made = time.perf_counter()
    ids = 4 * tokens
    return {
        "pairs": len(rows),
        "id_bytes": ids,
        "table_bytes": table.nbytes,
        "peak_bytes": peak_bytes() - before,
        "bytes_per_byte": round((peak_bytes() - before) / ids, 3),
        "load_seconds": round(loaded - start, 2),
        "place_seconds": round(placed - loaded, 2),
        "rows_per_second": round(len(rows) / (made - placed)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--prompt", type=int, nargs=2, default=(100, 500), help="tokens, from and to")
    parser.add_argument("--response", type=int, nargs=2, default=(50, 500))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        stage = RunDir(folder).stage("pair", 0)
        write_random_pairs(stage, options.pairs, prompt=tuple(options.prompt), response=tuple(options.response))
        command = [sys.executable, __file__, "--measure", folder]
        subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


if __name__ == "__main__":
    main()
