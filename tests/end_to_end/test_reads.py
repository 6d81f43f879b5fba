"""How often a stage parses what another one wrote."""

from collections import Counter

import pytest

from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import StageDir
from dno_jax.stages import annotate, evaluate, pair, sample, score, train
from tests.running import prepare, run_stage


@pytest.fixture
def parsed(monkeypatch):
    """Shards that were parsed, by path."""
    found, real = Counter(), StageDir.read_shard

    def counting(self, kind, name):
        found[f"{self.path}/{name}"] += 1
        return real(self, kind, name)

    monkeypatch.setattr(StageDir, "read_shard", counting)
    return found


@pytest.mark.soak
def test_a_stage_parses_each_shard_once_at_most(make_config, parsed):
    config = make_config(iterations=2)
    prepare(config)
    for t in range(2):
        for stage in (sample, annotate, pair, score, train, evaluate):
            parsed.clear()
            run_stage(stage, config, t)
            assert max(parsed.values(), default=0) <= 1, (stage.__name__, t, parsed)
            if stage in (sample, annotate, pair):
                assert parsed, stage.__name__
            else:  # scoring and training read pairs, and evaluation its own samples
                assert not [name for name in parsed if "rollouts" in name]


def test_what_an_earlier_call_judged_is_parsed_once_too(make_config, parsed):
    config = make_config(iterations=1)
    run_dir = RunDir(config.run_dir)
    prepare(config)
    run_stage(sample, config, 0)
    whole = run_stage(annotate, config, 0)
    stage = run_dir.stage("annotate", 0)
    stage.manifest_path.unlink()
    (stage.path / f"{stage.shard_names()[0]}.jsonl").unlink()
    parsed.clear()
    again = run_stage(annotate, config, 0)
    assert set(parsed.values()) == {1}
    assert len(parsed) == 2 * len(stage.shard_names()) - 1
    assert (again.outputs, again.details, again.dropped) == (whole.outputs, whole.details, whole.dropped)
