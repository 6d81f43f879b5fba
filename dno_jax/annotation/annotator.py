"""What an annotator is, the one that is embedded, and the factory of both."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dno_jax.annotation.oracles import majority_matrix
from dno_jax.config import AnnotationSection, OracleSection
from dno_jax.records import Judgement, Prompt


@dataclass(frozen=True)
class Candidate:
    """One response as the judge sees it.

    Attributes:
        candidate_id: the rollout's id.
        text: the rollout's text, unaltered.
    """

    candidate_id: str
    text: str


@dataclass(frozen=True)
class Pool:
    """The candidates of one prompt that are judged side by side: {y^1..y^K, y_gold}."""

    prompt: Prompt
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        if len(set(self.candidate_ids)) != len(self.candidates) or len(self.candidates) < 2:
            raise ValueError(f"prompt {self.prompt.prompt_id!r}: a pool takes two or more candidates, none twice")

    @property
    def candidate_ids(self) -> tuple[str, ...]:
        return tuple(candidate.candidate_id for candidate in self.candidates)


@runtime_checkable
class Annotator(Protocol):
    """Ranks pools. One annotator serves one event loop, and is closed in it."""

    @property
    def identity(self) -> str:
        """Everything that changes a verdict: kind, model, rubric and its version, parameters."""
        ...

    def recall(self, pool: Pool) -> Judgement | None:
        """Return the answer where it is already paid for, else None."""
        ...

    async def probe(self) -> None:
        """Fail early where no verdict could be had; call it once, if `recall` leaves anything to ask.

        Raises:
            DnoError: saying what is wrong with the endpoint, the key or the model.
        """
        ...

    async def judge(self, pool: Pool) -> Judgement:
        """Return the judgement of one pool; no answer is a state of it, never a number.

        Raises:
            DnoError: no pool can be judged (a dead endpoint, a refused key): the run had better stop.
        """
        ...

    async def close(self) -> None:
        """Give back connections and files."""
        ...


def prompt_text(prompt: Prompt) -> str:
    """Return what a text-only judge takes as the prompt: the last user message, or else all messages joined."""
    for message in reversed(prompt.messages):
        if message.role == "user":
            return message.content
    return "\n".join(message.content for message in prompt.messages)


def presentation_order(pool: Pool, *, seed: int) -> tuple[int, ...]:
    """Draw the order in which a judge sees a pool: a function of seed, prompt id and candidate ids alone.

    Returns:
        [C] indices into the pool; the first is presented first.
    """

    def address(index: int) -> str:
        name = json.dumps([seed, pool.prompt.prompt_id, pool.candidates[index].candidate_id])
        return hashlib.sha256(name.encode()).hexdigest()

    return tuple(sorted(range(len(pool.candidates)), key=address))


class OracleAnnotator:
    """The embedded majority of criteria: no endpoint, no store, the same verdict every time."""

    def __init__(self, section: OracleSection):
        """Check the criteria.

        Raises:
            DnoError: an unknown criterion.
        """
        majority_matrix("", (), criteria=section.criteria, target_words=section.target_words)
        self._section = section

    @property
    def identity(self) -> str:
        criteria = ",".join(self._section.criteria)
        return f"oracle majority criteria={criteria} target_words={self._section.target_words}"

    def recall(self, pool: Pool) -> Judgement | None:
        return self._judge(pool)

    async def probe(self) -> None:
        return None

    async def judge(self, pool: Pool) -> Judgement:
        return self._judge(pool)

    async def close(self) -> None:
        return None

    def _judge(self, pool: Pool) -> Judgement:
        wins = majority_matrix(
            prompt_text(pool.prompt),
            [candidate.text for candidate in pool.candidates],
            criteria=self._section.criteria,
            target_words=self._section.target_words,
        )
        return Judgement(
            prompt_id=pool.prompt.prompt_id,
            candidate_ids=pool.candidate_ids,
            judge=self.identity,
            state="ok",
            wins=wins,
        )


def build_annotator(config: AnnotationSection, *, store_path: str | os.PathLike[str], seed: int) -> Annotator:
    """Build the annotator a configuration asks for; whatever is wrong shows here, before sampling is paid for.

    Args:
        store_path: the sqlite file of verdicts; made if absent, not touched by the oracle.
        seed: decides the order in which a list-wise judge sees the candidates.

    Raises:
        DnoError: an unknown criterion, a missing key, an unreadable rubric, a store that cannot be opened, a bad URL.
    """
    if config.kind == "oracle":
        return OracleAnnotator(config.oracle)
    from dno_jax.annotation.client import OpenAIAnnotator  # a run with the oracle needs none of what it imports

    return OpenAIAnnotator(config.openai, store_path=store_path, seed=seed)
