"""Policy t+1 on held-out prompts against every policy before it and the teacher; which one is best so far."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dno_jax.annotation.annotator import Candidate, Pool, build_annotator
from dno_jax.annotation.endpoint_annotator import EndpointAnnotator
from dno_jax.annotation.receipts import closing
from dno_jax.config import RunConfig
from dno_jax.console import Meter
from dno_jax.data.prompts import split_prompts, tokenize_prompts
from dno_jax.errors import DnoError
from dno_jax.evaluation.win_rates import best_policy, win_rate
from dno_jax.parallel.mesh import is_primary, wait_until
from dno_jax.preferences import win_matrix
from dno_jax.records import Judgement, Prompt, Rollout
from dno_jax.run_dir import Manifest, RunDir, StageDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.sampler import SampleSpec
from dno_jax.stages.annotate import judge_pools
from dno_jax.stages.checkpoints import pool_member
from dno_jax.stages.draw import Draws, sample_to_shards
from dno_jax.stages.sample import response_statistics
from dno_jax.stages.teach import with_gold

GOLD = "gold"
AVERAGE = "average"  # the mixture of all policies before the newest


def run(config: RunConfig, iteration: int) -> Manifest:
    """Sample the held-out prompts from policy t+1 and judge them beside policies 0..t and the teacher.

    Without held-out prompts nothing is judged and the newest policy counts as the best.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict; run again to ask for those.
    """
    start = time.perf_counter()
    runtime = Runtime.start(config)
    run_dir, newest = runtime.run_dir, iteration + 1
    stage = run_dir.stage("evaluate", iteration)
    held_out = with_gold(config, split_prompts(config).held_out, iteration=None)
    shown = "".join(prompt.model_dump_json() for prompt in held_out)
    inputs = {"held-out prompts": hashlib.sha256(shown.encode()).hexdigest()}
    inputs |= runtime.policy_inputs(*(run_dir.policy(policy) for policy in range(newest + 1)))
    if manifest := stage.finished(inputs, config_digest=runtime.config_digest):
        return manifest
    tokenized, dropped = tokenize_prompts(held_out, tokenizer=runtime.tokenizer, config=config)
    specs = (SampleSpec("policy", config.evaluation.num_samples),)
    for policy in [0, 1] if iteration == 0 else [newest]:
        if tokenized:
            sample_to_shards(
                runtime,
                tokenized,
                Draws(specs, {"policy": run_dir.policy(policy)}, policy),
                out=rollouts_of(run_dir, policy),
                description=f"held out  {policy}",
            )
    if is_primary():
        judged = _judge(config, run_dir, [item.prompt for item in tokenized], stage=stage, newest=newest)
        stage.finish(
            config_digest=runtime.config_digest,
            inputs=inputs,
            rows=len(judged.preferences),
            dropped=dropped + judged.dropped,
            seconds=time.perf_counter() - start,
            details=_figures(run_dir, judged, newest=newest),
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


def rollouts_of(run_dir: RunDir, policy: int) -> StageDir:
    """Where a policy's held-out responses lie: with the iteration that trained it (policy 0's with iteration 0)."""
    return run_dir.stage("evaluate", max(policy - 1, 0)).sub(f"policy-{policy:03d}")


@dataclass
class _Judged:
    preferences: list[tuple[str, str, str, float]]  # prompt id, player, opponent, P(player preferred)
    dropped: Counter[str]


@dataclass(frozen=True)
class _Players:
    """One sample of every player on one prompt."""

    prompt: Prompt
    sample: int
    texts: dict[str, str]  # player -> text

    def pool(self) -> Pool | None:
        """What the judge is shown; None where all players gave the same words."""
        distinct = self._distinct()
        if len(distinct) < 2:
            return None
        # The sample is part of the id: a judge that draws its verdicts must draw anew for each.
        prefix = self.prompt.assistant_prefix
        candidates = tuple(Candidate(f"{names[0]}/{self.sample}", prefix + self.texts[names[0]]) for names in distinct)
        return Pool(prompt=self.prompt, candidates=candidates)

    def _distinct(self) -> list[list[str]]:
        """The players by their words: the same words are shown to the judge once."""
        distinct: dict[str, list[str]] = {}
        for name, text in self.texts.items():
            distinct.setdefault(text.strip(), []).append(name)
        return list(distinct.values())

    def preferences(self, verdict: Judgement | None) -> list[tuple[str, str, str, float]]:
        """Every ordered comparison of two players; equal texts tie."""
        place: dict[str, int] = {}
        for names in self._distinct():
            position = verdict.candidate_ids.index(f"{names[0]}/{self.sample}") if verdict else 0
            place |= dict.fromkeys(names, position)
        wins = np.full((1, 1), 0.5) if verdict is None else win_matrix(wins=verdict.wins, scores=verdict.scores)
        return [
            (self.prompt.prompt_id, first, second, float(wins[place[first], place[second]]))
            for first, second in itertools.permutations(self.texts, 2)
        ]


def _judge(config: RunConfig, run_dir: RunDir, prompts: Sequence[Prompt], *, stage: StageDir, newest: int) -> _Judged:
    """Judge one pool a prompt and sample: that sample of every policy, and the teacher's response."""
    responses: dict[tuple[str, int], dict[str, str]] = {}
    for policy in range(newest + 1):
        for rollout in rollouts_of(run_dir, policy).read(Rollout):
            responses.setdefault((rollout.prompt_id, rollout.sample), {})[str(policy)] = rollout.text
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    players: list[_Players] = []
    left_out = set(by_id) - {prompt_id for prompt_id, _ in responses}
    for (prompt_id, sample), texts in sorted(responses.items()):
        if prompt_id in by_id and len(texts) <= newest and config.sampling.engine == "openai":
            left_out.add(prompt_id)  # a server had no usable answer for one policy: it is compared with none
            continue
        if prompt_id not in by_id or len(texts) <= newest:
            raise DnoError(
                f"{run_dir.path}: the held-out prompts are not those that earlier policies answered "
                f"(prompt {prompt_id!r}); restore the file, or remove the evaluation folders of all iterations"
            )
        gold = by_id[prompt_id].gold
        if gold and gold.strip():
            texts = texts | {GOLD: gold}
        if config.outer.scheme == "average":
            member = pool_member(prompt_id, seed=config.seed, sample=sample, size=newest)
            texts = texts | {AVERAGE: texts[str(member)]}
        players.append(_Players(by_id[prompt_id], sample, texts))
    annotator = build_annotator(config.evaluation_judge, store_path=str(run_dir.annotations_path), seed=config.seed)

    pools = {index: pool for index, group in enumerate(players) if (pool := group.pool())}

    async def judge_all() -> list[Judgement]:
        async with closing(annotator, run_dir):
            with Meter(f"judge     {newest}", total=len(pools), unit="pools") as meter:
                judgements = await judge_pools(annotator, list(pools.values()), meter=meter)
            broke = sum(judgement.state == "over budget" for judgement in judgements)
            if broke and isinstance(annotator, EndpointAnnotator):
                raise annotator.desk.budget.stop(missing=broke)
            return judgements

    judgements = dict(zip(pools, asyncio.run(judge_all()), strict=True))
    verdicts = [judgements.get(index) for index in range(len(players))]
    answered = [verdict for verdict in verdicts if verdict is not None]
    missing = [verdict for verdict in answered if verdict.state != "ok"]
    if len(missing) > config.evaluation_judge.max_failed * max(len(players), 1):
        reasons = Counter(f"{verdict.state}: {verdict.detail}" for verdict in missing).most_common(1)
        raise DnoError(
            f"{stage.path}: {len(missing)} of {len(players)} held-out pools have no verdict "
            f"(most often {reasons[0][0]}); run again: verdicts that were given are kept"
        )
    stage.sub("judgements").write_shard("0000000", answered)
    preferences: list[tuple[str, str, str, float]] = []
    for group, verdict in zip(players, verdicts, strict=True):
        if verdict is None or verdict.state == "ok":
            preferences += group.preferences(verdict)
    dropped = {"held-out pool without verdict": len(missing), "no usable response from the server": len(left_out)}
    return _Judged(preferences, +Counter(dropped))


