"""What is made once and handed on: counted over three iterations."""

from collections import Counter

import pytest

from dno_jax import iteration
from dno_jax.data import prompts
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import train
from tests.running import run_stage


@pytest.fixture
def counts(monkeypatch):
    found = Counter()

    def counted(owner, name, what):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            found[what(*args)] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    start = Runtime.start.__func__

    def counted_start(cls, config):
        found["runtimes"] += 1
        return start(cls, config)

    monkeypatch.setattr(Runtime, "start", classmethod(counted_start))
    counted(RunDir, "__init__", lambda *_: "run directories")
    counted(prompts, "read_rows", lambda path: f"reads of {path}")
    counted(prompts, "_tokenized", lambda prompt: f"tokenisations of {prompt.prompt_id}")
    counted(ChatTokenizer, "prompt_ids", lambda *_: "prompt_ids")
    return found


@pytest.mark.soak
def test_a_run_makes_one_runtime_and_reads_and_tokenises_its_prompts_once(make_config, counts):
    config = make_config(iterations=3, prompts={"split": "shared"})
    iteration.run(config)
    assert counts["runtimes"] == 1
    assert counts["run directories"] == 1
    assert counts[f"reads of {config.prompts.path}"] == 1
    assert counts[f"reads of {config.prompts.held_out_path}"] == 1
    tokenised = {name: count for name, count in counts.items() if name.startswith("tokenisations")}
    assert len(tokenised) == 16  # 12 prompts of every iteration, 4 held out
    assert set(tokenised.values()) == {1}


@pytest.mark.soak
def test_training_alone_tokenises_nothing(make_config, counts):
    config = make_config(iterations=1)
    iteration.run(config)
    run_dir = RunDir(config.run_dir)
    run_dir.stage("train", 0).manifest_path.unlink()
    counts.clear()
    run_stage(train, config, 0)
    assert counts["prompt_ids"] == 0
    assert not [name for name in counts if "reads" in name or "tokenisations" in name]
