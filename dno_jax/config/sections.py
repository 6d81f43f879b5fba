"""The sections of a run, but for the judges (annotation.py). Names follow Hugging Face where one exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from dno_jax.config.annotation import AnnotationSection
from dno_jax.config.base import MAY_CHANGE, Count, DateStr, Fraction, PathStr, Section


class ModelConfigSection(Section):
    """Which checkpoint, and how it is computed."""

    path: PathStr = Field(description="directory of a Hugging Face checkpoint")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="compute dtype; parameters stay float32"
    )
    remat: Literal["none", "full", "dots"] = Field(
        default="full",
        description="what the backward pass recomputes: nothing, every layer, or all but matrix products",
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = Field(
        default="auto",
        description="how whole sequences attend: cuDNN's kernel on GPUs, Pallas' splash attention on TPUs, plain XLA; "
        "auto takes the platform's kernel where it fits the model and the dtype, else xla",
    )
    chat_template: str = Field(
        default="tokenizer",
        description="'tokenizer' (its own), 'raw' (no template: a base model), or the path of a Jinja file",
    )
    template_date: DateStr = Field(
        default="2024-07-26",
        description="the day that a template which writes today's date is told, in every iteration and after a restart",
    )


class MeshSection(Section):
    """Devices by mesh axis; one axis may be -1 and takes what is left.

    data and fsdp split rows; fsdp splits weights too, tensor heads and widths. expert splits a model's experts, and
    rows as data does: for a model without experts it is the same as data.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

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
    path: PathStr = Field(description="JSONL of Prompt rows, or of {prompt, gold?} rows")
    held_out: int = Field(
        default=0, ge=0, description="prompts set aside for evaluation, drawn by seed, when no file is given"
    )
    held_out_path: PathStr | None = Field(default=None, description="JSONL of prompts for evaluation")
    split: Literal["disjoint", "shared"] = Field(
        default="disjoint", description="each iteration gets its own part of the prompts (section 5.1), or all of them"
    )
    max_length: Count = Field(default=512, description="tokens of the longest prompt, template included")
    too_long: Literal["error", "drop", "truncate"] = Field(
        default="error",
        description="what becomes of a longer prompt; drops are counted. truncate: the oldest turns go, then the "
        "beginning of the last question; system messages and what the template writes stay",
    )


class CompletionServerSection(Section):
    """A server of the exported policy with /v1/completions that takes token ids (vLLM, SGLang, llama.cpp's).

    The key itself never stands in a file: only the variable's name does.
    """

    model: str = Field(
        default="policy-{iteration}",
        min_length=1,
        description="name under which the server lists the policy; {iteration} becomes 000, 001, ...: without it, a "
        "server that still serves an older policy passes for the current one",
    )
    base_url: str = Field(default="http://127.0.0.1:8000/v1", min_length=1, json_schema_extra=MAY_CHANGE)
    api_key_env: str | None = Field(
        default=None,
        description="environment variable of the key; None for no key",
        json_schema_extra=MAY_CHANGE,
    )
    logprobs: Literal["none", "processed", "raw"] = Field(
        default="none",
        description="what the server's log-probs are of. raw: the policy at temperature 1 (vLLM's default, llama.cpp, "
        "SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB). processed: what was drawn from, used only where sampling leaves "
        "the policy as it is. none: they are not asked for",
    )
    max_concurrency: Count = Field(
        default=64, description="requests in flight; each is one response", json_schema_extra=MAY_CHANGE
    )
    max_tries: Count = Field(default=8, description="requests for one response", json_schema_extra=MAY_CHANGE)
    timeout: float = Field(default=600.0, gt=0.0, description="seconds a request", json_schema_extra=MAY_CHANGE)
    max_refused: Fraction = Field(
        default=0.0,
        description="share of prompts that may stay without responses because answers were refused (counted)",
        json_schema_extra=MAY_CHANGE,
    )


