"""A loss or gradient that is no number stops training at that step, and nothing of it is kept."""

import json
import math

import pytest

from dno_jax.run_dir import RunDir
from dno_jax.training.metrics import Course, MetricsWriter, NotFinite


@pytest.fixture
def writer(tmp_path):
    return MetricsWriter(RunDir(tmp_path), Course(0, "train"), enabled=True)


def good(step):
    return {"loss": 0.5 + step, "grad_norm": 1.0}


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": math.nan, "grad_norm": math.nan},
        {"loss": 0.5, "grad_norm": math.inf},
        {"loss": -math.inf, "grad_norm": 1.0},
    ],
)
def test_the_step_is_named_with_its_rows_and_its_line_is_json(writer, tmp_path, metrics):
    writer.write(0, good(0), names=["a"])
    writer.write(1, metrics, names=["b", "c"])
    with pytest.raises(NotFinite) as told:
        writer.write(2, good(2), names=["d"])
    assert (told.value.step, told.value.names) == (1, ["b", "c"])
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert [row["step"] for row in rows] == [0, 1]
    assert None in (rows[1]["loss"], rows[1]["grad_norm"])


def test_what_is_no_number_besides_is_null_and_stops_nothing(writer, tmp_path):
    writer.write(0, good(0) | {"margin": math.nan}, names=[])
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["margin"] is None


def test_lines_of_earlier_versions_with_nan_are_read_and_mended(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.metrics_path.write_text('{"iteration": 0, "stage": "train", "step": 0, "loss": NaN}\n' * 2)
    run_dir.append_metrics({"iteration": 0, "stage": "train", "step": 5, "loss": 1.0})
    run_dir.forget_metrics(iteration=0, stage="train", from_step=5)
    assert "NaN" not in run_dir.metrics_path.read_text()
