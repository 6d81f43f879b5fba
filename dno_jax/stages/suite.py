"""What is asked of a published suite, and what one has to say of its files, its judge and its arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dno_jax.annotation.question import PreferenceFunction
from dno_jax.config import AnnotationSection
from dno_jax.errors import DnoError
from dno_jax.records import Judgement, Message, Prompt


@dataclass(frozen=True)
class Wanted:
    """What is asked of a suite.

    Attributes:
        suite: its name.
        prompts: the suite's own file: alpaca_eval's rows of {instruction, output}, arena_hard's {question_id, turns}.
        reference: the reference's outputs, where they lie apart, in the suite's form.
        policy: None: the best on held-out prompts.
        template: the judge's own text, of alpaca_eval; None: the rubric of the configuration.
        tables: of alpaca_eval: folder of instruction_difficulty.csv and df_gamed.csv; None: length is controlled
            without them.
    """

    suite: str
    prompts: str
    reference: str | None = None
    policy: int | None = None
    template: str | None = None
    tables: str | None = None


@dataclass(frozen=True)
class Item:
    """A question of a suite.

    Attributes:
        dataset: the part of the suite that it is of.
        reference: what the reference answered; empty where that is not known.
        generator: who the reference is.
        name: the suite's own id of the question, if it has one.
    """

    instruction: str
    dataset: str
    reference: str
    generator: str
    name: str = ""

    @property
    def prompt(self) -> Prompt:
        name = hashlib.sha256(self.instruction.encode()).hexdigest()[:16]
        return Prompt(prompt_id=name, messages=(Message(role="user", content=self.instruction),))


@dataclass(frozen=True)
class Judged:
    """Answers to a suite's questions and what its judge said of them.

    Attributes:
        answers: in the order of the items.
        generator: who gave them.
        judgements: place of the item -> verdict on (reference, answer); not there where both are the same.
        judge: its identity.
    """

    items: Sequence[Item]
    answers: Sequence[str]
    generator: str
    judgements: Mapping[int, Judgement]
    judge: str


@runtime_checkable
class Suite(Protocol):
    """A suite: a module of its own.

    Attributes:
        OUTPUTS, ANNOTATIONS: names of its files of answers and of verdicts.
    """

    OUTPUTS: str
    ANNOTATIONS: str

    def read_items(self, wanted: Wanted) -> list[Item]:
        """Read its questions; raises DnoError where a row is none."""
        ...

    def write_outputs(self, items: Sequence[Item], answers: Sequence[str], generator: str) -> str:
        """The text of its file of answers."""
        ...

    def read_outputs(self, text: str) -> list[str]: ...

    def make_judge(self, section: AnnotationSection, wanted: Wanted, *, place: str, seed: int) -> PreferenceFunction:
        """Its judge; raises DnoError where the configured one cannot be it."""
        ...

    def settle(self, wanted: Wanted, judged: Judged) -> tuple[str, dict[str, Any]]:
        """The text of its file of verdicts, and its results; raises DnoError where there is no verdict."""
        ...


def text_of(row: Mapping[str, Any], place: str, name: str) -> str:
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise DnoError(f"{place}: expected a text in {name!r}; it has {', '.join(map(str, row)) or 'nothing'}")
    return row[name]
