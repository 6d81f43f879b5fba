"""How a policy is trained on pairs: the loss, its reference, the sequence of policies, the optimiser and its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dno_jax.config.base import (
    COSTS,
    PAIRED,
    ROUNDS,
    TRAINED,
    Count,
    Fraction,
    Section,
    decides,
)
from dno_jax.losses.registry import LOSSES, Loss, find_loss, soft_losses


def _is_known(name: str) -> str:
    find_loss(name)
    return name


LossName = Annotated[str, AfterValidator(_is_known)]  # of losses/registry.py


class LossSection(Section):
    name: LossName = Field(default="dno", description="see docs/algorithms.md", json_schema_extra=TRAINED)
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
    target_temperature: float = Field(
        default=1.0, gt=0.0, description="softness of soft targets", json_schema_extra=PAIRED
    )
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
    forward_kl_weight: float = Field(
        default=0.0,
        ge=0.0,
        description="weight of KL(pi_ref || pi), the likelihood of pi_ref's own samples (RSPO), in nats per response: "
        "those of pi_t where it is the reference, else those of the initial policy among the pairs, replayed ones too",
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

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> LossSection:
        idle = {
            name: f"name={self.name}; it is for {', '.join(key for key, loss in LOSSES.items() if name in loss.reads)}"
            for name in ("clip_range", "max_reward")
            if name not in self.kind.reads
        }
        if self.target == "hard":
            idle["target_temperature"] = "target=hard; it is for target=soft"
        if not self.label_smoothing:
            idle["smoothing"] = "label_smoothing=0, which it is a way of"
        for name, why in idle.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)}, and nothing reads it with {why}; leave it out")
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
    optimistic: the reward is 2 r_t - r_{t-1}, r_{t-1} from meeting the stored samples of policy t-1 (ONPO).
    extragradient: iterations 2k and 2k+1 are one step: pi_{k+1/2} is trained from pi_k, then pi_{k+1} from pi_k again,
        on the same samples, rated against those of pi_{k+1/2} (EGPO, Nash mirror prox).
    lookahead: the last iteration restarts from policy 0 on the pairs of all iterations before it (DNO-Lookahead).
    """

    scheme: Literal["last", "average", "proximal", "optimistic", "extragradient", "lookahead"] = Field(
        default="last",
        description="which policies there are, and which are returned",
        json_schema_extra=decides("pair", "score", "train", "evaluate"),
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


# Fields of `optimizer` that some kinds read and others do not.
_OWN = {
    "adamw": ("b1", "b2", "eps", "moment_dtype"),
    "adafactor": ("decay_rate", "max_update_rms", "min_factored", "relative_rate"),
    "muon": ("b1", "b2", "eps", "moment_dtype", "momentum"),
}


class OptimizerSection(Section):
    """How gradients become updates. The paper states 5e-5 (and no schedule); later work uses 5e-7 to 1e-6 at 7B."""

    name: Literal["adamw", "adafactor", "muon"] = Field(
        default="adamw",
        description="two moments a parameter; second moments by row and column of each matrix alone; or the momentum "
        "of each layer's matrices orthogonalised, and adamw for all else",
        json_schema_extra=TRAINED,
    )
    learning_rate: float = Field(default=5e-7, gt=0.0, description="at the schedule's top", json_schema_extra=TRAINED)
    learning_rate_decay: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="learning rate factor per iteration ('lower at later iterations')",
        json_schema_extra=TRAINED,
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="after the warmup", json_schema_extra=TRAINED
    )
    warmup_ratio: Fraction = Field(default=0.1, description="share of the steps", json_schema_extra=TRAINED)
    weight_decay: float = Field(
        default=0.0, ge=0.0, description="decoupled: times the learning rate", json_schema_extra=TRAINED
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0.0, description="longer gradients are scaled down to it", json_schema_extra=TRAINED
    )
    carry: bool = Field(
        default=False,
        description="start from the moments that the policy was trained with, not from zeros; they lie beside it",
        json_schema_extra=TRAINED,
    )
    b1: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="decay of the first moment (adamw, muon)", json_schema_extra=TRAINED
    )
    b2: float = Field(
        default=0.95, ge=0.0, lt=1.0, description="decay of the second moment (adamw, muon)", json_schema_extra=TRAINED
    )
    eps: float = Field(default=1e-8, gt=0.0, description="beside the root (adamw, muon)", json_schema_extra=TRAINED)
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of moments as they are held, rounded stochastically; computed in float32 (adamw, muon)",
        json_schema_extra=TRAINED,
    )
    momentum: float = Field(
        default=0.95, ge=0.0, lt=1.0, description="decay of a matrix's momentum (muon)", json_schema_extra=TRAINED
    )
    decay_rate: float = Field(
        default=0.8,
        gt=0.0,
        le=1.0,
        description="the second moment's decay is 1 - step^-decay_rate (adafactor)",
        json_schema_extra=TRAINED,
    )
    max_update_rms: float = Field(
        default=1.0,
        ge=1.0,
        description="a matrix's update of a longer root mean square is scaled down to it (adafactor)",
        json_schema_extra=TRAINED,
    )
    min_factored: Count = Field(
        default=128,
        description="a matrix with a shorter side keeps a moment of every number (adafactor)",
        json_schema_extra=TRAINED,
    )
    relative_rate: bool = Field(
        default=False,
        description="times the root mean square of each matrix, as published; false: learning rates mean what they "
        "mean for adamw (adafactor)",
        json_schema_extra=TRAINED,
    )

    def unread(self) -> set[str]:
        return {field for own in _OWN.values() for field in own} - set(_OWN[self.name])

    @model_validator(mode="after")
    def _all_read(self) -> OptimizerSection:
        for field in sorted(self.unread()):
            if getattr(self, field) != type(self).model_fields[field].default:
                readers = " or ".join(name for name, own in _OWN.items() if field in own)
                raise ValueError(f"{field} with name={self.name}: only {readers} reads it; leave it out")
        return self

    if TYPE_CHECKING:  # as in LossSection

        def __hash__(self) -> int: ...


