"""The sections of a run but for the sampler (sampling.py) and the judges (annotation.py); names follow Hugging Face."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dno_jax.config.annotation import AnnotationSection
from dno_jax.config.base import (
    COSTS,
    PAIRED,
    ROUNDS,
    SAMPLED,
    TRAINED,
    Count,
    DateStr,
    Fraction,
    ModelPath,
    PathStr,
    Section,
    contents,
    decides,
)
from dno_jax.losses.registry import Loss, find_loss, soft_losses


class ModelConfigSection(Section):
    """Which checkpoint, and how it is computed."""

    path: ModelPath = Field(
        description="directory of a Hugging Face checkpoint, or an id on the Hub: owner/name or owner/name@revision",
        json_schema_extra=contents("sample", "evaluate", "sft"),
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="compute dtype; parameters stay float32",
        json_schema_extra=decides("sample", "score", "train", "evaluate", "sft"),
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
        json_schema_extra=contents("sample", "evaluate", "sft"),
    )
    template_date: DateStr = Field(
        default="2024-07-26",
        description="the date given to templates that write today's, the same in every iteration and after a restart",
        json_schema_extra=decides("sample", "evaluate", "sft"),
    )
    template_options: dict[str, bool | int | float | str] = Field(
        default={},
        description="further variables of the chat template, such as {enable_thinking: false}",
        json_schema_extra=decides("sample", "evaluate", "sft"),
    )


class MeshSection(Section):
    """Devices by mesh axis; one axis may be -1 and takes the rest.

    data and fsdp split rows; fsdp splits weights too, tensor heads and widths. expert splits a model's experts, and
    rows as data does: for a model without experts it is the same as data.
    """

    data: int = Field(default=-1, json_schema_extra=ROUNDS)
    fsdp: int = Field(default=1, json_schema_extra=ROUNDS)
    expert: int = Field(default=1, json_schema_extra=ROUNDS)
    tensor: int = Field(default=1, json_schema_extra=ROUNDS)

    @model_validator(mode="after")
    def _axes(self) -> MeshSection:
        sizes = {"data": self.data, "fsdp": self.fsdp, "expert": self.expert, "tensor": self.tensor}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{name} is {size}; expected a positive number of devices, or -1 for the rest")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError("more than one axis is -1; only one can take the rest")
        return self


class PromptsSection(Section):
    path: PathStr = Field(
        description="JSONL of Prompt rows, or of {prompt, gold?} rows",
        json_schema_extra=contents("teach", "sample", "evaluate"),
    )
    held_out: int = Field(
        default=0,
        ge=0,
        description="prompts set aside for evaluation, drawn by seed, when no file is given",
        json_schema_extra=decides("teach", "sample", "evaluate"),
    )
    held_out_path: PathStr | None = Field(
        default=None, description="JSONL of prompts for evaluation", json_schema_extra=contents("teach", "evaluate")
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
        if self.reward == "win_rate":
            for name in read.get(self.rule, ()):
                if not 0.0 <= getattr(self, name) <= 1.0:
                    raise ValueError(f"{name} is {getattr(self, name)}, no win rate; with reward=win_rate give 0 to 1")
        total = sum(self.replay * self.replay_decay**age for age in range(64)) if self.replay_decay < 1 else self.replay
        if self.replay and total >= 1.0:
            raise ValueError(f"replay {self.replay} with decay {self.replay_decay} leaves no room for new pairs")
        return self


def _is_known(name: str) -> str:
    find_loss(name)
    return name


LossName = Annotated[str, AfterValidator(_is_known)]  # of losses/registry.py


class LossSection(Section):
    name: LossName = Field(default="dno", json_schema_extra=TRAINED)
    beta: float = Field(
        default=0.1,
        gt=0.0,
        description="the KL coefficient: the paper's eta (Eq. 8), eta-tilde (Eq. 13)",
        json_schema_extra=TRAINED,
    )
    beta_schedule: Literal["constant", "nash_md"] = Field(
        default="constant",
        description="nash_md: tau (t + 2) / 2 in iteration t, `beta` is not read",
        json_schema_extra=TRAINED,
    )
    target: Literal["hard", "soft"] = Field(
        default="hard",
        description="1 (Eq. 13, DPO), or sigma((r(y+) - r(y-)) / target_temperature) (Eq. 8)",
        json_schema_extra=decides("pair", "train"),
    )
    target_temperature: float = Field(default=1.0, gt=0.0, json_schema_extra=PAIRED)
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=0.5, description="probability that a label is flipped", json_schema_extra=TRAINED
    )
    smoothing: Literal["conservative", "robust"] = Field(
        default="conservative",
        description="expect flipped labels, or correct for them (robust DPO)",
        json_schema_extra=TRAINED,
    )
    nll_weight: float = Field(
        default=0.0,
        ge=0.0,
        description="weight of the chosen response's likelihood; perhaps the paper's alpha, 0.005",
        json_schema_extra=TRAINED,
    )
    length_normalised: bool = Field(
        default=False, description="average log-probabilities per token; needs a larger beta", json_schema_extra=TRAINED
    )
    length_penalty: float = Field(
        default=0.0, ge=0.0, description="reward subtracted per token (R-DPO's alpha)", json_schema_extra=TRAINED
    )
    clip_range: float = Field(
        default=0.2,
        gt=0.0,
        lt=1.0,
        description="clip range of spo's and nash_md_pg's importance ratio",
        json_schema_extra=TRAINED,
    )
    max_reward: float = Field(
        default=10.0, gt=0.0, description="chi_po clips margins to twice this", json_schema_extra=TRAINED
    )
    load_balance_weight: float = Field(
        default=0.0,
        ge=0.0,
        description="weight of the load-balance loss of a mixture of experts; 0 reports it only: a pull on the router "
        "that no preference asked for would move the policy away from its reference",
        json_schema_extra=TRAINED,
    )

    @model_validator(mode="after")
    def _fits(self) -> LossSection:
        if self.target == "soft" and not self.kind.soft_target:
            raise ValueError(f"name={self.name} takes no target; target=soft is for {soft_losses()}")
        if self.label_smoothing and not self.kind.soft_target:
            raise ValueError(f"name={self.name} takes no label_smoothing; it is for {soft_losses()}")
        if self.length_penalty and not self.kind.has_reference:
            raise ValueError(f"name={self.name} has no reference that length_penalty could lower")
        return self

    @property
    def kind(self) -> Loss:
        """What the loss of this name needs."""
        return find_loss(self.name)

    if TYPE_CHECKING:  # pydantic gives frozen models one at run time, which type checkers do not see

        def __hash__(self) -> int: ...


class ReferenceSection(Section):
    """The reference that log-ratios are taken against, and the strength of the pull towards the initial policy."""

    kind: Literal["previous", "initial", "mixture"] = Field(
        default="previous",
        description="pi_t; pi_ref, the initial policy (or the proximal scheme's centre); or "
        "pi_t^(1 - tau/beta) pi_ref^(tau/beta) (Algorithms 3 and 4)",
        json_schema_extra=decides("score", "train"),
    )
    tau: float = Field(
        default=0.0,
        ge=0.0,
        description="regularisation strength of the mixture; at most beta",
        json_schema_extra=decides("score", "train"),
    )

    @model_validator(mode="after")
    def _tau_is_the_mixtures(self) -> ReferenceSection:
        if (self.kind == "mixture") != (self.tau > 0.0):
            raise ValueError(f"kind={self.kind} with tau={self.tau}; tau > 0 goes with kind=mixture, and only with it")
        return self

    if TYPE_CHECKING:

        def __hash__(self) -> int: ...


class OuterSection(Section):
    """What is done with the sequence of policies.

    last: policy t+1 is trained from policy t; the best on held-out prompts is returned (Algorithm 2).
    average: the same, and the mixture that draws one of pi_0 .. pi_{T-1} per prompt is returned too (Algorithm 1).
    proximal: the initial reference pi_ref moves to the current policy every `every` iterations (COMAL).
    optimistic: each iteration's pairs serve twice, to move pi'_t and as the guess of the next ones (ONPO).
    lookahead: the last iteration restarts from policy 0 on the pairs of all iterations before it (DNO-Lookahead).
    """

    scheme: Literal["last", "average", "proximal", "optimistic", "lookahead"] = Field(
        default="last", json_schema_extra=decides("pair", "score", "train", "evaluate")
    )
    every: Count | None = Field(
        default=None,
        description="iterations between two moves of the initial reference (proximal)",
        json_schema_extra=decides("score", "train"),
    )

    @model_validator(mode="after")
    def _every_is_proximal(self) -> OuterSection:
        if (self.scheme == "proximal") != (self.every is not None):
            raise ValueError(f"scheme={self.scheme} with every={self.every}; `every` goes with scheme=proximal")
        return self


class OptimizerSection(Section):
    """AdamW. The paper states 5e-5 (and no schedule); later work uses 5e-7 to 1e-6 at 7B: sweep it."""

    learning_rate: float = Field(default=5e-7, gt=0.0, json_schema_extra=TRAINED)
    learning_rate_decay: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="learning rate factor per iteration ('lower at later iterations')",
        json_schema_extra=TRAINED,
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(default="linear", json_schema_extra=TRAINED)
    warmup_ratio: Fraction = Field(default=0.1, json_schema_extra=TRAINED)
    weight_decay: float = Field(default=0.0, ge=0.0, json_schema_extra=TRAINED)
    b1: float = Field(default=0.9, ge=0.0, lt=1.0, json_schema_extra=TRAINED)
    b2: float = Field(default=0.95, ge=0.0, lt=1.0, json_schema_extra=TRAINED)
    eps: float = Field(default=1e-8, gt=0.0, json_schema_extra=TRAINED)
    max_grad_norm: float = Field(default=1.0, gt=0.0, json_schema_extra=TRAINED)

    if TYPE_CHECKING:  # as in LossSection

        def __hash__(self) -> int: ...


class TrainingSection(Section):
    batch_size: Count = Field(
        default=64, description="rows per optimiser step: pairs, or examples for sft", json_schema_extra=TRAINED
    )
    micro_batch_size: Count | None = Field(
        default=None, description="rows per forward pass; None: batch_size", json_schema_extra=ROUNDS
    )
    num_epochs: Count = Field(default=1, description="the paper: at most 1", json_schema_extra=TRAINED)
    logprob_chunk: Count = Field(
        default=512, description="tokens per slice of the output head", json_schema_extra=ROUNDS
    )
    save_every: Count = Field(default=100, description="optimiser steps between checkpoints", json_schema_extra=COSTS)

    @model_validator(mode="after")
    def _whole(self) -> TrainingSection:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


class EvaluationSection(Section):
    num_samples: Count = Field(
        default=1, description="responses per held-out prompt and policy", json_schema_extra=decides("evaluate")
    )
    annotation: AnnotationSection | None = Field(
        default=None, description="the judge; None: the run's own", json_schema_extra=decides("evaluate")
    )


class ReportSection(Section):
    tensorboard: bool = Field(default=True, json_schema_extra=COSTS)
