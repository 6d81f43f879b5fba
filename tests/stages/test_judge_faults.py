"""The annotate and pair stages behind an endpoint that fails in every way it can: later, never other, labels."""

import contextlib
import json
import re
from collections import Counter

import pytest

from dno_jax.annotation.ledger.store import VerdictStore
from dno_jax.errors import DnoError
from dno_jax.fake_judge import OUTCOMES, FakeJudge
from dno_jax.records import Judgement
from dno_jax.run_dir import RunDir
from dno_jax.stages import annotate, pair
from tests.annotation.scripted import Scripted, after_probe, completion, fault
from tests.pairs import read_pairs
from tests.running import run_stage
from tests.stages.judged import sampled_run

STATUSES = ("400", "408", "429", "500", "503")
FAULTS = (*STATUSES, *(outcome for outcome in OUTCOMES if outcome != "ok"))
PROMPTS = 10


@pytest.mark.parametrize("form", ["listwise", "pairwise", "logprob"])
def test_a_third_of_faults_of_every_kind_ends_in_the_labels_of_a_faultless_run(tmp_path, monkeypatch, form):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("dno_jax.annotation.transport.routes.FIRST_PAUSE_SECONDS", 0.05)
    possible = {fault for fault in FAULTS if (fault, form) != ("length", "logprob")}  # one token cannot be cut
    openai = {"form": form, "num_orders": 12 if form == "listwise" else 1, "timeout": 1.0}  # 12 questions a pool
    each_once = [outcome for fault in sorted(possible) for outcome in (fault, None, None)]
    found = []
    for name, schedule, fraction in (("faultless", [], 0.0), ("faulty", each_once, 0.3)):
        with FakeJudge(prefers="marker", schedule=schedule, fraction=fraction, faults=sorted(possible)) as server:
            config = sampled_run(
                tmp_path / name,
                server.url,
                prompts=PROMPTS,
                annotation={"openai": openai},
                pairing={"reward": "score" if form == "listwise" else "win_rate", "margin": 0.0},
            )
            run_dir, runs = RunDir(config.run_dir), 0
            stage = run_dir.stage("annotate", 0)
            while stage.manifest() is None:
                runs += 1
                assert runs <= 6  # what is asked at temperature 0 and not understood is not asked again in one run
                with contextlib.suppress(DnoError):
                    run_stage(annotate, config, 0)
                for row in stage.read(Judgement):  # what is closed before the end holds nothing but answers, too
                    assert row.state == "ok"
                    assert {answer.state for answer in row.answers} <= {"ok", "tie"}
            assert (runs > 1) == (fraction > 0.0)
            if fraction:
                assert set(server.counts.outcomes) == possible | {"ok", "probe"}
        with contextlib.closing(VerdictStore(run_dir.annotations_path)) as store:
            assert {tally.state for tally in store.tallies()} <= {"ok", "tie"}
            assert sum(tally.verdicts for tally in store.tallies()) == 12 * PROMPTS
        run_stage(pair, config, 0)
        judgements = [row.model_dump(exclude={"raw"}) for row in stage.read(Judgement)]
        found.append((judgements, read_pairs(run_dir.stage("pair", 0))))
    assert found[0] == found[1]
    assert len(found[0][1]) == 6 * PROMPTS


@pytest.mark.parametrize(("failures", "ends"), [(2, True), (3, False)], ids=["mended", "for good"])
def test_what_a_server_fails_with_is_judged_once_more_at_the_end(failures, ends, tmp_path, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.001)
    tries = Counter()

    def script(asked):
        text = asked.body["messages"][-1]["content"]
        (number,) = re.findall(r"Question (\d+)\?", text)
        tries[number] += 1
        if number == "5" and tries[number] <= failures:
            return fault(500, "index")
        names = re.findall(r"<<<CANDIDATE (\d+) ", text)
        return completion(json.dumps({name: {"justification": "first", "score": int(name)} for name in names}))

    with Scripted(after_probe(script)) as server:
        config = sampled_run(tmp_path, server.url, prompts=PROMPTS, annotation={"openai": {"max_tries": 2}})
        if ends:
            assert run_stage(annotate, config, 0).rows == PROMPTS
        else:
            with pytest.raises(DnoError, match=r"1 of 10 pools have no verdict \(1 x failed: HTTP 500: index\)"):
                run_stage(annotate, config, 0)
    assert tries.pop("5") == 3  # all its tries, and one more
    assert set(tries.values()) == {1}
    rows = list(RunDir(config.run_dir).stage("annotate", 0).read(Judgement))
    assert {row.state for row in rows} == {"ok"}
    assert len(rows) == (PROMPTS if ends else PROMPTS - 4)  # a shard of four stays open