class ProfileSection(Section):
    """Steps of every training that are traced, for TensorBoard's or XProf's profiler."""

    first: int = Field(default=10, ge=0, description="the first step traced", json_schema_extra=COSTS)
    steps: Count = Field(default=3, description="how many", json_schema_extra=COSTS)


class TrainingSection(Section):
    batch_size: Count = Field(
        default=64, description="rows per optimiser step: pairs, or examples for sft", json_schema_extra=TRAINED
    )
    micro_batch_size: Count | None = Field(
        default=None, description="rows per forward pass; None: batch_size", json_schema_extra=ROUNDS
    )
    packing: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="several texts in a row, a pair's prompt once where the attention can: no padding to speak of. "
        "auto: on, but not with cuDNN's attention, which jax gives no segments",
        json_schema_extra=ROUNDS,
    )
    group_by_length: bool = Field(
        default=False,
        description="batches of rows of like lengths, from windows of 16 batches: little padding without packing, and "
        "an order less random",
        json_schema_extra=TRAINED,
    )
    num_epochs: Count = Field(default=1, description="the paper: at most 1", json_schema_extra=TRAINED)
    logprob_chunk: Count = Field(
        default=512, description="tokens per slice of the output head, on each device", json_schema_extra=ROUNDS
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of parameters while they are trained, norms aside; bfloat16: updates are rounded stochastically, "
        "and policy 0 is rounded once, at its import",
        json_schema_extra=TRAINED,
    )
    save_every: Count = Field(default=100, description="optimiser steps between checkpoints", json_schema_extra=COSTS)
    keep_states: Count = Field(
        default=2, description="newest checkpoints kept while training runs", json_schema_extra=COSTS
    )
    skip_nonfinite: int = Field(
        default=0,
        ge=0,
        description="steps of an iteration whose loss or gradient may be NaN or infinite: they change nothing, and one "
        "more stops training",
        json_schema_extra=TRAINED,
    )
    profile: ProfileSection | None = Field(
        default=None, description="steps to trace with jax.profiler into the run directory", json_schema_extra=COSTS
    )
    keep_policies: Literal["all"] | Count = Field(
        default="all",
        description="newest policies kept, beside the best so far and those that later stages read; what is pruned can "
        "no longer be sampled, exported or returned",
        json_schema_extra=COSTS,
    )

    @model_validator(mode="after")
    def _whole(self) -> TrainingSection:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self
