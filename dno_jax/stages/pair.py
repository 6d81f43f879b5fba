"""Judgements -> training pairs by the configuration's rule, with every drop counted by reason.

A pair is written with all that is trained on, so that nothing later reads rollouts again. Pairs of earlier iterations
are replayed, copied with their rows; DNO-Lookahead trains on all of them and on nothing else.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
from etils import epath

from dno_jax.addresses import Purpose, rng
from dno_jax.config import LossSection, RunConfig
from dno_jax.data.pairs import NEW, REPLAYED, PairFile, Spool, pair_table, write_pairs
from dno_jax.data.pools import Pools, shown_text
from dno_jax.errors import DnoError
from dno_jax.preferences import (
    PairChoice,
    all_pairs,
    best_worst_pair,
    count_cycles,
    large_margin_pairs,
    matched_pairs,
    replay_counts,
    soft_target,
    spin_pairs,
    verdict_pairs,
)
from dno_jax.records import Judgement, Pair, PairKind, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import Manifest, StageDir, is_lookahead
from dno_jax.stages.cut import CutShares
from dno_jax.stages.pair_pool import PairPool


def run(config: RunConfig, run_dir: RunDir, iteration: int) -> Manifest:
    """Choose iteration t's pairs and mix in replayed ones.

    Raises:
        DnoError: not one pair is left; the message holds the funnel.
    """
    start = time.perf_counter()
    stage = run_dir.stage("pair", iteration)
    lookahead = is_lookahead(config, iteration)
    sources = [run_dir.stage("pair", earlier) for earlier in range(iteration)]
    if not lookahead:
        sources.insert(0, run_dir.stage("annotate", iteration))
    inputs: dict[str, str] = {}
    for source in sources:
        source.require()
        inputs |= stage.input_digest(source.manifest_path)
    if manifest := stage.finished(config, inputs):
        return manifest
    stage.start(config)

    figures, made = _Figures(), _Made()
    with Spool(stage.path) as spool:
        if not lookahead:
            made = _pair_shards(spool, run_dir, config, iteration=iteration)
            rule = config.pairing.cut or "negatives, gold is dropped"
            made.cut.tell(f"pair {iteration}", limit=config.sampling.max_new_tokens, then=f" (pairing.cut: {rule})")
            if not len(spool):
                funnel = "; ".join(f"{reason}: {count}" for reason, count in made.dropped.most_common())
                raise DnoError(
                    f"{stage.path}: no pair passed the rules (dropped: {funnel or 'nothing was judged'}); "
                    "lower pairing.positive_floor or the margins, or look at the judgements; where most responses are "
                    "cut, raise sampling.max_new_tokens, or set pairing.cut=keep"
                )
        # In order of prompt, for replay draws by place: not by how shards were cut.
        write_pairs(stage.path / f"{NEW}.parquet", figures.passing(spool.by_prompt()))
        num_new = len(spool)
    replayed = _all_of(sources) if lookahead else _replay(sources, config, iteration=iteration, num_new=num_new)
    others = _Figures()
    write_pairs(stage.path / f"{REPLAYED}.parquet", others.passing(replayed))
    return stage.finish(
        config,
        inputs=inputs,
        rows=figures.rows + others.rows,
        dropped=made.dropped,
        seconds=time.perf_counter() - start,
        details={
            "new": figures.rows,
            "replayed": others.rows,
            **(others if lookahead else figures).as_dict(),
            **made.verdicts(),
        },
    )


def _pair_shards(spool: Spool, run_dir: RunDir, config: RunConfig, *, iteration: int) -> _Made:
    """Choose the pairs of every shard and put their rows aside."""
    sampled, judged = run_dir.stage("sample", iteration), run_dir.stage("annotate", iteration)
    source = Pools(sampled, run_dir.prompts_path(iteration))
    whole = _Made()
    for shard in sampled.shard_names():  # each has all candidates of its prompts, and so have the judgements
        rollouts = {row.rollout_id: row for row in sampled.read_shard(Rollout, shard)}
        made = new_pairs(judged.read_shard(Judgement, shard), rollouts.values(), config, iteration=iteration)
        pairs, made.pairs = made.pairs, []
        if pairs:
            named = list(dict.fromkeys(pair.prompt_id for pair in pairs))
            spool.add(pair_table(pairs, rollouts, source.prompts.read(named)))
        whole.add(made)
    return whole


@dataclass
class _Made:
    """What comes of the judged pools: pairs, drops by reason, and figures of the verdicts themselves."""

    pairs: list[Pair] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    errors: list[float] = field(default_factory=list)
    cut: CutShares = field(default_factory=CutShares)

    def add(self, other: _Made) -> None:
        self.pairs += other.pairs
        self.dropped.update(other.dropped)
        self.cycles += other.cycles
        self.errors += other.errors
        self.cut.merge(other.cut)

    def verdicts(self) -> dict[str, Any]:
        known = [error for error in self.errors if not math.isnan(error)]
        error = {"mean_win_rate_error": round(float(np.mean(known)), 4)} if known else {}
        return {"cyclic_triples": self.cycles, **error, **self.cut.figures()}


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
    for own in by_prompt.values():
        made.cut.add(own)
    answers = {judgement.prompt_id: judgement for judgement in judgements}
    for prompt_id, own in sorted(by_prompt.items()):
        judgement = answers.get(prompt_id)
        shown = {row.rollout_id: shown_text(row, reasoning=config.annotation.shows_reasoning).strip() for row in own}
        # Even one answer alone, which no judge is shown, beats a response without any.
        beaten = set(map(bool, shown.values())) == {True, False}
        if judgement is None and (config.pairing.reward == "score" or not beaten):
            continue  # no judge was shown it, and there is no pair in it
        if judgement is not None and judgement.state != "ok":
            made.dropped[f"verdict {judgement.state}"] += 1
            continue
        second = config.is_second_half(iteration)
        pool = PairPool(own, shown, judgement, config.pairing, trains_previous=second)
        made.cycles += count_cycles(pool.wins)
        if pool.is_alone:
            made.dropped["no opponents for a win rate"] += 1
            continue
        if config.meets_previous(iteration) and not pool.meets_previous:
            made.dropped["no samples of the policy before"] += 1
            continue
        choices, reasons = _choose(pool, config, iteration=iteration)
        made.dropped.update(reasons)
        made.dropped.update(pool.left_out)
        whole = [choice for choice in choices if choice.chosen.candidate_id not in pool.negatives]
        if lost := len(choices) - len(whole):
            made.dropped["chosen was cut"] += lost
        choices = whole
        made.errors += pool.errors
        made.pairs += [_pair(choice, pool, config.loss, iteration=iteration - second) for choice in choices]
    return made


def _choose(pool: PairPool, config: RunConfig, *, iteration: int) -> tuple[list[PairChoice], Counter[str]]:
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


def _pair(choice: PairChoice, pool: PairPool, loss: LossSection, *, iteration: int) -> Pair:
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


def _replay(sources: Sequence[StageDir], config: RunConfig, *, iteration: int, num_new: int) -> Iterator[pa.Table]:
    """Draw pairs of earlier iterations within their caps, by the seed alone; the youngest first."""
    paths = [_new_pairs_of(source) for source in reversed(sources) if source.stage == "pair"]
    available: list[int] = []
    for path in paths:
        with PairFile(path) as file:
            available.append(len(file))
    counts = replay_counts(
        available, num_new=num_new, fraction=config.pairing.replay, decay=config.pairing.replay_decay
    )
    for age, (path, count) in enumerate(zip(paths, counts, strict=True), start=1):
        with PairFile(path) as file:
            order = rng(Purpose.REPLAY, config.seed, iteration, age).permutation(len(file))
            yield from file.take(np.sort(order[:count]))


def _all_of(sources: Sequence[StageDir]) -> Iterator[pa.Table]:
    """Every pair of every iteration, for DNO-Lookahead."""
    for source in sources:
        with PairFile(_new_pairs_of(source)) as file:
            yield from file.read()


def _new_pairs_of(source: StageDir) -> epath.Path:
    return source.table_path(NEW)


class _Figures:
    """Figures of pairs for the manifest, from their rows as they are written."""

    def __init__(self) -> None:
        self.rows = 0
        self._kinds: Counter[str] = Counter()
        self._prompts: set[str] = set()
        self._columns: dict[str, list[np.ndarray]] = defaultdict(list)

    def passing(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            self.rows += len(table)
            self._kinds.update(table["kind"].to_pylist())
            self._prompts.update(table["prompt_id"].to_pylist())
            reward, other = (table[f"{name}_reward"].to_numpy() for name in ("chosen", "rejected"))
            self._columns["mean_margin"].append(reward - other)
            self._columns["mean_target"].append(table["target"].to_numpy())
            for name in ("chosen", "rejected"):
                lengths = table[f"{name}_tokens"].combine_chunks().value_lengths()
                self._columns[f"mean_tokens_{name}"].append(lengths.to_numpy())
            yield table

    def as_dict(self) -> dict[str, Any]:
        means = {name: float(np.mean(np.concatenate(values))) for name, values in self._columns.items()}
        return {
            "kinds": dict(sorted(self._kinds.items())),
            "prompts": len(self._prompts),
            **{name: round(mean, 2 if "tokens" in name else 4) for name, mean in means.items()},
        }
