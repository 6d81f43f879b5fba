"""What an annotator is, and what it is shown."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dno_jax.addresses import Purpose, order
from dno_jax.records import Judgement, Prompt


@dataclass(frozen=True)
class Candidate:
    """One response as the judge sees it.

    Attributes:
        candidate_id: the rollout's id.
        text: the rollout's text, unaltered, or its answer alone where thoughts are not shown.
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
    """Ranks pools. One annotator serves one event loop, and is closed in it.

    What is not abstract is inherited: it holds of annotators that ask nobody, wait for nothing and cost nothing.
    """

    @property
    @abstractmethod
    def identity(self) -> str:
        """Everything that changes a verdict: kind, model, rubric and its version, parameters."""

    @property
    def width(self) -> int:
        """How many pools it is worth to have judged side by side."""
        return 1

    @property
    def asks_by_batch(self) -> bool:
        """Whether `ask_ahead` has anything to do: there are batches to make, or to collect."""
        return False

    @property
    def may_repeat(self) -> bool:
        """Whether the same question may be answered otherwise the second time."""
        return False

    @abstractmethod
    def recall(self, pool: Pool, *, repeat: int = 0) -> Judgement | None:
        """Return the answer where it is already paid for, else None."""

    @abstractmethod
    async def judge(self, pool: Pool, *, repeat: int = 0) -> Judgement:
        """Return the judgement of one pool; a missing answer is a state of it, never a number.

        Args:
            repeat: 0, or which repetition of the same questions this is; what is embedded always answers the same.

        Raises:
            DnoError: no pool can be judged (a dead endpoint, a refused key): the run had better stop.
        """

    async def probe(self, *, patient: bool = True) -> None:
        """Fail early where no verdict could be had; call it once, if `recall` leaves anything to ask.

        Raises:
            DnoError: saying what is wrong with the endpoint, the key or the model.
        """

    async def ask_ahead(self, pools: Sequence[Pool], *, repeat: int = 0) -> None:
        """Have the Batch API answer what it may; what it leaves, `judge` asks live.

        Raises:
            DnoError: the endpoint has no Batch API, refuses it, or has not answered for long; or the store fails.
        """

    def refuse_over_budget(self, missing: int) -> None:
        """Stop a run that may spend no more.

        Args:
            missing: pools whose judgement is "over budget"; with 0 nothing happens.

        Raises:
            DnoError: there are some; it says what is spent and what to raise.
        """

    async def drain(self) -> None:
        """Ask nothing more, and wait until what is in flight has come back and is stored."""

    def receipt(self) -> dict[str, Any] | None:
        """Return what the run has paid, as receipts.json has it; None where nothing is paid for."""
        return None

    async def close(self) -> None:
        """Give back connections and files."""


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
