"""What a judge is shown: the candidates of each prompt, shard by shard, none of them held longer than it is judged."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from etils import epath

from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.annotation.quality.figures import Quality, Response
from dno_jax.errors import DnoError
from dno_jax.reasoning import split_thought, without_opening
from dno_jax.records import Judgement, Prompt, Rollout, parse_lines
from dno_jax.stage_dir import StageDir


class PromptFile:
    """The prompts of an iteration, read from their file when they are asked for: there may be a million candidates.

    Args:
        path: JSONL of Prompt rows, complete.
        digest: sha256 that it must have; None takes any.

    Raises:
        DnoError: it is missing, malformed, or another than was sampled from.
    """

    def __init__(self, path: epath.Path, *, digest: str | None = None):
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # prompt id -> first byte, length
        place, hashed = 0, hashlib.sha256()
        remedy = "restore it from a copy, or remove it and run again: the same prompts are written anew"
        try:
            with path.open("rb") as file:
                for line in file:
                    hashed.update(line)
                    if line.strip():
                        self._places[json.loads(line)["prompt_id"]] = place, len(line)
                    place += len(line)
        except FileNotFoundError:
            raise DnoError(f"{path}: missing; {remedy}") from None
        except (ValueError, KeyError, TypeError):
            raise DnoError(f"{path}: not a row of a prompt at byte {place}; {remedy}") from None
        if digest is not None and digest != hashed.hexdigest():
            raise DnoError(f"{path}: not the prompts that were sampled from (another sha256); {remedy}")

    def __len__(self) -> int:
        return len(self._places)

    def read(self, prompt_ids: Sequence[str]) -> dict[str, Prompt]:
        """Return prompts by id.

        Raises:
            DnoError: an id that the file has not.
        """
        found: dict[str, Prompt] = {}
        with self.path.open("rb") as file:
            for prompt_id in prompt_ids:
                if prompt_id not in self._places:
                    raise DnoError(
                        f"{self.path}: no prompt {prompt_id!r}, of which there are rollouts; restore the file"
                    )
                first, length = self._places[prompt_id]
                file.seek(first)
                line = file.read(length).decode()
                found[prompt_id] = next(parse_lines(Prompt, [line], place=f"{self.path} at byte {first}"))
        return found


class Pools:
    """The pools of an iteration, shard by shard of its rollouts.

    Args:
        sampled: the stage that writes the rollouts; it may still be at work.
        prompts_path: the iteration's prompts; there when the first shard is.
        reasoning: whether the thought before an answer is shown.
    """

    def __init__(self, sampled: StageDir, prompts_path: epath.Path, *, reasoning: bool = False):
        self.sampled = sampled
        self._reasoning = reasoning
        self._prompts_path = prompts_path

    @cached_property
    def prompts(self) -> PromptFile:
        manifest = self.sampled.manifest()
        noted = {} if manifest is None else manifest.inputs
        name = os.path.relpath(os.fspath(self._prompts_path), os.fspath(self.sampled.root))
        return PromptFile(self._prompts_path, digest=noted.get(name))

    def read(self, shard: str) -> PoolShard:
        """Parse one shard."""
        rollouts = self.sampled.read_shard(Rollout, shard)
        prompts = self.prompts.read(list(dict.fromkeys(rollout.prompt_id for rollout in rollouts)))
        dropped: Counter[str] = Counter()
        pools = pools_of(rollouts, prompts, dropped=dropped, reasoning=self._reasoning)
        shown = {row.rollout_id: shown_text(row, reasoning=self._reasoning) for row in rollouts}
        responses = {row.rollout_id: Response(len(shown[row.rollout_id].split()), row.source) for row in rollouts}
        return PoolShard(tuple(pools), responses, dropped)


@dataclass(frozen=True)
class PoolShard:
    """One shard of rollouts as a judge sees it.

    Attributes:
        responses: of every rollout, by id.
        dropped: reason -> rollouts that are in no pool, and prompts that have none.
    """

    pools: tuple[Pool, ...]
    responses: Mapping[str, Response]
    dropped: Counter[str]


@dataclass
class Survey:
    """What was judged, over all shards, in whichever call each was closed.

    Attributes:
        shards: those that are in it.
        states: judgements by state.
        reasons: state and detail -> judgements that are no answer.
        dropped: what went in and has no verdict, by reason.
        quality: figures of the judge's own answers.
    """

    shards: set[str] = field(default_factory=set)
    states: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    quality: Quality = field(default_factory=Quality)

    def add(self, name: str, shard: PoolShard, judgements: Sequence[Judgement]) -> None:
        """Add a closed shard."""
        self.count(name, judgements)
        self.dropped.update(shard.dropped)
        for judgement in judgements:
            self.quality.add(judgement, responses=shard.responses)

    def count(self, name: str, judgements: Sequence[Judgement]) -> None:
        """Add a closed shard's judgements by state alone."""
        self.shards.add(name)
        for judgement in judgements:
            self.states[judgement.state] += 1
            if judgement.state != "ok":
                self.reasons[f"{judgement.state}: {judgement.detail}"] += 1
                self.dropped[f"verdict {judgement.state}"] += 1


def by_prompt(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    """Rollouts of each prompt, in their order."""
    found: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.prompt_id, []).append(rollout)
    return found


def shown_text(rollout: Rollout, *, reasoning: bool) -> str:
    """Return what a judge reads of a response: its answer, or all of it; nothing where it has no answer.

    Args:
        reasoning: whether the thought before an answer is shown.
    """
    found = split_thought(rollout.text, rollout.in_thought)
    if not found.is_answer:
        return ""
    return rollout.text if reasoning else found.answer


def shown_prefix(prompt: Prompt, *, reasoning: bool) -> str:
    """Return the words that a judge reads before a response: without the tag of a thought that they open."""
    return prompt.assistant_prefix if reasoning else without_opening(prompt.assistant_prefix)


def pools_of(
    rollouts: Sequence[Rollout], prompts: Mapping[str, Prompt], *, dropped: Counter[str], reasoning: bool = False
) -> list[Pool]:
    """Return one pool per prompt, each candidate with the prefix it continues; what is in none is counted by reason."""
    pools = []
    for prompt_id, own in by_prompt(rollouts).items():
        candidates = distinct_candidates(own, dropped=dropped, reasoning=reasoning)
        if len(candidates) >= 2:
            prefix = shown_prefix(prompts[prompt_id], reasoning=reasoning)
            shown = tuple(replace(candidate, text=prefix + candidate.text) for candidate in candidates)
            pools.append(Pool(prompt=prompts[prompt_id], candidates=shown))
        else:
            dropped["fewer than two distinct candidates"] += 1
    return pools


def distinct_candidates(
    rollouts: Sequence[Rollout], *, dropped: Counter[str], reasoning: bool = False
) -> tuple[Candidate, ...]:
    """Return the candidates a judge is shown: no empty text, none twice (the first stays, the teacher's before all)."""
    seen: set[str] = set()
    kept: list[Candidate] = []
    for rollout in sorted(rollouts, key=lambda row: row.sample):
        shown = shown_text(rollout, reasoning=reasoning)
        text = shown.strip()
        if not text:
            cut = not split_thought(rollout.text, rollout.in_thought).whole
            dropped["response cut inside its thought" if cut and rollout.text.strip() else "empty response"] += 1
        elif text in seen:
            dropped["duplicate response"] += 1
        else:
            seen.add(text)
            kept.append(Candidate(rollout.rollout_id, shown))
    return tuple(kept)
