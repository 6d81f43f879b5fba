"""Judgements -> training pairs by the configuration's rule, with every drop counted by reason.

Pairs of earlier iterations are replayed; DNO-Lookahead trains on all of them and on nothing else.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from dno_jax.addresses import Purpose, rng
from dno_jax.config import LossSection, PairingSection, RunConfig, config_digest
from dno_jax.errors import DnoError
from dno_jax.preferences import (
    PairChoice,
    ScoredCandidate,
    all_pairs,
    best_worst_pair,
    count_cycles,
    large_margin_pairs,
    matched_pairs,
    pooled_pairs,
    repeated_ngram_share,
    replay_counts,
    scores_to_wins,
    soft_target,
    spin_pairs,
    verdict_pairs,
    win_rates,
)
from dno_jax.records import Judgement, Pair, PairKind, Rollout
from dno_jax.run_dir import Manifest, RunDir, is_lookahead

_NEW, _REPLAYED = "new", "replayed"


def run(config: RunConfig, iteration: int) -> Manifest:
    """Choose iteration t's pairs and mix in replayed ones.

    Raises:
        DnoError: not one pair is left; the message holds the funnel.
    """
    start = time.perf_counter()
    run_dir = RunDir(config.run_dir)
    stage = run_dir.stage("pair", iteration)
    lookahead = is_lookahead(config, iteration)
    sources = [run_dir.stage("pair", earlier) for earlier in range(iteration)]
    if not lookahead:
        sources.insert(0, run_dir.stage("annotate", iteration))
    inputs: dict[str, str] = {}
    for source in sources:
        source.require()
        inputs |= stage.reference_of(source.manifest_path)
    digest = config_digest(config)
    if manifest := stage.finished(inputs, config_digest=digest):
        return manifest

    made = _Made()
    if lookahead:
        replayed = pooled_pairs(source.read_shard(Pair, _NEW) for source in sources)
    else:
        sampled, judged = run_dir.stage("sample", iteration), run_dir.stage("annotate", iteration)
        for shard in sampled.shard_names():  # each has all candidates of its prompts, and so have the judgements
            rollouts, judgements = sampled.read_shard(Rollout, shard), judged.read_shard(Judgement, shard)
            made.add(new_pairs(judgements, rollouts, config, iteration=iteration))
        made.pairs.sort(key=lambda pair: pair.prompt_id)  # replay draws by place: not by how shards were cut
        if not made.pairs:
            funnel = "; ".join(f"{reason}: {count}" for reason, count in made.dropped.most_common())
            raise DnoError(
                f"{stage.path}: no pair passed the rules (dropped: {funnel or 'nothing was judged'}); "
                "lower pairing.positive_floor or the margins, or look at the judgements"
            )
        replayed = _replay(run_dir, config, iteration=iteration, num_new=len(made.pairs))
    stage.write_shard(_NEW, made.pairs)
    stage.write_shard(_REPLAYED, replayed)
    return stage.finish(
        config_digest=digest,
        inputs=inputs,
        rows=len(made.pairs) + len(replayed),
        dropped=made.dropped,
        seconds=time.perf_counter() - start,
        details={
            "new": len(made.pairs),
            "replayed": len(replayed),
            **_statistics(run_dir, made.pairs or replayed),
            **made.verdicts(),
        },
    )


@dataclass
class _Made:
    """What comes of the judged pools: pairs, drops by reason, and figures of the verdicts themselves."""

    pairs: list[Pair] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    errors: list[float] = field(default_factory=list)

    def add(self, other: _Made) -> None:
        self.pairs += other.pairs
        self.dropped.update(other.dropped)
        self.cycles += other.cycles
        self.errors += other.errors

    def verdicts(self) -> dict[str, float | int]:
        known = [error for error in self.errors if not math.isnan(error)]
        error = {"mean_win_rate_error": round(float(np.mean(known)), 4)} if known else {}
        return {"cyclic_triples": self.cycles, **error}


def new_pairs(
    judgements: Iterable[Judgement], rollouts: Iterable[Rollout], config: RunConfig, *, iteration: int
) -> _Made:
    """Return the pairs of judged pools in order of prompt, and what was dropped, by reason.

    Args:
        rollouts: all candidates of the prompts that there are any of.
    """
    by_prompt: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    made = _Made()
    answers = {judgement.prompt_id: judgement for judgement in judgements}
    for prompt_id, own in sorted(by_prompt.items()):
        judgement = answers.get(prompt_id)
        if judgement is None and (config.pairing.reward == "score" or not _says_something_and_nothing(own)):
            continue  # no judge was shown it, and there is no pair in it
        if judgement is not None and judgement.state != "ok":
            made.dropped[f"verdict {judgement.state}"] += 1
            continue
        pool = _Pool(own, judgement, config.pairing)
        made.cycles += count_cycles(pool.wins)
        if pool.is_alone:
            made.dropped["no opponents for a win rate"] += 1
            continue
        choices, reasons = _choose(pool, config, iteration=iteration)
        made.dropped.update(reasons)
        made.errors += pool.errors
        made.pairs += [_pair(choice, pool, config.loss, iteration=iteration) for choice in choices]
    return made


def _says_something_and_nothing(rollouts: Sequence[Rollout]) -> bool:
    """Whether there are both texts and empty responses: even one text alone, which no judge is shown, beats those."""
    return {bool(rollout.text.strip()) for rollout in rollouts} == {True, False}


def _choose(pool: _Pool, config: RunConfig, *, iteration: int) -> tuple[list[PairChoice], Counter[str]]:
    """Apply the configuration's rule to one pool. A tie is information to a soft label, and nothing to a hard one."""
    section, keep_ties = config.pairing, config.loss.target == "soft"
    match section.rule:
        case "large_margin" | "restrictive":
            return large_margin_pairs(
                pool.texts(),
                positive_floor=section.positive_floor,
                margin=section.margin,
                student_margin=section.student_margin,
                max_pairs=section.max_pairs_per_prompt,
                winner="gold" if section.rule == "restrictive" else "any",
            )
        case "spin":
            return spin_pairs(pool.texts())
        case "best_worst":
            return best_worst_pair(pool.texts(), margin=section.margin)
        case "all":
            return all_pairs(pool.texts(), keep_ties=keep_ties)
        case "verdict":
            rows = pool.trained_rows
            return verdict_pairs(pool.texts(), pool.wins[np.ix_(rows, rows)], keep_ties=keep_ties)
        case "matching":
            drawn = rng(Purpose.MATCHING, config.seed, iteration, pool.prompt_id)
            return matched_pairs(pool.own_samples(), rng=drawn)


