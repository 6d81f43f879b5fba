"""Policy t+1 on held-out prompts against every policy before it and the teacher; which one is best so far."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dno_jax.annotation.build import build_annotator
from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.annotation.receipts import closing
from dno_jax.annotation.shortfall import refuse_shortfall
from dno_jax.config import RunConfig
from dno_jax.console import Meter
from dno_jax.data.pools import shown_prefix, shown_text
from dno_jax.data.prompts import TokenizedPrompt
from dno_jax.errors import DnoError
from dno_jax.evaluation.win_rates import best_policy, win_rate
from dno_jax.parallel.cluster import barrier, is_primary, wait_until
from dno_jax.preferences import win_matrix
from dno_jax.reasoning import split_thought
from dno_jax.records import Judgement, Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.sampler import SampleSpec
from dno_jax.stage_dir import Manifest, StageDir
from dno_jax.stages import redo
from dno_jax.stages.annotate import judge_late, judge_pools
from dno_jax.stages.checkpoints import pool_member
from dno_jax.stages.draw import Draws, sample_to_shards
from dno_jax.stages.sample import ResponseLengths
from dno_jax.stages.teach import taught

GOLD = "gold"
_SHOWN_CHARACTERS = 2000  # of a message or an answer
AVERAGE = "average"  # the mixture of all policies before the newest


def run(runtime: Runtime[RunConfig], iteration: int) -> Manifest:
    """Sample the held-out prompts from policy t+1 and judge them beside policies 0..t and the teacher.

    Without held-out prompts nothing is judged and the newest policy counts as the best. Where the configuration of
    evaluation has changed, earlier results are set aside: responses that are there stay, and so do verdicts.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict; run again to ask for those.
    """
    start = time.perf_counter()
    config, run_dir, newest = runtime.config, runtime.run_dir, iteration + 1
    stage = run_dir.stage("evaluate", iteration)
    gold = taught(config, run_dir, iteration=None)
    held_out = [gold.add(prompt) for prompt in runtime.prompts.split.held_out]
    shown = "".join(prompt.model_dump_json() for prompt in held_out)
    inputs = {"held-out prompts": hashlib.sha256(shown.encode()).hexdigest()}
    inputs |= runtime.policy_inputs(*(run_dir.policy(policy) for policy in range(newest + 1)))
    if is_primary():
        redo.set_evaluation_aside(run_dir, config, iteration)
    barrier(f"evaluate {iteration}")
    if manifest := stage.finished(config, inputs):
        return manifest
    if is_primary():
        stage.start(config)
    part = runtime.prompts.held_out
    tokenized = [replace(item, prompt=gold.add(item.prompt)) for item in part.kept]
    dropped = Counter(part.dropped)
    for policy in range(newest + 1) if tokenized else ():
        _answer(runtime, tokenized, policy=policy)
    if is_primary():
        judged = _judge(config, run_dir, [item.prompt for item in tokenized], stage=stage, newest=newest)
        stage.finish(
            config,
            inputs=inputs,
            rows=len(judged.preferences),
            dropped=dropped + judged.dropped,
            seconds=time.perf_counter() - start,
            details=_figures(judged, newest=newest),
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


def _answer(runtime: Runtime[RunConfig], prompts: Sequence[TokenizedPrompt], *, policy: int) -> None:
    """Draw what is missing of a policy's held-out responses; samples of an earlier, smaller number stay as they are."""
    run_dir = runtime.run_dir
    for first, count in sample_ranges(run_dir, policy, num_samples=runtime.config.evaluation.num_samples):
        sample_to_shards(
            runtime,
            prompts,
            Draws((SampleSpec("policy", count, first_sample=first),), {"policy": run_dir.policy(policy)}, policy),
            out=rollouts_of(run_dir, policy, first, count),
            description=f"held out  {policy}",
        )


