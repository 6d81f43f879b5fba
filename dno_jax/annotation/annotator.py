"""What an annotator is, what it is shown, and the factory of all that there are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dno_jax.addresses import Purpose, order
from dno_jax.config import AnnotationSection
from dno_jax.errors import DnoError
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

    @property
    def width(self) -> int:
        """How many pools it is worth to have judged side by side."""
        ...

    def recall(self, pool: Pool, *, repeat: int = 0) -> Judgement | None:
        """Return the answer where it is already paid for, else None."""
        ...

    async def probe(self) -> None:
        """Fail early where no verdict could be had; call it once, if `recall` leaves anything to ask.

        Raises:
            DnoError: saying what is wrong with the endpoint, the key or the model.
        """
        ...

    async def judge(self, pool: Pool, *, repeat: int = 0) -> Judgement:
        """Return the judgement of one pool; no answer is a state of it, never a number.

        Args:
            repeat: 0, or which repetition of the same questions this is; what is embedded always answers the same.

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


def presentation_order(
    pool: Pool, *, seed: int, draw: int = 0, purpose: Purpose = Purpose.PRESENTATION
) -> tuple[int, ...]:
    """Draw the order in which a judge sees a pool: a function of seed, draw, prompt id and candidate ids alone.

    Returns:
        [C] indices into the pool; the first is presented first.
    """
    return order(purpose, seed, draw, pool.prompt.prompt_id, names=pool.candidate_ids)


def build_annotator(config: AnnotationSection, *, store_path: str | os.PathLike[str], seed: int) -> Annotator:
    """Build the annotator a configuration asks for; whatever is wrong shows here, before sampling is paid for.

    Args:
        store_path: the run's own file of verdicts, in its directory; made if absent, touched only where verdicts are
            paid for. `annotation.store` stands before it.
        seed: decides the order in which a list-wise judge sees the candidates, and a table's draws.

    Raises:
        DnoError: an unknown criterion, a table that is none, a missing key, an unreadable rubric, a store that cannot
            be opened, a bad URL; a kind that is no annotator of the host's.
    """
    # All these modules stand on this one. What is embedded needs nothing of what the client imports.
    from dno_jax.annotation import embedded

    match config.kind:
        case "oracle":
            return embedded.OracleAnnotator(config.oracle)
        case "table" if config.table is not None:
            return embedded.TableAnnotator(config.table, seed=seed)
        case "gold":
            return embedded.GoldAnnotator()
        case "given":
            return embedded.GivenAnnotator()
        case "openai" | "ensemble":
            from dno_jax.annotation.client import open_client
            from dno_jax.annotation.endpoint_annotator import EndpointAnnotator
            from dno_jax.annotation.judges.functions import build_function

            function = build_function(config, seed=seed)
            return EndpointAnnotator(function, open_client(config, store_path=store_path))
        case kind:
            raise DnoError(f"annotation.kind={kind}: judged on the devices, not by an annotator of the host's")
