"""What a judge is shown: the candidates of each prompt, shard by shard, none of them held longer than it is judged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from etils import epath

from dno_jax.annotation.annotator import Candidate, Pool
from dno_jax.errors import DnoError
from dno_jax.records import Prompt, Rollout, parse_lines


class PromptFile:
    """The prompts of an iteration, read from their file when they are asked for: there may be a million candidates.

    Args:
        path: JSONL of Prompt rows, complete.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # prompt id -> first byte, length
        place = 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    self._places[json.loads(line)["prompt_id"]] = place, len(line)
                place += len(line)

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


def by_prompt(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    """Rollouts of each prompt, in their order."""
    found: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.prompt_id, []).append(rollout)
    return found


def pools_of(rollouts: Sequence[Rollout], prompts: Mapping[str, Prompt], *, dropped: Counter[str]) -> list[Pool]:
    """Return one pool a prompt, each candidate with the prefix it continues; what is in none is counted by reason."""
    pools = []
    for prompt_id, own in by_prompt(rollouts).items():
        candidates = distinct_candidates(own, dropped=dropped)
        if len(candidates) >= 2:
            prefix = prompts[prompt_id].assistant_prefix
            shown = tuple(replace(candidate, text=prefix + candidate.text) for candidate in candidates)
            pools.append(Pool(prompt=prompts[prompt_id], candidates=shown))
        else:
            dropped["fewer than two distinct candidates"] += 1
    return pools


def distinct_candidates(rollouts: Sequence[Rollout], *, dropped: Counter[str]) -> tuple[Candidate, ...]:
    """Return the candidates a judge is shown: no empty text, none twice (the first stays, the teacher's before all)."""
    seen: set[str] = set()
    kept: list[Rollout] = []
    for rollout in sorted(rollouts, key=lambda row: row.sample):
        text = rollout.text.strip()
        if not text:
            dropped["empty response"] += 1
        elif text in seen:
            dropped["duplicate response"] += 1
        else:
            seen.add(text)
            kept.append(rollout)
    return tuple(Candidate(rollout.rollout_id, rollout.text) for rollout in kept)
