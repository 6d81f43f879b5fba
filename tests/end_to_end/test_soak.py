"""`make soak`: what takes longer than CI allows. Figures go into docs/."""

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dno_jax.annotation.ledger.store import VerdictStore
from dno_jax.fake_judge import FakeJudge
from dno_jax.records import Judgement, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import stage_names
from tests.end_to_end.processes import begin, start
from tests.end_to_end.test_resume import contents, finish, write_config
from tests.small import small_tree, write_prompts
from tests.stages.judged import sampled_run, worth

ROOT = Path(__file__).parents[2]
KILLS = 50  # of annotation
POOLS_A_KILL = 12  # more than are judged between two of them
pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("soak")


def killed_at_random(path, rng, *, longest):
    """Start the run and kill it at a random moment; return its exit status, None if it was killed."""
    process = begin("run", path)
    process.join(rng.uniform(0.5, longest))
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def test_forty_kills_at_random_moments_change_nothing(folder, capsys):
    whole = write_config(folder, "whole")
    begun = time.monotonic()
    finish(whole)
    longest = time.monotonic() - begun
    rng, kills = random.Random(0), 0
    broken = write_config(folder, "broken")
    while kills < 40:
        status = killed_at_random(broken, rng, longest=longest)
        if status is None:
            kills += 1
            continue
        assert status == 0
        expected, found = contents(RunDir(folder / "whole")), contents(RunDir(folder / "broken"))
        assert found == expected
        subprocess.run(["rm", "-rf", str(folder / "broken")], check=True)  # and from the start again
    finish(broken)
    assert contents(RunDir(folder / "broken")) == contents(RunDir(folder / "whole"))
    with capsys.disabled():
        print(f"\n[soak: {kills} kills, a whole run takes {longest:.0f} s]")


def test_twenty_sigterms_at_random_moments_over_all_stages_change_nothing(folder, capsys):
    """A teacher among them, and states and policies that are being written; each ends by status 75."""
    rng, stopped, slowest = random.Random(8), 0, 0.0
    stages: set[str] = set()
    with FakeJudge(delay=0.05) as server:
        asked = {"base_url": server.url, "api_key_env": None, "model": "judge", "max_concurrency": 2}
        changes = {
            "annotation": {"kind": "openai", "openai": asked, "teacher": asked},
            "pairing": {"reward": "score", "positive_floor": 3, "margin": 1, "student_margin": 1, "cut": "keep"},
        }
        write_prompts(folder / "untaught.jsonl", 12, gold=False)
        tree = small_tree(folder)
        changes["prompts"] = tree["prompts"] | {"path": str(folder / "untaught.jsonl")}
        whole = write_config(folder, "straight", **changes)
        begun = time.monotonic()
        finish(whole)
        longest = time.monotonic() - begun
        path = write_config(folder, "asked", **changes)
        run_dir = RunDir(folder / "asked")
        while stopped < 20:
            process = begin("run", path)
            process.join(rng.uniform(2.0, max(longest / 3, 4.0)))
            if process.exitcode is None:
                asked_at = time.monotonic()
                process.terminate()
                process.join(120)
                slowest = max(slowest, time.monotonic() - asked_at)
            if process.exitcode == 0:
                expected, found = contents(RunDir(folder / "straight")), contents(run_dir)
                assert found == expected
                subprocess.run(["rm", "-rf", str(folder / "asked")], check=True)  # and from the start again
                continue
            assert process.exitcode == 75
            stopped += 1
            if run_dir.config_path.exists():
                config = run_dir.load_config()
                undone = [n for t in range(2) for n in stage_names(config, t) if run_dir.stage(n, t).manifest() is None]
                stages.update(undone[:1])
        finish(path)
        assert contents(run_dir) == contents(RunDir(folder / "straight"))
    with capsys.disabled():
        print(f"\n[soak: {stopped} SIGTERMs in {', '.join(sorted(stages))}; the slowest end took {slowest:.1f} s]")
    assert len(stages) > 3


