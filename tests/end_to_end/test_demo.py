"""The demo as a newcomer runs it, for one seed: the whole loop on the committed policy improves it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dno_jax.report.summary import policy_table
from dno_jax.report.tables import plain
from dno_jax.run_dir import RunDir
from tests.report.parsed import Page

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_it_beats_the_policy_that_it_started_from(tmp_path, iterations):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [Path(sys.executable).parent / "dno", "run", "configs/demo.yaml", f"run_dir={tmp_path / 'run'}"]
    command.append(f"iterations={iterations}")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "best on held-out prompts: policy" in done.stdout
    run_dir = RunDir(tmp_path / "run")
    details = run_dir.stage("evaluate", iterations - 1).require().details
    against_start = details["win_rates"]["0"]
    # docs/demo.md: 78 to 86 % for three seeds. The direction is what is asserted, with its interval.
    assert against_start["low"] > 0.5
    assert against_start["comparisons"] == 80 * 4
    assert details["best"] > 0
    assert Path(run_dir.export_path, "model.safetensors").stat().st_size < 2_000_000
    assert done.stdout.rstrip().endswith(f"report: {run_dir.report_path}")
    page = Page(run_dir.report_path.read_text())
    for table in plain(policy_table(run_dir, iterations=iterations))[0]:
        assert [list(table.columns), *map(list, table.rows)] in page.tables
        for cell in (cell for row in table.rows for cell in row if "[" in cell):
            assert cell in done.stdout


def test_the_demos_judge_is_no_reward_in_disguise():
    """Pools of the demo's own text hold Condorcet cycles: no score per response could say what this judge says."""
    import json

    from dno_jax.annotation.oracles import majority_matrix
    from dno_jax.config import RunConfig, load_config

    section = load_config(RunConfig, ROOT / "configs/demo.yaml").annotation.oracle
    rows = [json.loads(line) for line in (ROOT / "configs/demo/prompts.jsonl").read_text().splitlines()]
    gold = [row["gold"] for row in rows]
    cycles = 0
    for index, row in enumerate(rows[:200]):
        others = [gold[(index + step) % len(gold)] for step in range(5)]
        wins = np.asarray(
            majority_matrix(
                row["messages"][-1]["content"], others, criteria=section.criteria, target_words=section.target_words
            )
        )
        beats = (wins == 1.0).astype(int)
        cycles += int(np.trace(beats @ beats @ beats) > 0)
    assert cycles > 0