class SamplingSection(Section):
    """How the candidates are drawn (the paper: K=5 from the policy, temperature 0.7, top-p 0.95)."""

    source: Literal["policy", "mixture", "data"] = Field(
        default="policy",
        description="policy t; the token-level mixture pi_t^(1-w) pi_ref^w (Algorithm 4, Option II); or the candidates "
        "that the prompt file brings along (offline methods)",
    )
    mixture_weight: Fraction | None = Field(default=None, description="w, the share of pi_ref; None is tau/beta")
    num_opponents: int = Field(
        default=0, ge=0, description="further samples, of the mixture, that are only compared with (Nash-MD)"
    )
    num_samples: int = Field(default=5, description="K")
    max_new_tokens: Count = 512
    temperature: float = Field(default=0.7, ge=0.0, description="0 is greedy")
    top_k: int = Field(default=0, ge=0, description="0 keeps all")
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, lt=1.0)
    slots: Count | None = Field(
        default=None,
        description="rows decoded at once on each row shard of the mesh; None: what fits, see `dno plan`",
        json_schema_extra=MAY_CHANGE,
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8", "float8_e4m3fn"] = Field(
        default="auto", description="of the cached keys and values; auto: model.dtype"
    )
    chunk_steps: Count = Field(
        default=32, description="tokens drawn before the host looks", json_schema_extra=MAY_CHANGE
    )
    prefill_chunk: Count = Field(
        default=512, description="tokens of a prompt that go through the model at once", json_schema_extra=MAY_CHANGE
    )
    shard_prompts: Count = Field(
        default=16, description="prompts a file of rollouts: what is judged and gone on with together"
    )
    repetition_penalty: float = Field(default=1.0, gt=0.0, description="of ids in prompt or response; 1 is none")
    stop: tuple[str, ...] = Field(default=(), description="strings that end a response; they are cut from its text")
    max_total_tokens: Count | None = Field(default=None, description="of prompt and response together")
    record_drawn_logprob: bool = Field(
        default=False, description="keep with each response also its log-probability under what it was drawn from"
    )
    engine: Literal["jax", "openai"] = Field(
        default="jax", description="this program's sampler, or a server of the exported policy"
    )
    server: CompletionServerSection = CompletionServerSection()
    audit_prompts: int = Field(
        default=1,
        ge=0,
        description="prompts of every shard whose responses' log-probs are compared with the trainer's; 0 audits none",
        json_schema_extra=MAY_CHANGE,
    )
    audit_bound: float | None = Field(
        default=None,
        gt=0.0,
        description="largest difference that is agreement, nats: of a token; of a response of n, sqrt(n) times that; "
        "None goes by model.dtype",
        json_schema_extra=MAY_CHANGE,
    )
    as_reference: bool = Field(
        default=False,
        description="the sampler's log pi_t of its own responses is the reference: pairs of two such are not scored",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _taken_is_audited(self) -> SamplingSection:
        if self.as_reference and not self.audit_prompts:
            raise ValueError(
                "as_reference=true with audit_prompts=0: log-probs are taken from the sampler only where an audit has "
                "compared them with the trainer's; set audit_prompts to 1 or more, or as_reference=false"
            )
        return self

    @model_validator(mode="after")
    def _responses_can_end_and_differ(self) -> SamplingSection:
        if any(not text for text in self.stop):
            raise ValueError("stop has an empty string, which every response begins with; remove it")
        if self.temperature == 0.0 and self.source != "data":
            raise ValueError(
                f"temperature is 0 with num_samples={self.num_samples}: all samples of a prompt will be equal, and no "
                "pair can be made of them; set a temperature above 0"
            )
        if self.max_total_tokens is not None and self.max_total_tokens < 2:
            raise ValueError(f"max_total_tokens is {self.max_total_tokens}; a prompt and a response need at least 2")
        if self.engine == "openai" and (self.source == "mixture" or self.num_opponents):
            raise ValueError(
                "engine=openai with samples of a mixture: a server gives one policy's tokens; set engine=jax, or "
                "source=policy and num_opponents=0"
            )
        return self

    @model_validator(mode="after")
    def _pairs_need_two(self) -> SamplingSection:
        if self.num_samples < 2:
            raise ValueError(f"num_samples is {self.num_samples}; a preference pair needs K >= 2 samples a prompt")
        if self.num_opponents and self.source != "policy":
            raise ValueError(
                f"num_opponents is {self.num_opponents} with source={self.source}; opponents come beside samples of "
                "the policy: set source=policy, or num_opponents=0"
            )
        return self


class PairingSection(Section):
    """Which pairs of a judged pool are trained on. Floors and margins (section 5.1) are in the unit of `reward`."""

    rule: Literal["large_margin", "restrictive", "spin", "best_worst", "all", "verdict", "matching"] = Field(
        default="large_margin",
        description="section 5.1's pairs; only those that the teacher wins (DNO-Restrictive); the teacher over every "
        "sample (SPIN); best over worst; every pair by reward (Eq. 8), or by its own verdict (iterative DPO, INPO); "
        "every sample of the policy once (losses per response)",
    )
    reward: Literal["score", "win_rate"] = Field(
        default="score", description="points of the judge, or mean win rate against `opponents`"
    )
    opponents: Literal["pool", "policy", "mixture"] = Field(
        default="pool",
        description="whom a win rate is against: the whole pool, the teacher too (the paper's estimator, biased); the "
        "policy's samples (unbiased for P(y > pi_t)); the mixture's samples (P(y > pi_t^tau))",
    )
    score_temperature: float = Field(
        default=0.0, ge=0.0, description="points become sigma(difference / temperature); 0: the higher one wins"
    )
    positive_floor: float = Field(default=5.0, description="least reward of a chosen response")
    margin: float = Field(default=2.0, ge=0.0, description="least reward gap")
    student_margin: float = Field(
        default=1.0, ge=0.0, description="least gap where the chosen response is the student's"
    )
    max_pairs_per_prompt: Count | None = Field(default=None, description="keep the widest gaps; None keeps all")
    degenerate_ngram: Count = Field(default=4, description="n of the repetition test")
    degenerate_share: Fraction = Field(
        default=0.5,
        description="a response whose share of repeated n-grams exceeds this is a negative, whatever its reward",
    )
    replay: Fraction = Field(
        default=0.3, description="largest share of the pairs that may come from the iteration before"
    )
    replay_decay: Fraction = Field(default=0.5, description="and of that from each one further back (0.3, 0.15, ...)")

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


# Of what each loss takes beside log-probabilities. `training/objectives.py` has the functions, by the same names.
SOFT_LOSSES = ("dno", "chi_po", "ipo", "inpo")  # regress on a target in [0, 1]
RESPONSE_LOSSES = ("sppo", "spo", "nash_md_pg")  # read each response's own win rate
LossName = Literal["dno", "spin", "chi_po", "ipo", "inpo", "rebel", "sppo_hard", "sppo", "spo", "nash_md_pg", "sft"]


class LossSection(Section):
    name: LossName = "dno"
    beta: float = Field(
        default=0.1, gt=0.0, description="the KL coefficient: the paper's eta (Eq. 8), eta-tilde (Eq. 13)"
    )
    beta_schedule: Literal["constant", "nash_md"] = Field(
        default="constant", description="nash_md: tau (t + 2) / 2 in iteration t, `beta` is not read"
    )
    target: Literal["hard", "soft"] = Field(
        default="hard", description="1 (Eq. 13, DPO), or sigma((r(y+) - r(y-)) / target_temperature) (Eq. 8)"
    )
    target_temperature: float = Field(default=1.0, gt=0.0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5, description="probability that a label is flipped")
    smoothing: Literal["conservative", "robust"] = Field(
        default="conservative", description="expect flipped labels, or correct for them (robust DPO)"
    )
    nll_weight: float = Field(
        default=0.0, ge=0.0, description="weight of the chosen response's likelihood; perhaps the paper's alpha, 0.005"
    )
    length_normalised: bool = Field(default=False, description="log-probabilities a token; wants a larger beta")
    length_penalty: float = Field(default=0.0, ge=0.0, description="reward that a token costs (R-DPO's alpha)")
    clip_range: float = Field(default=0.2, gt=0.0, lt=1.0, description="of spo's and nash_md_pg's importance ratio")
    max_reward: float = Field(default=10.0, gt=0.0, description="chi_po clips margins to twice this")
    load_balance_weight: float = Field(
        default=0.0,
        ge=0.0,
        description="weight of the load-balance loss of a mixture of experts; 0 reports it only: a pull on the router "
        "that no preference asked for would move the policy away from its reference",
    )

    @model_validator(mode="after")
    def _fits(self) -> LossSection:
        if self.target == "soft" and self.name not in SOFT_LOSSES:
            raise ValueError(f"name={self.name} takes no target; target=soft is for {', '.join(SOFT_LOSSES)}")
        if self.label_smoothing and self.name not in SOFT_LOSSES:
            raise ValueError(f"name={self.name} takes no label_smoothing; it is for {', '.join(SOFT_LOSSES)}")
        if self.length_penalty and self.name in ("spo", "nash_md_pg", "sft"):
            raise ValueError(f"name={self.name} has no reference that length_penalty could lower")
        return self

    if TYPE_CHECKING:  # pydantic gives frozen models one at run time, which type checkers do not see

        def __hash__(self) -> int: ...


class ReferenceSection(Section):
    """The reference that log-ratios are taken against, and the strength of the pull to pi_ref."""

    kind: Literal["previous", "initial", "mixture"] = Field(
        default="previous",
        description="pi_t; pi_ref, the initial policy (or the proximal scheme's centre); or "
        "pi_t^(1 - tau/beta) pi_ref^(tau/beta) (Algorithms 3 and 4)",
    )
    tau: float = Field(default=0.0, ge=0.0, description="of the mixture; at most beta")

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
    average: the same, and the mixture that draws one of pi_0 .. pi_{T-1} a prompt is returned too (Algorithm 1).
    proximal: pi_ref moves to the current policy every `every` iterations (COMAL).
    optimistic: each iteration's pairs serve twice, to move pi'_t and as the guess of the next ones (ONPO).
    lookahead: the last iteration restarts from policy 0 on the pairs of all iterations before it (DNO-Lookahead).
    """

    scheme: Literal["last", "average", "proximal", "optimistic", "lookahead"] = "last"
    every: Count | None = Field(default=None, description="iterations between two moves of pi_ref (proximal)")

    @model_validator(mode="after")
    def _every_is_proximal(self) -> OuterSection:
        if (self.scheme == "proximal") != (self.every is not None):
            raise ValueError(f"scheme={self.scheme} with every={self.every}; `every` goes with scheme=proximal")
        return self


class OptimizerSection(Section):
    """AdamW. The paper states 5e-5 (and no schedule); later work uses 5e-7 to 1e-6 at 7B: sweep it."""

    learning_rate: float = Field(default=5e-7, gt=0.0)
    learning_rate_decay: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="factor of the learning rate an iteration ('lower at later iterations')",
    )
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: Fraction = 0.1
    weight_decay: float = Field(default=0.0, ge=0.0)
    b1: float = Field(default=0.9, ge=0.0, lt=1.0)
    b2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)

    if TYPE_CHECKING:  # as in LossSection

        def __hash__(self) -> int: ...


class TrainingSection(Section):
    batch_size: Count = Field(default=64, description="rows an optimiser step: pairs, or examples for sft")
    micro_batch_size: Count | None = Field(default=None, description="rows a forward pass; None is batch_size")
    num_epochs: Count = Field(default=1, description="the paper: at most 1")
    logprob_chunk: Count = Field(default=512, description="tokens a slice of the output head")
    save_every: Count = Field(
        default=100, description="optimiser steps between checkpoints", json_schema_extra=MAY_CHANGE
    )

    @model_validator(mode="after")
    def _whole(self) -> TrainingSection:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


class EvaluationSection(Section):
    num_samples: Count = Field(default=1, description="responses a held-out prompt and policy")
    annotation: AnnotationSection | None = Field(default=None, description="the judge; None is the run's own")


class ReportSection(Section):
    tensorboard: bool = True