def test_kills_under_a_faulty_judge_lose_no_verdict(folder, capsys):
    whole = write_config(folder, "whole")
    finish(whole)
    begun = time.monotonic()
    finish(whole)  # nothing is left to do in it: this is what every start costs on this machine
    longest = 5.0 + (time.monotonic() - begun)
    rng, concurrency, kills = random.Random(1), 4, 0
    with FakeJudge(delay=0.05, fraction=0.2, faults=("429", "500", "garbage", "close"), seed=3) as server:
        openai = {
            "base_url": server.url,
            "api_key_env": None,
            "max_concurrency": concurrency,
            "model": "judge",
            "timeout": 5,
        }
        changes = {
            "iterations": 2,
            "annotation": {"kind": "openai", "openai": openai},
            "pairing": {"reward": "score", "positive_floor": 3, "margin": 1, "student_margin": 1},
        }
        path = write_config(folder, "faulty", **changes)
        status = None
        while status is None and kills < 60:
            status = killed_at_random(path, rng, longest=longest)
            kills += status is None
        assert status == 0, f"not finished after {kills} kills"
        assert kills > 2, "too few kills to mean anything"
        with capsys.disabled():
            print(f"\n[soak: {kills} kills, {server.requests} requests, {server.duplicates} verdicts bought twice]")
        assert server.duplicates <= concurrency * kills


def test_fifty_kills_of_annotation_in_a_row_lose_nothing(folder, capsys):
    """Thirty in a hundred requests meet a fault; what is bought twice is at most what was in flight at a kill."""
    concurrency, rng, lost = 8, random.Random(5), []
    faults = ("429", "500", "reset", "truncated", "cut_json", "garbage", "malformed", "too_few", "close")
    with FakeJudge(prefers="marker", delay=0.2, fraction=0.3, faults=faults) as server:
        openai = {"max_concurrency": concurrency, "timeout": 20.0, "max_tries": 8}
        config = sampled_run(
            folder / "killed",
            server.url,
            prompts=POOLS_A_KILL * KILLS,
            annotation={"openai": openai},
            pairing={"reward": "score"},
        )
        run_dir = RunDir(config.run_dir)
        path = folder / "killed.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        begun = time.monotonic()
        answers = {}
        for _ in range(KILLS):
            process = begin("annotate", path)
            seen = server.counts.answered.total()
            deadline = time.monotonic() + 60  # a start takes as long as it takes; the kill comes amid the work
            while server.counts.answered.total() == seen and process.exitcode is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.3))
            assert process.exitcode is None, "it ended before the last kill: give it more prompts"
            process.kill()
            process.join()
            while server.counts.in_flight:  # until it has seen them all end
                time.sleep(0.01)
            with contextlib.closing(VerdictStore(run_dir.annotations_path)) as store:
                rows = list(store.rows())
            kept = {row["key"]: row["scores"] for row in rows if row["state"] == "ok"}
            assert answers.items() <= kept.items()  # what was committed stays
            answers = kept
            # In flight, as the one who died saw it: what the server was asked, and no row says what came of it.
            lost.append(server.requests - sum(row["tries"] for row in rows) - sum(lost))
            assert 0 <= lost[-1] <= concurrency
        bought = server.counts.answered.total()
        seconds = time.monotonic() - begun
        done = start("annotate", path)
        assert done.returncode == 0, done.stderr[-3000:]
        with capsys.disabled():
            print(
                f"\n[soak: {KILLS} kills of annotation in {seconds:.0f} s, {bought} verdicts by then, "
                f"{sum(lost)} requests in flight at a kill, {server.duplicates} verdicts bought twice]"
            )
        assert server.duplicates <= sum(lost)
    texts = {row.rollout_id: row.text for row in run_dir.stage("sample", 0).read(Rollout)}
    rows = list(run_dir.stage("annotate", 0).read(Judgement))
    assert len(rows) == POOLS_A_KILL * KILLS
    for row in rows:  # a faultless judge's points, 1 to 6, of every candidate
        assert list(row.scores) == [math.floor(1.5 + 5.0 * worth(texts[name])) for name in row.candidate_ids]


def test_two_processes_survive_a_kill_of_either(folder):
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump(small_tree(folder, run_dir="pair")))
    rng = random.Random(2)
    environment = {**os.environ, "DNO": f"{Path(sys.executable).parent}/dno"}
    command = [str(ROOT / "launch" / "local.sh"), "2", str(path)]
    for victim in (0, 1, 0, 1):
        launcher = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(8.0, 25.0))
        found = subprocess.run(
            ["pgrep", "-f", f"{path} .*--process-id {victim}"], capture_output=True, text=True, check=False
        )
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        launcher.wait(timeout=300)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = write_config(folder, "alone")
    finish(alone)
    one, two = contents(RunDir(folder / "alone")), contents(RunDir(folder / "pair"))
    for stage in ("pair", "annotate"):
        assert one[0][stage, 0] == two[0][stage, 0]
