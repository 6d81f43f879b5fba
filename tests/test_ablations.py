"""The ablations of docs/results.md: what each changes, and how their tables are made."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dno_jax.config.identity import changes
from dno_jax.records import Judgement, Rollout
from dno_jax.run_dir import RunDir

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("ablations", ROOT / "examples" / "ablations.py")
ablations = importlib.util.module_from_spec(spec)
sys.modules["ablations"] = ablations  # dataclasses look their module up
spec.loader.exec_module(ablations)

CHANGED = {  # beside run_dir
    "dno_prct": set(),
    "soft": {"loss.target"},
    "offline_dpo": {"iterations"},
    "spin": {"annotation.kind", "pairing.rule", "loss.name"},
    "sft_on_positives": {"iterations", "loss.name"},
    "restrictive": {"pairing.rule"},
    "no_margin": {"pairing.positive_floor", "pairing.margin", "pairing.student_margin", "pairing.max_pairs_per_prompt"},
    "proximal": {"reference.kind", "reference.tau", "outer.scheme", "outer.every"},
    "forward_kl": {"loss.forward_kl_weight"},
}


def flat(tree, prefix=""):
    if isinstance(tree, dict):
        return {name: value for key, own in tree.items() for name, value in flat(own, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}


@pytest.fixture
def plan(tmp_path):
    return ablations.Plan.of(ROOT / "configs" / "demo.yaml", [], seeds=2, out=tmp_path / "demo")


@pytest.mark.parametrize("recipe", ["demo", "stories"])
def test_each_method_changes_what_it_is_named_for_and_nothing_else(tmp_path, recipe):
    # What is set for all methods stands below what a method changes.
    plan = ablations.Plan.of(ROOT / "configs" / f"{recipe}.yaml", ["iterations=2"], seeds=2, out=tmp_path)
    assert [plan.config(method, 0).iterations for method in ("soft", "offline_dpo", "sft_on_positives")] == [2, 1, 1]
    assert set(ablations.METHODS) == set(CHANGED)
    base = flat(plan.config("dno_prct", 1).model_dump(mode="json"))
    for method, expected in CHANGED.items():
        found = changes(base, flat(plan.config(method, 1).model_dump(mode="json")))
        # The cap on pairs is the demo's alone.
        allowed = expected | {"run_dir"}
        assert {line.split(":")[0] for line in found} - allowed == set(), method
        assert {line.split(":")[0] for line in found} >= expected - {"pairing.max_pairs_per_prompt"}, method
        judge = plan.config(method, 1).evaluation_judge
        assert (judge.kind, judge.oracle) == ("oracle", plan.config("dno_prct", 1).annotation.oracle)


def test_every_file_is_a_method():
    files = {path.stem for path in (ROOT / "configs" / "ablations" / "laptop").glob("*.yaml")}
    assert files == set(ablations.METHODS) - {"dno_prct"}


def test_intervals_are_students_over_seeds():
    """Of 0, 1, 2: mean 1, standard error 1 / sqrt(3), and the tables' t(.975; 2) = 4.303, t(.99167; 2) = 7.649."""
    mean, low, high = ablations.interval([0.0, 1.0, 2.0])
    assert (mean, high - mean) == (1.0, pytest.approx(4.3027 / np.sqrt(3), rel=1e-4))
    assert low == pytest.approx(2 * mean - high)
    assert ablations.interval([0.0, 1.0, 2.0], family=3)[2] - 1.0 == pytest.approx(7.6488 / np.sqrt(3), rel=1e-4)
    assert np.isnan(ablations.interval([0.3])[1])


def test_a_judges_work_is_counted_by_pairs_of_a_pool(tmp_path):
    run_dir = RunDir(str(tmp_path))
    told = {"prompt_id": "p", "source": "policy", "policy": 0, "text": "x", "prompt_token_ids": (1,), "logprob": -1.0,
            "finish": "stop"}  # fmt: skip
    rows = [Rollout(rollout_id=f"r{n}", sample=n, token_ids=tuple(range(n + 1)), **told) for n in range(3)]
    run_dir.stage("sample", 0).write_shard("0000000", rows)
    wins = ((0.5, 1.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.0, 0.5))
    pool = Judgement(prompt_id="p", candidate_ids=("r0", "r1", "r2"), wins=wins, state="ok", judge="j")
    run_dir.stage("annotate", 0).write_shard("0000000", [pool])
    assert ablations.pool_costs(run_dir, 0) == (3, 2 * (1 + 2 + 3))
    assert ablations.mean_wins(pool).argmax() == 0


def test_tables_are_put_between_their_marks_and_nowhere_else(plan, tmp_path, monkeypatch):
    def planted(plan, method, seed):
        rate = 0.6 + 0.1 * seed if method != "spin" else 0.4
        return ablations.Found(rate, 0.5, 0.7, rate, 17.0, 18.0, 1000, 600, 5000, 12.0 + seed)

    players = list(ablations.METHODS)
    rates = [[0.5 if i == j else 0.9 if i < j else 0.1 for j in range(len(players))] for i in range(len(players))]
    for seed in range(2):
        plan.folder(seed).mkdir(parents=True)
        judged = {"judged": {"comparison": {"players": players, "rates": rates}}}
        (plan.folder(seed) / "compared.json").write_text(json.dumps(judged))
    monkeypatch.setattr(ablations, "read_run", planted)
    page = tmp_path / "page.md"
    page.write_text("# Before\n<!-- tables of demo -->\nold\n<!-- end of demo -->\nafter\n")
    for _ in range(2):
        ablations.write_tables(plan, page)
        text = page.read_text()
        assert text.startswith("# Before\n<!-- tables of demo -->\n\n2 seeds; policy 0 has 18.0 [18.0, 18.0] words\n")
        assert text.endswith("\n\n<!-- end of demo -->\nafter\n")
        assert "old" not in text
        assert "| DNO-Prct | 65.0 % [1.5, 100.0] | 60 70 |" in text
        assert "| SPIN | 40.0 % [40.0, 40.0] | 40 40 |" in text
        assert "| DNO-Prct |  | 90* | 90*" in text
    alone = "\n".join(ablations.method_table(dataclasses.replace(plan, seeds=1)))
    assert alone.startswith("1 seed; policy 0 has 18.0 words\n")
    assert "| DNO-Prct | 60.0 % [50.0, 70.0] | 60 | 60.0 % | 17.0 | 1,000 | 600 | 5,000 | 12 s |" in alone
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="<!-- tables of demo -->"):
        ablations.write_tables(plan, page)


def test_what_is_finished_is_not_run_again_and_tries_add_up(plan, monkeypatch):
    calls = []

    def run(config):
        calls.append(config.run_dir)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ablations.iteration, "run", run)
    clock = iter([0.0, 5.0, 10.0, 17.0])
    monkeypatch.setattr(ablations.time, "process_time", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt):
        ablations.run_method(plan, "soft", 1)
    ablations.run_method(plan, "soft", 1)
    ablations.run_method(plan, "soft", 1)
    assert len(calls) == 2
    assert json.loads((plan.folder(1) / "soft.json").read_text()) == {"cpu_seconds": 12.0, "finished": True}