def _pair(choice: PairChoice, pool: _Pool, loss: LossSection, *, iteration: int) -> Pair:
    winner, loser = choice.chosen, choice.rejected
    target = 1.0
    if loss.target == "soft" and choice.preference is not None:
        target = choice.preference
    elif loss.target == "soft":
        target = soft_target(winner.reward, loser.reward, temperature=loss.target_temperature)
    return Pair(
        pair_id=f"{winner.candidate_id}>{loser.candidate_id.rsplit('/', 1)[-1]}",
        prompt_id=pool.prompt_id,
        chosen_id=winner.candidate_id,
        rejected_id=loser.candidate_id,
        chosen_reward=round(winner.reward, 6),
        rejected_reward=round(loser.reward, 6),
        target=target,
        weight=choice.weight,
        kind=cast(PairKind, choice.kind),
        iteration=iteration,
    )


class _Pool:
    """One prompt's candidates with their rewards: each text was judged once, however many samples gave it.

    An empty response was shown to no judge: it loses to every text, as section 5.1 has it for degenerate samples. Were
    it in no pair, nothing would keep its probability down, for a pair's loss sees differences only.
    """

    def __init__(self, rollouts: Sequence[Rollout], judgement: Judgement | None, section: PairingSection):
        self.prompt_id, self.judge, self.section = rollouts[0].prompt_id, judgement and judgement.judge, section
        self.scores = judgement and judgement.scores
        if judgement is None:
            self.judged = [min((row for row in rollouts if row.text.strip()), key=lambda row: row.sample)]
            self.wins = np.full((1, 1), 0.5)
        else:
            by_id = {rollout.rollout_id: rollout for rollout in rollouts}
            self.judged = [by_id[name] for name in judgement.candidate_ids]
            if judgement.wins is not None:
                self.wins = np.asarray(judgement.wins, np.float64)
            else:
                self.wins = scores_to_wins(judgement.scores or (), temperature=section.score_temperature)
        empty = [rollout for rollout in rollouts if not rollout.text.strip() and not rollout.is_gold]
        if empty:
            self.judged.append(min(empty, key=lambda row: row.sample))
            self.wins = np.pad(self.wins, (0, 1), constant_values=0.0)
            self.wins[:-1, -1], self.wins[-1, -1] = 1.0, 0.5
            self.scores = self.scores and (*self.scores, min(0.0, *self.scores))
        self.place = {rollout.text.strip(): index for index, rollout in enumerate(self.judged)}
        self.samples = [rollout for rollout in rollouts if rollout.text.strip() in self.place]
        sources = {rollout.source for rollout in self.samples}
        self.whom = sources if section.opponents == "pool" else {section.opponents}
        # Beside samples of the policy, those of the mixture are only compared with (Nash-MD).
        self.trained = sources - {"mixture"} if "policy" in sources else sources
        self.errors: list[float] = []  # standard errors of the win rates that were asked for

    @property
    def is_alone(self) -> bool:
        """Whether win rates are asked for and an opponent would have nobody but itself to meet."""
        return self.section.reward == "win_rate" and int(self.count(self.whom).sum()) < 2

    @property
    def trained_rows(self) -> list[int]:
        """Places of the judged texts that may be trained on."""
        return [place for place, rollout in enumerate(self.judged) if rollout.source in self.trained]

    def count(self, sources: Iterable[str]) -> np.ndarray:
        """[C] how many candidates of these sources gave each judged text."""
        wanted = set(sources)
        places = [self.place[rollout.text.strip()] for rollout in self.samples if rollout.source in wanted]
        return np.bincount(np.asarray(places, int), minlength=len(self.judged))

    def reward(self, rollout: Rollout) -> float:
        """The reward of a candidate, in the unit of the configuration.

        Raises:
            DnoError: points are asked for and the judge gave pairwise verdicts.
        """
        place = self.place[rollout.text.strip()]
        if self.section.reward == "score":
            if self.scores is None:
                raise DnoError(
                    f"judgement of prompt {self.prompt_id!r} by {self.judge} has pairwise "
                    "verdicts, no scores; set pairing.reward=win_rate"
                )
            return self.scores[place]
        own = np.zeros(len(self.judged), int)
        own[place] = rollout.source in self.whom
        found = win_rates(self.wins, opponents=self.count(self.whom), own=own)
        self.errors.append(float(found.standard_error[place]))
        return float(found.rate[place])

    def texts(self) -> list[ScoredCandidate]:
        """One candidate a text."""
        counts = np.maximum(self.count(self.trained - {"gold"}), 1)
        return [self._candidate(self.judged[place], count=int(counts[place])) for place in self.trained_rows]

    def own_samples(self) -> list[ScoredCandidate]:
        """One candidate a sample of the policy, equal texts too."""
        return [
            self._candidate(sample) for sample in self.samples if sample.source in self.trained & {"policy", "mixture"}
        ]

    def _candidate(self, rollout: Rollout, *, count: int = 1) -> ScoredCandidate:
        repetition = repeated_ngram_share(rollout.token_ids, self.section.degenerate_ngram)
        return ScoredCandidate(
            candidate_id=rollout.rollout_id,
            reward=self.reward(rollout),
            source=rollout.source if rollout.source in ("gold", "data") else "student",
            degenerate=not rollout.is_gold and (not rollout.text.strip() or repetition > self.section.degenerate_share),
            count=count,
        )


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
        order = rng(Purpose.REPLAY, config.seed, iteration, age).permutation(len(pool))
        replayed += [pool[i] for i in sorted(order[:count])]
    return replayed


def _statistics(run_dir: RunDir, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Figures of the pairs for the manifest."""
    wanted = {name for pair in pairs for name in (pair.chosen_id, pair.rejected_id)}
    tokens: dict[str, int] = {}
    for iteration in sorted({pair.iteration for pair in pairs}):
        rows = run_dir.stage("sample", iteration).read(Rollout)
        tokens |= {row.rollout_id: len(row.token_ids) for row in rows if row.rollout_id in wanted}

    def mean(values: Iterable[float], digits: int) -> float:
        return round(float(np.mean(list(values))), digits)

    return {
        "kinds": dict(sorted(Counter(pair.kind for pair in pairs).items())),
        "prompts": len({pair.prompt_id for pair in pairs}),
        "mean_margin": mean((pair.chosen_reward - pair.rejected_reward for pair in pairs), 4),
        "mean_target": mean((pair.target for pair in pairs), 4),
        "mean_tokens_chosen": mean((tokens[pair.chosen_id] for pair in pairs), 2),
        "mean_tokens_rejected": mean((tokens[pair.rejected_id] for pair in pairs), 2),
    }