def sample_ranges(run_dir: RunDir, policy: int, *, num_samples: int) -> list[tuple[int, int]]:
    """Return how a policy's held-out samples lie: (first sample, number of samples) of each folder, in order.

    What an earlier call began stays as it was cut; what is missing of `num_samples` is one more range. The last may go
    beyond, where an earlier call drew more.
    """
    folder = rollouts_of(run_dir, policy, 0, 0).path.parent
    names = [path.name.split("-") for path in folder.iterdir()] if folder.exists() else []
    found = {int(first): int(count) for _, own, first, count in (n for n in names if len(n) == 4) if int(own) == policy}
    ranges: list[tuple[int, int]] = []
    first = 0
    while first < num_samples:
        ranges.append((first, found.get(first, num_samples - first)))
        first += ranges[-1][1]
    return ranges


def rollouts_of(run_dir: RunDir, policy: int, first: int, count: int) -> StageDir:
    """Where `count` held-out responses of a policy from sample `first` on lie: with the iteration that trained it.

    Policy 0's lie with iteration 0.
    """
    return run_dir.stage("evaluate", max(policy - 1, 0)).sub(f"policy-{policy:03d}-{first}-{count}")


def read_responses(run_dir: RunDir, policy: int, *, num_samples: int) -> Iterator[Rollout]:
    """Read the first samples per held-out prompt of a policy."""
    for first, count in sample_ranges(run_dir, policy, num_samples=num_samples):
        rows = rollouts_of(run_dir, policy, first, count).read(Rollout)
        yield from (row for row in rows if row.sample < num_samples)


@dataclass
class _Judged:
    preferences: list[tuple[str, str, str, float]]  # prompt id, player, opponent, P(player preferred)
    dropped: Counter[str]
    lengths: dict[str, dict[str, Any]]  # of each policy's responses
    shown: dict[str, Any] | None = None  # one prompt and all policies' answers, for people to read


@dataclass(frozen=True)
class _Players:
    """One sample of every player on one prompt. Who has no answer is shown to no judge and loses to whoever has one."""

    prompt: Prompt
    sample: int
    texts: dict[str, str]  # player -> what a judge reads; empty where there is no answer
    reasoning: bool = False  # whether thoughts are shown

    def pool(self) -> Pool | None:
        """What the judge is shown; None where all players that have an answer gave the same words."""
        distinct = self._distinct()
        if len(distinct) < 2:
            return None
        # The sample is part of the id: a judge that draws its verdicts must draw anew for each.
        prefix = shown_prefix(self.prompt, reasoning=self.reasoning)
        candidates = tuple(Candidate(f"{names[0]}/{self.sample}", prefix + self.texts[names[0]]) for names in distinct)
        return Pool(prompt=self.prompt, candidates=candidates)

    def _distinct(self) -> list[list[str]]:
        """The players by their words: the same words are shown to the judge once."""
        distinct: dict[str, list[str]] = {}
        for name, text in self.texts.items():
            if text.strip():
                distinct.setdefault(text.strip(), []).append(name)
        return list(distinct.values())

    def preferences(self, verdict: Judgement | None) -> list[tuple[str, str, str, float]]:
        """Every ordered comparison of two players; equal texts tie."""
        place: dict[str, int] = {}
        for names in self._distinct():
            position = verdict.candidate_ids.index(f"{names[0]}/{self.sample}") if verdict else 0
            place |= dict.fromkeys(names, position)
        wins = np.full((1, 1), 0.5) if verdict is None else win_matrix(wins=verdict.wins, scores=verdict.scores)

        def preference(first: str, second: str) -> float:
            if first in place and second in place:
                return float(wins[place[first], place[second]])
            return 0.5 * (1 + (first in place) - (second in place))

        return [
            (self.prompt.prompt_id, first, second, preference(first, second))
            for first, second in itertools.permutations(self.texts, 2)
        ]


