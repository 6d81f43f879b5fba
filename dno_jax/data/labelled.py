"""Pairs of responses that somebody has compared: of files in any form of docs/data.md, or of a run's own judge."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dno_jax.data.pools import Pools, pools_of, shown_text
from dno_jax.data.reading import Reading, prompt_of
from dno_jax.data.sources import named, read_rows
from dno_jax.errors import DnoError
from dno_jax.preferences import scores_to_wins
from dno_jax.records import Judgement, Message, Prompt, Rollout
from dno_jax.run_dir import RunDir


@dataclass(frozen=True)
class LabelledPair:
    """Two responses to a prompt, each with the words that the assistant had begun with.

    Attributes:
        target: P(first preferred), in [1/2, 1]: the first is the one that is preferred, if one is.
        weight: how many pairs of samples it stands for.
        place: where it comes from, for messages.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    texts: tuple[str, str]
    target: float
    weight: float
    place: str


@dataclass(frozen=True)
class Labelled:
    """What was read, and what it was taken for, in a line."""

    pairs: tuple[LabelledPair, ...]
    line: str


def read_labelled(paths: str | Sequence[str], *, temperature: float = 0.0) -> Labelled:
    """Read the pairs of files: every two responses of a row that have points.

    Args:
        temperature: what points mean, as `preferences.scores_to_wins` takes it.

    Raises:
        DnoError: a malformed row, or no two responses with points anywhere.
    """
    reading = Reading(paths)
    pairs: list[LabelledPair] = []
    for found, place in reading.understood(read_rows(paths), what="preference"):
        prompt = prompt_of(found, reading, place=place)
        if prompt is None:
            continue
        scored = [(given.text, given.score) for given in prompt.candidates if given.score is not None]
        if len(scored) < 2:
            reading.left_out["fewer than two responses with points"] += 1
            continue
        texts = [prompt.assistant_prefix + text for text, _ in scored]
        wins = scores_to_wins([points for _, points in scored], temperature=temperature)
        pairs += _every_pair(prompt, texts, wins, counts=[1] * len(texts), place=place)
    line = reading.line(f"{len(pairs):,} pairs of {len({pair.prompt_id for pair in pairs}):,} prompts")
    if not pairs:
        raise DnoError(
            f"{named(paths)}: holds no pairs: {line}. Expected rows with chosen and rejected, completions with points, "
            "or candidates with points (docs/data.md)"
        )
    return Labelled(tuple(pairs), line)


def read_verdicts(run_dir: RunDir, iterations: Sequence[int] = (), *, temperature: float = 0.0) -> Labelled:
    """Read what a run's judge has said of its candidates: P of every two of a pool.

    A pair of texts that were sampled several times stands for as many pairs of samples.

    Args:
        iterations: empty: all that are judged.
        temperature: what points mean, where the judge gives points.

    Raises:
        DnoError: there is no run, an iteration is not judged, or nothing has a verdict.
    """
    reasoning = run_dir.load_config().annotation.shows_reasoning
    judged = [t for t in run_dir.begun() if run_dir.stage("annotate", t).manifest() is not None]
    if missing := sorted({*iterations} - {*judged}):
        raise DnoError(
            f"pairs.run {run_dir.path}: iteration {missing[0]} is not judged (judged are "
            f"{', '.join(map(str, judged)) or 'none'}); `dno status` shows how the run stands"
        )
    pairs: list[LabelledPair] = []
    left_out: Counter[str] = Counter()
    for iteration in iterations or judged:
        stage, sampled = run_dir.stage("annotate", iteration), run_dir.stage("sample", iteration)
        prompts = Pools(sampled, run_dir.prompts_path(iteration)).prompts
        for name in sampled.shard_names():
            rows = sampled.read_shard(Rollout, name)
            verdicts = {one.prompt_id: one for one in stage.read_shard(Judgement, name)}
            shown = {row.rollout_id: (row.prompt_id, shown_text(row, reasoning=reasoning).strip()) for row in rows}
            times = Counter(shown.values())
            asked = prompts.read(list(dict.fromkeys(row.prompt_id for row in rows)))
            for pool in pools_of(rows, asked, dropped=left_out, reasoning=reasoning):
                verdict = verdicts.get(pool.prompt.prompt_id)
                if verdict is None or verdict.state != "ok" or verdict.candidate_ids != pool.candidate_ids:
                    left_out["pool without a verdict"] += 1
                    continue
                wins = np.asarray(verdict.wins or scores_to_wins(verdict.scores or (), temperature=temperature))
                counts = [times[shown[name]] for name in pool.candidate_ids]
                texts = [candidate.text for candidate in pool.candidates]
                pairs += _every_pair(pool.prompt, texts, wins, counts=counts, place=f"{sampled.path}/{name}")
    line = f"{run_dir.path}: {len(pairs):,} pairs of {len({pair.prompt_id for pair in pairs}):,} prompts, iterations "
    line += ", ".join(map(str, iterations or judged))
    if left_out:
        line += "; left out: " + ", ".join(f"{count:,} x {why}" for why, count in left_out.most_common())
    if not pairs:
        raise DnoError(f"pairs.run {line}: nothing to train on")
    return Labelled(tuple(pairs), line)


def _every_pair(
    prompt: Prompt, texts: Sequence[str], wins: Float[np.ndarray, "C C"], *, counts: Sequence[int], place: str
) -> Iterator[LabelledPair]:
    for i, j in itertools.combinations(range(len(texts)), 2):
        first, second = (i, j) if wins[i, j] >= 0.5 else (j, i)
        yield LabelledPair(
            prompt.prompt_id,
            prompt.messages,
            (texts[first], texts[second]),
            target=float(wins[first, second]),
            weight=float(counts[i] * counts[j]),
            place=place,
        )
