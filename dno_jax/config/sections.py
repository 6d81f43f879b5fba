"""The sections that have no file of their own: model, prompts, pairing, evaluation, report."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dno_jax.config.annotation import AnnotationSection
from dno_jax.config.base import (
    COSTS,
    PAIRED,
    ROUNDS,
    SAMPLED,
    Count,
    DataPaths,
    DateStr,
    Fraction,
    ModelPath,
    PathStr,
    Section,
    contents,
    decides,
)


class ModelConfigSection(Section):
    """Which checkpoint, and how it is computed."""

    path: ModelPath = Field(
        description="directory of a Hugging Face checkpoint, or an id on the Hub: owner/name or owner/name@revision",
        json_schema_extra=contents("sample", "evaluate", "sft", "reward"),
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="compute dtype; parameters stay float32",
        json_schema_extra=decides("sample", "score", "train", "evaluate", "sft", "reward"),
    )
    remat: Literal["none", "full", "dots"] = Field(
        default="full",
        description="what the backward pass recomputes: nothing, every layer, or all but matrix products",
        json_schema_extra=ROUNDS,
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = Field(
        default="auto",
        description="how whole sequences attend: cuDNN's kernel on GPUs, Pallas' splash attention on TPUs, plain XLA; "
        "auto takes the platform's kernel where it fits the model and the dtype, else xla",
        json_schema_extra=ROUNDS,
    )
    chat_template: str = Field(
        default="tokenizer",
        description="'tokenizer' (its own), 'raw' (no template: a base model), or the path of a Jinja file",
        json_schema_extra=contents("sample", "evaluate", "sft", "reward"),
    )
    template_date: DateStr = Field(
        default="2024-07-26",
        description="the date given to templates that write today's, the same in every iteration and after a restart",
        json_schema_extra=decides("sample", "evaluate", "sft", "reward"),
    )
    template_options: dict[str, bool | int | float | str] = Field(
        default={},
        description="further variables of the chat template, such as {enable_thinking: false}",
        json_schema_extra=decides("sample", "evaluate", "sft", "reward"),
    )


class PromptsSection(Section):
    path: DataPaths = Field(
        description="prompts in any form of docs/data.md: a file, a pattern, a dataset's id, or a list of them",
        json_schema_extra=contents("teach", "sample", "evaluate"),
    )
    held_out: int = Field(
        default=0,
        ge=0,
        description="prompts set aside for evaluation, drawn by seed, when no file is given",
        json_schema_extra=decides("teach", "sample", "evaluate"),
    )
    held_out_path: DataPaths | None = Field(
        default=None,
        description="prompts for evaluation, none of which is trained on",
        json_schema_extra=contents("teach", "evaluate"),
    )
    split: Literal["disjoint", "shared"] = Field(
        default="disjoint",
        description="each iteration gets its own part of the prompts (section 5.1), or all of them",
        json_schema_extra=decides("teach", "sample"),
    )
    max_length: Count = Field(
        default=512,
        description="tokens of the longest prompt, template included",
        json_schema_extra=decides("sample", "score", "train", "evaluate"),
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        default="error",
        description="what happens to a longer prompt; drops are counted. truncate: the oldest turns go, then the "
        "beginning of the last question; system messages and what the template writes stay",
        json_schema_extra=SAMPLED,
    )


class PairingSection(Section):
    """Which pairs of a judged pool are trained on. Floors and margins (section 5.1) are in the unit of `reward`."""

    rule: Literal["large_margin", "restrictive", "spin", "best_worst", "all", "verdict", "matching"] = Field(
        default="large_margin",
        description="section 5.1's pairs; only those that the teacher wins (DNO-Restrictive); the teacher over every "
        "sample (SPIN); best over worst; every pair by reward (Eq. 8), or by its own verdict (iterative DPO, INPO); "
        "every sample of the policy once (losses per response)",
        json_schema_extra=PAIRED,
    )
    reward: Literal["score", "win_rate"] = Field(
        default="score",
        description="points of the judge, or mean win rate against `opponents`",
        json_schema_extra=PAIRED,
    )
    opponents: Literal["pool", "policy", "mixture"] = Field(
        default="pool",
        description="the opponents of a win rate: the whole pool, the teacher too (the paper's estimator, biased); the "
        "policy's samples (unbiased for P(y > pi_t)); the mixture's samples (P(y > pi_t^tau))",
        json_schema_extra=PAIRED,
    )
    transform: Literal["identity", "sign", "logit"] = Field(
        default="identity",
        description="of a preference P before win rates are means of it: P; sign: 1, 1/2 or 0, whoever is preferred; "
        "logit: 1/2 + log P/(1 - P), in nats, of P within [.01, .99]",
        json_schema_extra=PAIRED,
    )
    score_temperature: float = Field(
        default=0.0,
        ge=0.0,
        description="points become sigma(difference / temperature); 0: the higher one wins",
        json_schema_extra=PAIRED,
    )
    positive_floor: float = Field(
        default=5.0, description="minimum reward of a chosen response", json_schema_extra=PAIRED
    )
    margin: float = Field(default=2.0, ge=0.0, description="minimum reward gap", json_schema_extra=PAIRED)
    student_margin: float = Field(
        default=1.0,
        ge=0.0,
        description="minimum reward gap where the chosen response is the student's",
        json_schema_extra=PAIRED,
    )
    max_pairs_per_prompt: Count | None = Field(
        default=None, description="keep only the pairs with the widest gaps; None keeps all", json_schema_extra=PAIRED
    )
    degenerate_ngram: Count = Field(
        default=4, description="n of the repetition test's n-grams", json_schema_extra=PAIRED
    )
    degenerate_share: Fraction = Field(
        default=0.5,
        description="a response whose share of repeated n-grams exceeds this is a negative, whatever its reward",
        json_schema_extra=PAIRED,
    )
    cut: Literal["keep", "negative", "drop"] | None = Field(
        default=None,
        description="responses cut at the limit of tokens: like any other; negatives, whatever their reward; in no "
        "pair. None: negative for the policy's, drop for gold and the data's",
        json_schema_extra=PAIRED,
    )
    replay: Fraction = Field(
        default=0.3,
        description="largest share of the pairs that may come from the previous iteration",
        json_schema_extra=PAIRED,
    )
    replay_decay: Fraction = Field(
        default=0.5,
        description="factor on that share for each iteration further back (0.3, 0.15, ...)",
        json_schema_extra=PAIRED,
    )

    @model_validator(mode="after")
    def _units(self) -> PairingSection:
        read = {
            "large_margin": ("positive_floor", "margin", "student_margin"),
            "restrictive": ("positive_floor", "margin", "student_margin"),
            "best_worst": ("margin",),
        }
        if self.transform != "identity" and (self.reward == "score" or self.rule in ("verdict", "spin")):
            raise ValueError(
                f"transform is {self.transform}, and no win rate is taken with reward={self.reward} and "
                f"rule={self.rule}; set reward=win_rate and a rule that compares rewards, such as all, or leave it out"
            )
        if self.reward == "win_rate" and self.transform != "logit":
            for name in read.get(self.rule, ()):
                if not 0.0 <= getattr(self, name) <= 1.0:
                    raise ValueError(f"{name} is {getattr(self, name)}, no win rate; with reward=win_rate give 0 to 1")
        total = sum(self.replay * self.replay_decay**age for age in range(64)) if self.replay_decay < 1 else self.replay
        if self.replay and total >= 1.0:
            raise ValueError(f"replay {self.replay} with decay {self.replay_decay} leaves no room for new pairs")
        return self


class GuardSection(Section):
    """Questions with checkable answers, asked of every policy: a policy may please its judge and forget its sums."""

    path: PathStr = Field(
        description="JSONL of {question, answer}, GSM8K's rows too; see docs/evaluation.md",
        json_schema_extra=contents("evaluate"),
    )
    num_samples: Count = Field(
        default=1, description="answers per question and policy, sampled as the run samples", json_schema_extra=COSTS
    )


class EvaluationSection(Section):
    num_samples: Count = Field(
        default=1, description="responses per held-out prompt and policy", json_schema_extra=decides("evaluate")
    )
    annotation: AnnotationSection | None = Field(
        default=None, description="the judge; None: the run's own", json_schema_extra=decides("evaluate")
    )
    external: dict[str, PathStr] = Field(
        default={},
        description="responses from elsewhere that policies are compared with, by name: files of {prompt_id, response} "
        "or {instruction, output}",
        json_schema_extra=contents("evaluate"),
    )
    min_prompts: Count | None = Field(
        default=50, description="held-out prompts below which the run warns; None never does", json_schema_extra=COSTS
    )
    max_design_effect: float | None = Field(
        default=2.0,
        gt=0.0,
        description="comparisons that are worth one, as verdicts on one prompt agree, above which the run warns",
        json_schema_extra=COSTS,
    )
    guard: GuardSection | None = Field(default=None, description="questions with answers; None: none")

    @field_validator("external")
    @classmethod
    def _names_are_no_players(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if not re.fullmatch(r"[A-Za-z][\w.-]*", name) or name in ("gold", "average"):
                raise ValueError(f"{name!r} is no name of responses: letters, digits and _.-, not gold or average")
        return files


class ReportSection(Section):
    tensorboard: bool = Field(
        default=True, description="write event files into the run directory", json_schema_extra=COSTS
    )
    wandb: str | None = Field(
        default=None,
        min_length=1,
        description="a project of Weights & Biases that curves are sent to (extra `wandb`); None: none",
        json_schema_extra=COSTS,
    )