def _figures(run_dir: RunDir, judged: _Judged, *, newest: int) -> dict[str, Any]:
    """The manifest's details: win rates of the newest policy, the matrix over policies, lengths, the best."""
    lengths = {
        str(policy): response_statistics(rollouts_of(run_dir, policy).read(Rollout)) for policy in range(newest + 1)
    }
    if not judged.preferences:
        why = "no verdict on any held-out pool" if judged.dropped else "no held-out prompts"
        return {"policy": newest, "win_rates": {}, "lengths": lengths, "best": newest, "why": f"the newest: {why}"}

    def rate(player: str, opponent: str) -> Any:
        rows = [row for row in judged.preferences if row[1] == player and row[2] == opponent]
        return win_rate([row[3] for row in rows], [row[0] for row in rows]) if rows else None

    players = [str(policy) for policy in range(newest + 1)]
    opponents = [*players[:-1], GOLD]
    rates = {opponent: found.as_dict() for opponent in opponents if (found := rate(str(newest), opponent))}
    average = {opponent: found.as_dict() for opponent in [*players, GOLD] if (found := rate(AVERAGE, opponent))}
    matrix = np.full((newest + 1, newest + 1), 0.5)
    for i, j in itertools.permutations(range(newest + 1), 2):
        matrix[i, j] = rate(players[i], players[j]).rate
    return {
        "policy": newest,
        "win_rates": rates,
        **({AVERAGE: average} if average else {}),
        "matrix": np.round(matrix, 4).tolist(),
        "lengths": lengths,
        "best": best_policy(matrix),
        "why": "highest mean win rate over the other policies on held-out prompts",
    }
