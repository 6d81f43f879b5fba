"""Run directories made up for reports: as large as asked for, and with texts of which none may act."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from dno_jax.config import RunConfig, parse_config
from dno_jax.data.pairs import NEW, REPLAYED, pair_table, write_pairs
from dno_jax.records import Judgement, Message, Pair, Prompt, Rollout
from dno_jax.run_dir import RunDir

HOSTILE = (
    "<script>window.owned = 1</script>",
    "</script><script>window.owned = 1</script>",
    "<!--<script>",
    "<img src=x onerror='window.owned = 1'><svg onload='window.owned = 1'>",
    '"><a href="javascript:window.owned=1">click</a>',
    "\x1b[2J\x1b]0;owned\x07\x9b31m gone\r",
    "\u202eright to left\u2066 isolated\u200f",
    "שלום עולם and مرحبا",
    "{{ 7 * 7 }} {% raw %} ${owned}",
    "line\u2028separator \U000e0041tag \x00null",
    "&lt;b&gt; &amp; \\u003cscript\\u003e",
)


def build(
    folder: Path,
    *,
    prompts: int = 12,
    held_out: int = 6,
    iterations: int = 2,
    samples: int = 3,
    words: int = 12,
    answer_words: int = 60,
    hostile: bool = False,
    steps: int = 8,
) -> tuple[RunConfig, RunDir]:
    """Write a finished run of so many prompts, shared evenly by its iterations."""
    rng = np.random.default_rng(0)
    vocabulary = _vocabulary(rng)
    texts = itertools.chain([*HOSTILE, "x" * 1_000_000], itertools.cycle(HOSTILE)) if hostile else None

    def text(longest: int) -> str:
        if texts is not None:
            return next(texts)
        # As often as a word of its rank in English; a page of it packs about as well.
        ranks = np.minimum(rng.zipf(1.35, size=int(rng.integers(longest // 2, longest + 1))), len(vocabulary)) - 1
        return " ".join(vocabulary[rank] for rank in ranks)

    def prompt(name: str) -> Prompt:
        asked = Message(role="user", content=text(words) if hostile else f"{text(words)}?")
        return Prompt(prompt_id=name, messages=(asked,), gold=text(words) or "gold")

    folder.mkdir(parents=True, exist_ok=True)
    name = "<b>run\x1b[31m" if hostile else "run"
    questions = [prompt(f"<i>h{i}</i>" if hostile else f"h{i}") for i in range(held_out)]
    (folder / "held_out.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in questions))
    config = parse_config(RunConfig, {
        "run_dir": str(folder / name), "iterations": iterations, "model": {"path": "m"},
        "prompts": {"path": str(folder / "prompts.jsonl"), "held_out_path": str(folder / "held_out.jsonl")},
        "pairing": {"reward": "win_rate", "positive_floor": 0.5, "margin": 0.2, "student_margin": 0.2},
    }, place="test")  # fmt: skip
    run_dir = RunDir(config.run_dir)
    run_dir.create(config)
    for policy in range(iterations + 1):
        run_dir.policy(policy).mkdir(parents=True)
    run_dir.export_path.mkdir()
    judge = f"judge {HOSTILE[0]}" if hostile else "judge"
    for t in range(iterations):
        part = [prompt(f"p{i}") for i in range(t, prompts, iterations)]
        run_dir.iteration_path(t).mkdir(parents=True, exist_ok=True)
        run_dir.prompts_path(t).write_text("".join(row.model_dump_json() + "\n" for row in part))
        stages = {stage: run_dir.stage(stage, t) for stage in ("sample", "annotate", "pair", "score", "train")}
        pairs, rollouts = [], {}
        for first in range(0, len(part), 256):
            shard = part[first : first + 256]
            rows = [row for one in shard for row in _candidates(one, t, samples, lambda: text(answer_words))]
            pools = [[row for row in rows if row.prompt_id == one.prompt_id] for one in shard]
            verdicts = [_verdict(pool, judge, rng, text if hostile else None) for pool in pools]
            stages["sample"].write_shard(f"{first:07d}", rows)
            stages["annotate"].write_shard(f"{first:07d}", verdicts)
            rollouts |= {row.rollout_id: row for row in rows}
            pairs += [_pair(verdict, t) for verdict in verdicts]
        write_pairs(stages["pair"].path / f"{NEW}.parquet", [
            pair_table(pairs, rollouts, {one.prompt_id: one for one in part})
        ])  # fmt: skip
        write_pairs(stages["pair"].path / f"{REPLAYED}.parquet", [])
        count = len(part) * samples
        lengths = {"responses": count, "tokens": count * words, "mean_tokens": float(words), "mean_words": float(words),
                   "std_words": 2.0, "stopped": 1.0}  # fmt: skip
        audit = {"responses": 5, "tokens": 50, "mean": 1e-7, "max": 2e-7, "error": 3e-7, "bound": 1e-4,
                 "dtype": "float32"}  # fmt: skip
        tie = {"value": 0.25, "low": 0.2, "high": 0.3, "n": count, "prompts": len(part)}
        scores = {"mean": {"student": tie}, "width": 0.1, "bins": {"student": {"0": 3, "0.5": 4}}}
        done = {
            "sample": lengths | {"audit": audit, "cut": {"samples": 0.25}},
            "annotate": {"judge": judge, "quality": {"tie_rate": tie, "scores": scores}, "warnings": []},
            "pair": {"new": len(pairs), "replayed": 0, "kinds": {"student>student": len(pairs), "gold>student": 1}},
            "score": {}, "train": {},
        }  # fmt: skip
        dropped = {text(3) if hostile else "tie": 3}
        for stage, details in done.items():
            stages[stage].finish(
                config, inputs={}, rows=1, seconds=1.25 + t, details=details, dropped=dropped if stage == "pair" else {}
            )
        for step in range(steps):
            run_dir.append_metrics({
                "iteration": t, "stage": "train", "step": step, "loss": 0.69 - 0.01 * step, "grad_norm": 1.0 + step,
                "chosen_logprob": -9.0, "rejected_logprob": -11.0 - step, "chosen_reward": 0.01 * step,
                "rejected_reward": -0.02 * step, "kl": 0.1 * step, "accuracy": 0.5,
            })  # fmt: skip
        _evaluate(config, run_dir, t, questions, rng, lambda: text(answer_words), lengths)
    return config, run_dir


def _vocabulary(rng: np.random.Generator) -> list[str]:
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    shares = 1.0 / np.arange(1, len(letters) + 1) ** 0.6
    sizes = rng.integers(2, 10, size=4000)
    return ["".join(rng.choice(letters, size=size, p=shares / shares.sum())) for size in sizes]


def _rollout(name: str, prompt_id: str, sample: int, policy: int | None, text: str) -> Rollout:
    return Rollout(
        rollout_id=name, prompt_id=prompt_id, sample=sample, source="gold" if policy is None else "policy",
        policy=policy, text=text, token_ids=list(range(len(text.split()) + 1)), prompt_token_ids=[1],
        logprob=None if policy is None else -5.0, finish="length" if sample == 1 else "stop",
    )  # fmt: skip


def _candidates(prompt: Prompt, t: int, samples: int, text) -> list[Rollout]:
    names = [(f"{t:03d}/{prompt.prompt_id}/{sample}", sample) for sample in range(samples)]
    rows = [_rollout(name, prompt.prompt_id, sample, t, text()) for name, sample in names]
    return [*rows, _rollout(f"{t:03d}/{prompt.prompt_id}/gold", prompt.prompt_id, -1, None, prompt.gold or "")]


def _verdict(rows, judge, rng, words) -> Judgement:
    scores = tuple(rng.permutation(len(rows)).astype(float).tolist())
    return Judgement(
        prompt_id=rows[0].prompt_id, candidate_ids=tuple(row.rollout_id for row in rows), judge=judge, state="ok",
        scores=scores, raw=words(20) if words else "The first is shorter, the second is right.",
    )  # fmt: skip


def _pair(verdict: Judgement, t: int) -> Pair:
    order = np.argsort(verdict.scores)
    best, worst = int(order[-1]), int(order[0])
    return Pair(
        pair_id=f"{t}/{verdict.prompt_id}", prompt_id=verdict.prompt_id, chosen_id=verdict.candidate_ids[best],
        rejected_id=verdict.candidate_ids[worst], chosen_reward=0.9, rejected_reward=0.1 + 0.1 * (best % 3), target=1.0,
        kind="student>student", iteration=t,
    )  # fmt: skip


def _evaluate(config, run_dir, t, questions, rng, text, lengths) -> None:
    stage, newest = run_dir.stage("evaluate", t), t + 1
    for policy in range(newest + 1) if t == 0 else [newest]:
        rows = [_rollout(f"{policy}/{one.prompt_id}/0", one.prompt_id, 0, policy, text()) for one in questions]
        stage.sub(f"policy-{policy:03d}-0-1").write_shard("0000000", rows)
    players = [*map(str, range(newest + 1)), "gold"]
    verdicts = []
    for one in questions:
        wins = np.full((len(players), len(players)), 0.5)
        for i, j in itertools.combinations(range(len(players)), 2):
            wins[i, j] = float(rng.integers(0, 3)) / 2
            wins[j, i] = 1.0 - wins[i, j]
        verdicts.append(Judgement(
            prompt_id=one.prompt_id, candidate_ids=tuple(f"{name}/0" for name in players), judge="judge", state="ok",
            wins=tuple(map(tuple, wins.tolist())), raw=text()[:80],
        ))  # fmt: skip
    stage.sub("judgements").write_shard("0000000", verdicts)
    matrix = [[0.5 + 0.1 * (i - j) for j in range(newest + 1)] for i in range(newest + 1)]
    rate = {"low": 0.45, "high": 0.75, "comparisons": len(questions), "prompts": len(questions)}
    rates = {str(j): rate | {"rate": matrix[newest][j]} for j in range(newest)} | {"gold": rate | {"rate": 0.52}}
    stage.finish(config, inputs={}, rows=1, seconds=0.5, details={
        "policy": newest, "win_rates": rates, "matrix": matrix, "best": newest, "why": "the highest mean",
        "lengths": {str(policy): lengths for policy in range(newest + 1)},
    })  # fmt: skip
