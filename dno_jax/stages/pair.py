"""Judgements -> training pairs by section 5.1's rules, with every drop counted by reason.

Pairs of earlier iterations are replayed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import cast

import numpy as np

from dno_jax.config import PairingSection, RunConfig, config_digest
from dno_jax.errors import DnoError
from dno_jax.preferences import (
    ScoredCandidate,
    expected_win_rates,
    large_margin_pairs,
    repeated_ngram_share,
    replay_counts,
    win_matrix,
)
from dno_jax.records import Judgement, Pair, PairKind, Rollout
from dno_jax.run_dir import Manifest, RunDir

_NEW, _REPLAYED = "new", "replayed"


def run(config: RunConfig, iteration: int) -> Manifest:
    """Choose iteration t's pairs and mix in replayed ones.

    Raises:
        DnoError: not one pair is left; the message holds the funnel.
    """
    start = time.perf_counter()
    run_dir = RunDir(config.run_dir)
    stage = run_dir.stage("pair", iteration)
    judged = run_dir.stage("annotate", iteration)
    judged.require()
    inputs = stage.reference_of(judged.manifest_path)
    for earlier in range(iteration):
        run_dir.stage("pair", earlier).require()
        inputs |= stage.reference_of(run_dir.stage("pair", earlier).manifest_path)
    digest = config_digest(config)
    if manifest := stage.finished(inputs, config_digest=digest):
        return manifest

    rollouts = {rollout.rollout_id: rollout for rollout in run_dir.stage("sample", iteration).read(Rollout)}
    new, dropped = new_pairs(judged.read(Judgement), rollouts, section=config.pairing, iteration=iteration)
    if not new:
        funnel = "; ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
        raise DnoError(
            f"{stage.path}: no pair passed the rules (dropped: {funnel or 'nothing was judged'}); "
            "lower pairing.positive_floor or the margins, or look at the judgements"
        )
    replayed = _replay(run_dir, config, iteration=iteration, num_new=len(new))
    stage.write_shard(_NEW, new)
    stage.write_shard(_REPLAYED, replayed)
    kinds = Counter(pair.kind for pair in new)
    return stage.finish(
        config_digest=digest,
        inputs=inputs,
        rows=len(new) + len(replayed),
        dropped=dropped,
        seconds=time.perf_counter() - start,
        details={
            "new": len(new),
            "replayed": len(replayed),
            "kinds": dict(sorted(kinds.items())),
            "prompts": len({pair.prompt_id for pair in new}),
            "mean_margin": round(float(np.mean([pair.chosen_reward - pair.rejected_reward for pair in new])), 4),
            "mean_tokens_chosen": _mean_tokens(rollouts, [pair.chosen_id for pair in new]),
            "mean_tokens_rejected": _mean_tokens(rollouts, [pair.rejected_id for pair in new]),
        },
    )


def new_pairs(
    judgements: Iterable[Judgement], rollouts: dict[str, Rollout], *, section: PairingSection, iteration: int
) -> tuple[list[Pair], Counter[str]]:
    """Return the pairs of all judged pools in order of prompt, and what was dropped, by reason."""
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for judgement in sorted(judgements, key=lambda row: row.prompt_id):
        if judgement.state != "ok":
            dropped[f"verdict {judgement.state}"] += 1
            continue
        rewards = pool_rewards(judgement, section)
        candidates = []
        for candidate_id, reward in zip(judgement.candidate_ids, rewards, strict=True):
            rollout = rollouts[candidate_id]
            repetition = repeated_ngram_share(rollout.token_ids, section.degenerate_ngram)
            candidates.append(
                ScoredCandidate(
                    candidate_id=candidate_id,
                    reward=reward,
                    is_gold=rollout.is_gold,
                    degenerate=not rollout.is_gold and repetition > section.degenerate_share,
                )
            )
        chosen, reasons = large_margin_pairs(
            candidates,
            positive_floor=section.positive_floor,
            margin=section.margin,
            student_margin=section.student_margin,
            max_pairs=section.max_pairs_per_prompt,
        )
        dropped.update(reasons)
        for choice in chosen:
            winner, loser = choice.chosen.candidate_id, choice.rejected.candidate_id
            pairs.append(
                Pair(
                    pair_id=f"{winner}>{loser.rsplit('/', 1)[-1]}",
                    prompt_id=judgement.prompt_id,
                    chosen_id=winner,
                    rejected_id=loser,
                    chosen_reward=round(choice.chosen.reward, 6),
                    rejected_reward=round(choice.rejected.reward, 6),
                    target=1.0,
                    kind=cast(PairKind, choice.kind),
                    iteration=iteration,
                )
            )
    return pairs, dropped


def pool_rewards(judgement: Judgement, section: PairingSection) -> list[float]:
    """Return each candidate's reward in the unit of the configuration.

    Raises:
        DnoError: points are asked for and the judge gave pairwise verdicts.
    """
    if section.reward == "score":
        if judgement.scores is None:
            raise DnoError(
                f"judgement of prompt {judgement.prompt_id!r} by {judgement.judge} has pairwise verdicts, no scores; "
                "set pairing.reward=win_rate"
            )
        return list(judgement.scores)
    return expected_win_rates(win_matrix(wins=judgement.wins, scores=judgement.scores)).tolist()


def _replay(run_dir: RunDir, config: RunConfig, *, iteration: int, num_new: int) -> list[Pair]:
    """Draw pairs of earlier iterations within their caps, by the seed alone."""
    pools = [run_dir.stage("pair", earlier).read_shard(Pair, _NEW) for earlier in range(iteration - 1, -1, -1)]
    counts = replay_counts(
        [len(pool) for pool in pools],
        num_new=num_new,
        fraction=config.pairing.replay,
        decay=config.pairing.replay_decay,
    )
    replayed: list[Pair] = []
    for age, (pool, count) in enumerate(zip(pools, counts, strict=True), start=1):
        seed = np.random.SeedSequence([config.seed, iteration, age])
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(pool))
        replayed += [pool[i] for i in sorted(order[:count])]
    return replayed


def _mean_tokens(rollouts: dict[str, Rollout], ids: list[str]) -> float:
    return round(float(np.mean([len(rollouts[i].token_ids) for i in ids])), 2)
