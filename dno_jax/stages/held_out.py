"""Held-out responses before a judge: the players of a prompt, their pool, and what the verdicts say of each two."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dno_jax.annotation.build import build_annotator
from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.annotation.quality.calibration import read_calibration
from dno_jax.annotation.quality.figures import Quality, Response
from dno_jax.annotation.receipts import closing
from dno_jax.annotation.shortfall import refuse_shortfall
from dno_jax.config import AnnotationSection
from dno_jax.console import Meter
from dno_jax.data.pools import shown_prefix
from dno_jax.evaluation.comparisons import Row
from dno_jax.evaluation.judge_errors import JudgeErrors
from dno_jax.preferences import win_matrix
from dno_jax.records import Judgement, Prompt
from dno_jax.run_dir import RunDir
from dno_jax.stages.annotate import judge_late, judge_pools

GOLD = "gold"


@dataclass(frozen=True)
class Players:
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

    def preferences(self, verdict: Judgement | None) -> list[Row]:
        """Every comparison of two players; equal texts tie."""
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
            Row(
                self.prompt.prompt_id, one, other, preference(one, other), len(self.texts[one]) - len(self.texts[other])
            )
            for one, other in itertools.combinations(self.texts, 2)
        ]

    def responses(self) -> dict[str, Response]:
        """What the judge's figures ask about the pool's candidates, by id."""
        return {
            f"{names[0]}/{self.sample}": Response(
                len(self.texts[names[0]].split()),
                "gold" if names[0] == GOLD else "policy" if names[0].isdecimal() else "data",
            )
            for names in self._distinct()
        }


@dataclass
class Compared:
    """What came of a set of players: rows of preferences, the judge's figures, verdicts as they stand."""

    rows: list[Row] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    missing: int = 0
    quality: dict[str, Any] = field(default_factory=dict)
    judge: str = ""
    errors: JudgeErrors | None = None  # of the judge, by labelled pairs; None where there are none


@dataclass(frozen=True)
class Asked:
    """Who judges, and what messages say of it.

    Attributes:
        field: of the configuration that names the judge.
        place: where what is judged lies.
        title: of the progress bar.
    """

    section: AnnotationSection
    field: str
    place: str
    title: str
    seed: int


def compare(groups: Sequence[Players], asked: Asked, run_dir: RunDir) -> Compared:
    """Judge one pool per prompt and sample; verdicts that are in the run's store are not paid for again.

    Raises:
        DnoError: more pools than `max_failed` allows have no verdict; run again to ask for those.
    """
    pools = {index: pool for index, group in enumerate(groups) if (pool := group.pool())}
    identity, labelled = "", _labelled(asked) if pools else []
    verdicts: list[Judgement] = []  # on labelled pairs

    async def judge_all() -> list[Judgement]:
        nonlocal identity, verdicts
        annotator = build_annotator(asked.section, store_path=str(run_dir.annotations_path), seed=asked.seed)
        identity = annotator.identity
        async with closing(annotator, run_dir):
            with Meter(asked.title, total=len(pools), unit="pools") as meter:
                judgements = await judge_pools(annotator, list(pools.values()), meter=meter)
                judgements = await judge_late(annotator, list(pools.values()), judgements)
            verdicts = await judge_pools(annotator, [pool for pool, _ in labelled], meter=None)
            every = (*judgements, *verdicts)
            annotator.refuse_over_budget(sum(judgement.state == "over budget" for judgement in every))
            return judgements

    # A policy that judges itself is no judge of held-out responses, and is not asked for one where there are none.
    judgements = dict(zip(pools, asyncio.run(judge_all()), strict=True)) if pools else {}
    missing = [verdict for verdict in judgements.values() if verdict.state != "ok"]
    refuse_shortfall(
        asked.place,
        Counter(f"{verdict.state}: {verdict.detail}" for verdict in missing),
        total=len(groups),
        missing="held-out pools have no verdict",
        remedy="Verdicts that were given are kept: run again and only these are asked anew, or raise "
        f"{asked.field}.max_failed to continue without them",
        max_failed=asked.section.max_failed,
    )
    found = Compared(judgements=list(judgements.values()), missing=len(missing), judge=identity)
    quality = Quality()
    for verdict, (_, label) in zip(verdicts, labelled, strict=True):
        quality.add_label(verdict, label)
    if labelled:
        found.errors = _errors(labelled, verdicts)
    for index, group in enumerate(groups):
        verdict = judgements.get(index)
        if verdict is not None:
            quality.add(verdict, responses=group.responses())
        if verdict is None or verdict.state == "ok":
            found.rows += group.preferences(verdict)
    found.quality = quality.figures()
    return found


def _labelled(asked: Asked) -> list[tuple[Pool, float]]:
    """Pairs that people have judged, where the judge is held to some: the same in every iteration."""
    section = asked.section.quality
    if section.calibration is None:
        return []
    return read_calibration(section.calibration, limit=section.calibration_pairs, seed=asked.seed)


def _errors(labelled: Sequence[tuple[Pool, float]], verdicts: Sequence[Judgement]) -> JudgeErrors:
    return JudgeErrors.of(
        (
            pool.prompt.model_dump_json(exclude={"prompt_id"}),
            float(win_matrix(wins=row.wins, scores=row.scores)[0, 1]),
            label,
        )
        for (pool, label), row in zip(labelled, verdicts, strict=True)
        if row.state == "ok"
    )
