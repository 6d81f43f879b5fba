"""Run directories whose sampling is done, without a model: responses with planted worth, for a fake judge."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from dno_jax.config import RunConfig, parse_config
from dno_jax.files import write_atomically
from dno_jax.records import Message, Prompt, Rollout
from dno_jax.run_dir import RunDir
from tests.configured import deep_merge

SHARD = 4


def paid(config: RunConfig) -> dict[str, Any]:
    """What receipts.json says of the run's one store."""
    (receipt,) = json.loads(RunDir(config.run_dir).receipts_path.read_text())["stores"].values()
    return receipt


def worth(text: str) -> float:
    return float(text.split("q=")[1].split()[0])


def judged_tree(folder: Path, url: str, **changes: Any) -> dict[str, Any]:
    """A configuration whose judge is behind `url`; no model is read."""
    tree = {
        "run_dir": str(folder),
        "iterations": 1,
        "model": {"path": str(folder)},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "sampling": {"num_samples": 4, "shard_prompts": SHARD},
        "annotation": {
            "kind": "openai",
            "openai": {"model": "judge", "base_url": url, "api_key_env": None, "timeout": 5.0, "max_outage": 5.0},
        },
        "pairing": {"reward": "win_rate", "rule": "all", "replay": 0.0},
    }
    return deep_merge(tree, changes)


def sampled_run(folder: Path, url: str, *, prompts: int, candidates: int = 4, **changes: Any) -> RunConfig:
    """Write prompts and closed shards of rollouts, whose worth is a shuffled 0..1 in each pool (gold's too)."""
    config = parse_config(RunConfig, judged_tree(folder, url, **changes), place="test")
    run_dir = RunDir(config.run_dir)
    stage = run_dir.stage("sample", 0)
    lines: list[str] = []
    for first in range(0, prompts, SHARD):
        rows: list[Rollout] = []
        for number in range(first, min(first + SHARD, prompts)):
            prompt = Prompt(prompt_id=f"p{number:05d}", messages=(Message(role="user", content=f"Question {number}?"),))
            lines.append(prompt.model_dump_json() + "\n")
            rows += _rollouts(prompt.prompt_id, candidates)
        stage.write_shard(f"{first:07d}", rows)
    write_atomically(run_dir.prompts_path(0), "".join(lines))
    stage.finish(config, inputs={}, rows=prompts * candidates, seconds=0.0)
    return config


def _rollouts(prompt_id: str, candidates: int) -> list[Rollout]:
    rng = random.Random(prompt_id)
    worths = [round(place / (candidates - 1), 3) for place in range(candidates)]
    rng.shuffle(worths)
    return [
        Rollout(
            rollout_id=f"000/{prompt_id}/{'gold' if sample < 0 else sample}",
            prompt_id=prompt_id,
            sample=sample,
            source="gold" if sample < 0 else "policy",
            policy=None if sample < 0 else 0,
            text=f"answer {sample} of {prompt_id} q={planted} " + "word " * rng.randrange(3, 12),
            token_ids=(5, 6, 2),
            prompt_token_ids=(1,),
            logprob=None if sample < 0 else -1.0,
            finish="stop",
        )
        for sample, planted in zip(range(-1, candidates - 1), worths, strict=True)
    ]
