"""kill -9 in every stage, the same command again: nothing differs from a run that was left alone."""

import os
import signal
import socket
import time

import pytest
import yaml

from dno_jax.fake_judge import FakeJudge
from dno_jax.records import Judgement, ReferenceScore, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import stage_names
from dno_jax.training.checkpoint import policy_fingerprint
from tests.configured import deep_merge
from tests.end_to_end.processes import begin, start
from tests.pairs import read_rows
from tests.small import small_tree

# Points in the order in which a run passes them; each start goes on where the last one died.
POINTS = [
    "shard-sample:1",
    "after-shard-sample:1",
    "shard-annotate:1",
    "finish-sample:1",
    "finish-annotate:1",
    "after-pairs:1",
    "pairs:2",
    "finish-pair:1",
    "shard-score:2",
    "finish-score:1",
    "step:1",
    "after-state:3",
    "step:2",
    "policy:1",
    "finish-train:1",
    "shard-evaluate:1",
    "finish-evaluate:1",
    "after-finish-evaluate:1",
    "after-shard-sample:1",
    "step:3",
    "export:1",
]


def finish(path):
    done = start("run", path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def write_config(folder, run_dir, **changes):
    path = folder / f"{run_dir.replace('/', '-')}.yaml"
    tree = deep_merge(small_tree(folder, run_dir=run_dir), {"training": {"save_every": 1}})
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def contents(run_dir, iterations=2):
    """Everything that decides a result: rows of all stages and the fingerprints of all policies."""
    rows = {}
    for t in range(iterations):
        for stage, kind in (("sample", Rollout), ("annotate", Judgement), ("score", ReferenceScore)):
            rows[stage, t] = sorted(row.model_dump_json() for row in run_dir.stage(stage, t).read(kind))
        rows["pair", t] = read_rows(run_dir.stage("pair", t))
        rows["evaluate", t] = run_dir.stage("evaluate", t).require().details
        rows["dropped", t] = [
            run_dir.stage(name, t).require().dropped for name in stage_names(run_dir.load_config(), t)
        ]
    policies = [policy_fingerprint(run_dir.policy(t)) for t in range(iterations + 1)]
    metrics = [
        (row["iteration"], row["step"], row["loss"]) for row in run_dir.read_metrics() if row["stage"] == "train"
    ]
    return rows, policies, metrics


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1200)
def test_killed_in_every_stage_ends_bit_for_bit_the_same(folder):
    whole, broken = write_config(folder, "whole"), write_config(folder, "broken")
    finish(whole)
    for point in POINTS:
        died = start("run", broken, point=point)
        assert died.returncode == -signal.SIGKILL, f"{point} was never reached:\n{died.stderr[-3000:]}"
    finish(broken)
    expected, found = contents(RunDir(folder / "whole")), contents(RunDir(folder / "broken"))
    assert found[1] == expected[1]
    assert None not in found[1]
    for stage in expected[0]:
        assert found[0][stage] == expected[0][stage], stage
    assert found[2] == expected[2]
    files = sorted(path.name for path in (folder / "whole" / "export").iterdir())
    assert files == sorted(path.name for path in (folder / "broken" / "export").iterdir())
    for name in files:
        assert (folder / "whole/export" / name).read_bytes() == (folder / "broken/export" / name).read_bytes(), name
    leftovers = [path for path in (folder / "broken").rglob(".*.tmp") if path.is_file()]
    assert not [path for path in leftovers if path.suffix == ".jsonl"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_no_verdict_is_bought_twice_beyond_those_in_flight(folder):
    concurrency = 2
    with FakeJudge(delay=0.05) as server:
        openai = {"base_url": server.url, "api_key_env": None, "max_concurrency": concurrency, "model": "judge"}
        changes = {
            "iterations": 1,
            "annotation": {"kind": "openai", "openai": openai},
            "pairing": {"reward": "score", "positive_floor": 3, "margin": 1, "student_margin": 1},
        }
        path = write_config(folder, "bought", **changes)
        kills = ["shard-annotate:1", "finish-annotate:1", "finish-train:1", "finish-evaluate:1"]
        for point in kills:
            died = start("run", path, point=point)
            assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
        finish(path)
        assert server.duplicates <= concurrency * len(kills)
        pools = 12 + 4 * 2  # training prompts, held-out prompts times samples
        assert server.requests - server.duplicates <= pools
    run_dir = RunDir(folder / "bought")
    judgements = list(run_dir.stage("annotate", 0).read(Judgement))
    assert len(judgements) == 12
    assert all(row.state == "ok" and row.scores is not None for row in judgements)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_directory_in_use_is_refused_until_a_kill_lets_go_of_it(folder):
    path = write_config(folder, "used", iterations=1)
    run_dir = folder / "used"
    first = begin("run", path)
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "policies" / "000" / "FINGERPRINT").exists():
            assert first.exitcode is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)  # amid its work, for as long as it takes
        before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")}
        for verb in ("run", "train"):
            second = start(verb, path)
            assert second.returncode == 2, second.stderr[-3000:]
            assert f"{run_dir}: in use by process {first.pid} on {socket.gethostname()};" in second.stderr
            assert "Traceback" not in second.stderr
        assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")} == before
        assert start("status", run_dir).returncode == 0
        beside = start("pair", path)  # needs no device: it is not kept out, but there is nothing to pair yet
        assert "stage 'annotate' of iteration 0 is not finished" in beside.stderr
    finally:
        first.kill()
        first.join()
    finish(path)
