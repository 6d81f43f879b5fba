"""Judges that are no chat endpoints, and what is measured of whichever judges."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dno_jax.config.base import (
    COSTS,
    JUDGED,
    ROUNDS,
    Count,
    Fraction,
    ModelPath,
    PathStr,
    Section,
    Temperature,
    absolute,
    contents,
    decides,
)


def _rubric(name: str) -> str:
    return absolute(name) if name.endswith((".yaml", ".yml")) else name


Rubric = Annotated[str, AfterValidator(_rubric)]


class RewardModelSection(Section):
    """A sequence-classification checkpoint with one output, scored on the devices."""

    path: ModelPath = Field(
        description="directory of a Hugging Face checkpoint, or an id on the Hub",
        json_schema_extra=contents("annotate", "evaluate"),
    )
    temperature: float = Field(
        default=1.0,
        gt=0.0,
        description="P(y > y') is sigma of the rewards' difference over this (Bradley-Terry)",
        json_schema_extra=JUDGED,
    )
    max_length: Count = Field(
        default=2048, description="tokens of the longest conversation with its response", json_schema_extra=JUDGED
    )
    batch_size: Count = Field(default=16, description="rows of one forward pass", json_schema_extra=ROUNDS)


class QualitySection(Section):
    """What is measured of a judge, and the limits beyond which the run warns (None never does)."""

    repeat: Fraction = Field(
        default=0.0, description="share of pools that are judged a second time, in full", json_schema_extra=COSTS
    )
    calibration: PathStr | None = Field(
        default=None,
        description="JSONL of {prompt, first, second, preference}: people's P(first beats second)",
        json_schema_extra=contents("evaluate"),
    )
    calibration_pairs: Count = Field(
        default=300,
        description="labelled pairs used, drawn by seed, the same in each iteration",
        json_schema_extra=decides("evaluate"),
    )
    max_flip_rate: Fraction | None = Field(
        default=0.25, description="of pairs asked in both orders", json_schema_extra=COSTS
    )
    max_tie_rate: Fraction | None = Field(default=0.5, description="of verdicts", json_schema_extra=COSTS)
    max_first_rate_error: Fraction | None = Field(
        default=0.05, description="of P(first shown wins) from 1/2", json_schema_extra=COSTS
    )
    max_longer_wins: Fraction | None = Field(
        default=0.75, description="P(the longer response wins)", json_schema_extra=COSTS
    )
    min_repeat_agreement: Fraction | None = Field(
        default=0.8, description="with itself, asked again", json_schema_extra=COSTS
    )
    min_calibration_agreement: Fraction | None = Field(
        default=0.6, description="with people's labels", json_schema_extra=COSTS
    )
    max_cyclic_share: Fraction | None = Field(
        default=0.2, description="of triples of candidates", json_schema_extra=COSTS
    )
    max_loudest_judge: Fraction | None = Field(
        default=0.75, description="share of contradictions in which one judge decides", json_schema_extra=COSTS
    )


class PythonSection(Section):
    """A function of yours, called in the process that annotates: (messages, responses) -> points, or win rates."""

    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="module:name; the module is found as Python finds it, the working directory first",
        json_schema_extra=JUDGED,
    )
    returns: Literal["points", "wins"] = Field(
        default="points",
        description="points: a number per response. wins: a matrix of P(row beats column)",
        json_schema_extra=JUDGED,
    )
    max_concurrency: Count = Field(
        default=1, description="calls at a time, each in a thread of its own", json_schema_extra=COSTS
    )


class OracleSection(Section):
    """The embedded preference: a majority over criteria, hence general (cycles exist) and deterministic."""

    criteria: tuple[str, ...] = Field(
        default=("relevance", "variety", "brevity"),
        description="an odd number of: relevance, variety, brevity, and others of annotation/oracles.py",
        json_schema_extra=JUDGED,
    )
    target_words: Count = Field(
        default=30, description="the length that 'brevity' likes best, in words", json_schema_extra=JUDGED
    )

    @model_validator(mode="after")
    def _odd(self) -> OracleSection:
        if len(self.criteria) < 3 or len(self.criteria) % 2 == 0 or len(set(self.criteria)) != len(self.criteria):
            raise ValueError(f"criteria {self.criteria}: expected an odd number, at least three, none twice")
        return self


class TableSection(Section):
    """A preference over a few answers, known exactly: for games that a language model plays."""

    answers: tuple[str, ...] = Field(
        min_length=2, description="a response counts as the answer it begins with", json_schema_extra=JUDGED
    )
    preferences: tuple[tuple[float, ...], ...] = Field(
        description="P(row beats column) in [0, 1], as many rows and columns as answers; P + P^T = 1",
        json_schema_extra=JUDGED,
    )
    draws: bool = Field(
        default=True,
        description="each verdict is one draw, as a judge's is; false states the probability",
        json_schema_extra=JUDGED,
    )


class SelfSection(Section):
    """The policy judges its own responses (Self-Rewarding, arXiv 2401.10020: points averaged over 3 readings)."""

    rubric: Rubric = Field(
        default="additive_5point",
        description="built in, or a YAML file",
        json_schema_extra=contents("annotate", "evaluate"),
    )
    num_judgements: Count = Field(
        default=3, description="readings of a response, whose points are averaged", json_schema_extra=JUDGED
    )
    max_prompt_length: Count = Field(
        default=2048, description="tokens of the longest judge prompt, template included", json_schema_extra=JUDGED
    )
    max_new_tokens: Count = Field(default=256, description="tokens of the longest reading", json_schema_extra=JUDGED)
    temperature: Temperature = Field(default=0.7, description="of its readings", json_schema_extra=JUDGED)
    top_p: float = Field(default=0.9, gt=0.0, le=1.0, description="of its readings", json_schema_extra=JUDGED)