def _judge(config: RunConfig, run_dir: RunDir, prompts: Sequence[Prompt], *, stage: StageDir, newest: int) -> _Judged:
    """Judge one pool per prompt and sample: that sample of every policy, and the teacher's response."""
    responses: dict[tuple[str, int], dict[str, str]] = {}
    lengths: dict[str, dict[str, Any]] = {}
    reasoning, unanswered = config.evaluation_judge.shows_reasoning, 0
    for policy in range(newest + 1):
        own = ResponseLengths()
        for rollout in read_responses(run_dir, policy, num_samples=config.evaluation.num_samples):
            responses.setdefault((rollout.prompt_id, rollout.sample), {})[str(policy)] = shown_text(
                rollout, reasoning=reasoning
            )
            unanswered += not split_thought(rollout.text, rollout.in_thought).is_answer
            own.add(rollout)
        lengths[str(policy)] = own.figures()
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
        if gold and split_thought(gold).is_answer:
            texts = texts | {GOLD: gold if reasoning else split_thought(gold).answer}
        if config.outer.scheme == "average":
            member = pool_member(prompt_id, seed=config.seed, sample=sample, size=newest)
            texts = texts | {AVERAGE: texts[str(member)]}
        players.append(_Players(by_id[prompt_id], sample, texts, reasoning))
    pools = {index: pool for index, group in enumerate(players) if (pool := group.pool())}

    async def judge_all() -> list[Judgement]:
        annotator = build_annotator(config.evaluation_judge, store_path=str(run_dir.annotations_path), seed=config.seed)
        async with closing(annotator, run_dir):
            with Meter(f"judge     {newest}", total=len(pools), unit="pools") as meter:
                judgements = await judge_pools(annotator, list(pools.values()), meter=meter)
                judgements = await judge_late(annotator, list(pools.values()), judgements)
            annotator.refuse_over_budget(sum(judgement.state == "over budget" for judgement in judgements))
            return judgements

    # A policy that judges itself is no judge of held-out responses, and is not asked for one where there are none.
    judgements = dict(zip(pools, asyncio.run(judge_all()), strict=True)) if pools else {}
    verdicts = [judgements.get(index) for index in range(len(players))]
    answered = [verdict for verdict in verdicts if verdict is not None]
    missing = [verdict for verdict in answered if verdict.state != "ok"]
    judge = "annotation" if config.evaluation.annotation is None else "evaluation.annotation"
    refuse_shortfall(
        str(stage.path),
        Counter(f"{verdict.state}: {verdict.detail}" for verdict in missing),
        total=len(players),
        missing="held-out pools have no verdict",
        remedy="Verdicts that were given are kept: run again and only these are asked anew, or raise "
        f"{judge}.max_failed to continue without them",
        max_failed=config.evaluation_judge.max_failed,
    )
    stage.sub("judgements").write_shard("0000000", answered)
    preferences: list[tuple[str, str, str, float]] = []
    for group, verdict in zip(players, verdicts, strict=True):
        if verdict is None or verdict.state == "ok":
            preferences += group.preferences(verdict)
    dropped = {
        "held-out pool without verdict": len(missing),
        "no usable response from the server": len(left_out),
        "held-out response without an answer": unanswered,
    }
    return _Judged(preferences, +Counter(dropped), lengths, _shown(players, newest=newest))


def _shown(players: Sequence[_Players], *, newest: int) -> dict[str, Any] | None:
    """One prompt with the first answer of every policy: the first whose answers differ, as report.answers shows it."""
    first = [group for group in players if group.sample == 0]
    found = next((group for group in first if group.texts["0"] != group.texts[str(newest)]), next(iter(first), None))
    if found is None:
        return None
    asked = [{"role": message.role, "content": _cut(message.content)} for message in found.prompt.messages]
    prefix = found.prompt.assistant_prefix
    answers = {str(policy): _cut(prefix + found.texts[str(policy)]) for policy in range(newest + 1)}
    return {"prompt_id": found.prompt.prompt_id, "messages": asked, "answers": answers}


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."


def _figures(judged: _Judged, *, newest: int) -> dict[str, Any]:
    """The manifest's details: win rates of the newest policy, the matrix over policies, lengths, the best."""
    lengths = judged.lengths
    if not judged.preferences:
        why = "no verdict on any held-out pool" if judged.dropped else "no held-out prompts"
        return {
            "policy": newest,
            "win_rates": {},
            "lengths": lengths,
            "best": newest,
            "why": f"the newest: {why}",
        }

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
        **({"shown": judged.shown} if judged.shown else {}),
        "best": best_policy(matrix),
        "why": "highest mean win rate over the other policies on held-out prompts",
    }
