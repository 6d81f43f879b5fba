"""What a pair stage wrote, as records."""

from __future__ import annotations

from dno_jax.data.pairs import NEW, REPLAYED, PairFile
from dno_jax.records import Pair
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import StageDir


def read_rows(stage: StageDir, *names: str) -> list[dict]:
    """Whole rows, new ones first, or those of some of the files."""
    found: list[dict] = []
    for name in names or (NEW, REPLAYED):
        with PairFile(stage.path / f"{name}.parquet") as file:
            for table in file.read():
                found += table.to_pylist()
    return found


def read_pairs(stage: StageDir, *names: str) -> list[Pair]:
    return [Pair.model_validate({name: row[name] for name in Pair.model_fields}) for row in read_rows(stage, *names)]


def in_order_of_id(run_dir: RunDir, iteration: int) -> list[Pair]:
    """In the order that training permutes."""
    return sorted(read_pairs(run_dir.stage("pair", iteration)), key=lambda pair: pair.pair_id)
