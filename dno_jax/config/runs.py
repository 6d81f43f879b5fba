"""What can be run: DNO, and the trainings beside it, supervised fine-tuning and reward models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dno_jax.config.adapter import AdapterSection, refuse_rounded_adapters
from dno_jax.config.annotation import AnnotationSection
from dno_jax.config.base import COSTS, Count, DataPaths, ModelPath, PathStr, Section, contents, decides
from dno_jax.config.mesh import MeshSection
from dno_jax.config.sampling import SamplingSection
from dno_jax.config.sections import (
    EvaluationSection,
    ModelConfigSection,
    PairingSection,
    PromptsSection,
    ReportSection,
)
from dno_jax.config.training import (
    LossSection,
    OptimizerSection,
    OuterSection,
    ReferenceSection,
    TrainingSection,
)
from dno_jax.stopping import GRACE_SECONDS, HEARTBEAT_SECONDS

GraceSeconds = Annotated[
    float,
    Field(
        gt=0.0,
        description="how long it may go on to save what it has, once asked to stop; less than the scheduler grants",
        json_schema_extra=COSTS,
    ),
]

HeartbeatSeconds = Annotated[
    float,
    Field(
        ge=5.0,
        description="of several processes: how long one may give no sign of life before the others end, to be resumed",
        json_schema_extra=COSTS,
    ),
]

_PURSE = ("store", "prices", "max_usd")  # fields of `annotation` that are the whole run's


class RunConfig(Section):
    """One run: T iterations from a checkpoint to a better checkpoint. As it stands, Algorithm 2 (DNO-Prct)."""

    run_dir: PathStr = Field(
        description="where all of it is written: a directory, or gs://BUCKET/PATH or s3://BUCKET/PATH",
        json_schema_extra=COSTS,
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="of every draw",
        json_schema_extra=decides("teach", "sample", "annotate", "pair", "train", "evaluate"),
    )
    iterations: Count = Field(default=3, description="T", json_schema_extra=COSTS)
    model: ModelConfigSection
    mesh: MeshSection = Field(default=MeshSection())
    prompts: PromptsSection
    sampling: SamplingSection = SamplingSection()
    annotation: AnnotationSection = AnnotationSection()
    pairing: PairingSection = PairingSection()
    loss: LossSection = LossSection()
    reference: ReferenceSection = ReferenceSection()
    outer: OuterSection = OuterSection()
    adapter: AdapterSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    report: ReportSection = Field(default=ReportSection())
    grace_seconds: GraceSeconds = GRACE_SECONDS
    heartbeat_seconds: HeartbeatSeconds = HEARTBEAT_SECONDS

    @model_validator(mode="after")
    def _adapters_are_float32(self) -> RunConfig:
        refuse_rounded_adapters(self.adapter, self.training)
        return self

    @model_validator(mode="after")
    def _judges_fit(self) -> RunConfig:
        if not self.annotation.gives_scores and self.pairing.reward == "score":
            raise ValueError(
                f"annotation.kind={self.annotation.kind} gives pairwise verdicts, no scores: "
                "set pairing.reward=win_rate"
            )
        if self.pairing.transform != "identity" and self.annotation.gives_scores:
            raise ValueError(
                f"pairing.transform={self.pairing.transform} is of preferences, and annotation.kind="
                f"{self.annotation.kind} gives points alone: set pairing.transform=identity (pairing.score_temperature "
                "says what points mean), or a judge of pairs, such as annotation.openai.form=pairwise"
            )
        if self.loss.target == "soft" and self.annotation.infers_preferences:
            raise ValueError(
                "loss.target=soft with schedule=tournament: pairs that never met would be trained on as ties; set "
                "schedule=all_pairs, or loss.target=hard"
            )
        if self.prompts.held_out and self.prompts.held_out_path:
            raise ValueError("prompts.held_out and prompts.held_out_path are both given: choose one")
        has_held_out = self.prompts.held_out or self.prompts.held_out_path
        if has_held_out and not self.evaluation_judge.is_judge:
            raise ValueError(
                f"annotation.kind={self.evaluation_judge.kind} cannot judge held-out responses: give "
                "evaluation.annotation a judge (oracle, openai, ensemble, table), or no held-out prompts"
            )
        return self

    @model_validator(mode="after")
    def _money_is_counted_once(self) -> RunConfig:
        if (own := self.evaluation.annotation) is not None:
            for name in _PURSE:
                if getattr(own, name) not in (None, {}):
                    raise ValueError(
                        f"evaluation.annotation.{name}: a run has one store, one table of prices and one limit, its "
                        f"held-out verdicts included: give annotation.{name}"
                    )
            self.evaluation_judge.refuse_missing_prices()
        return self

    @model_validator(mode="after")
    def _mixture_fits(self) -> RunConfig:
        if self.mixes and self.reference.kind != "mixture" and self.sampling.mixture_weight is None:
            raise ValueError(
                "sampling from the mixture needs its weight: set reference.kind=mixture with reference.tau, or "
                "sampling.mixture_weight"
            )
        if (self.pairing.opponents == "mixture") != self.mixes:
            raise ValueError(
                f"pairing.opponents={self.pairing.opponents} with sampling.source={self.sampling.source} and "
                f"num_opponents={self.sampling.num_opponents}: win rates against the mixture go with samples of it"
            )
        tau = self.reference.tau
        if self.loss.beta_schedule == "nash_md" and not tau:
            raise ValueError("loss.beta_schedule=nash_md is made of tau: set reference.kind=mixture and reference.tau")
        if self.loss.beta_schedule == "constant" and tau > self.loss.beta:
            raise ValueError(f"reference.tau is {tau}, above loss.beta {self.loss.beta}: the mixture needs tau <= beta")
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> RunConfig:
        name, loss, pairing = self.loss.name, self.loss.kind, self.pairing
        if loss.regularised and self.reference.kind != "mixture":
            raise ValueError(f"loss.name={name} is regularised: set reference.kind=mixture and reference.tau")
        if loss.pairing_rule not in (None, pairing.rule):
            raise ValueError(f"loss.name={name} with pairing.rule={pairing.rule}: set pairing.rule={loss.pairing_rule}")
        if loss.own_win_rates:
            if pairing.rule != "matching" or pairing.reward != "win_rate" or pairing.opponents == "pool":
                raise ValueError(
                    f"loss.name={name} reads each sample's own win rate: set pairing.rule=matching, "
                    "pairing.reward=win_rate and pairing.opponents=policy (or mixture)"
                )
            if loss.on_policy and (pairing.replay or self.sampling.source != "policy"):
                raise ValueError(
                    f"loss.name={name} needs samples of policy t: set pairing.replay=0, sampling.source=policy"
                )
        return self

    @model_validator(mode="after")
    def _the_reference_is_sampled(self) -> RunConfig:
        if not self.loss.forward_kl_weight:
            return self
        head = f"loss.forward_kl_weight={self.loss.forward_kl_weight} is of the reference's own samples: "
        if self.sampling.source != "policy":
            raise ValueError(f"{head}sampling.source={self.sampling.source} has none; set sampling.source=policy")
        if self.sampling.engine == "openai" and self.sampling.server.logprobs == "none":
            raise ValueError(
                f"{head}known by the log-probs that are recorded with them; set sampling.engine=jax, or "
                "sampling.server.logprobs to what the server gives"
            )
        moves = self.outer.every == 1  # then pi_ref is pi_t
        if self.uses_initial and not (self.pairing.replay or self.iterations == 1 or moves):
            raise ValueError(
                f"{head}after iteration 0 those of the initial policy are in replayed pairs alone; set pairing.replay "
                "above 0, or reference.kind=previous"
            )
        return self

    @model_validator(mode="after")
    def _scheme_fits(self) -> RunConfig:
        scheme = self.outer.scheme
        if scheme == "proximal" and self.reference.kind == "previous":
            raise ValueError(
                "outer.scheme=proximal moves the initial reference: set reference.kind to mixture (with tau) or initial"
            )
        if scheme == "lookahead" and self.iterations < 2:
            raise ValueError(
                "outer.scheme=lookahead pools the pairs of the iterations before the last: iterations >= 2"
            )
        return self

    @model_validator(mode="after")
    def _the_previous_policy_can_be_met(self) -> RunConfig:
        """What the optimistic and the extragradient scheme need: win rates against samples of two policies."""
        scheme, pairing = self.outer.scheme, self.pairing
        if scheme not in ("optimistic", "extragradient"):
            return self
        head = f"outer.scheme={scheme} "
        stored = "reads win rates against samples of two policies, those of the one before as they are stored: "
        if self.prompts.split != "shared":
            raise ValueError(
                f"{head}{stored}with prompts.split={self.prompts.split} it has answered other prompts; set "
                "prompts.split=shared"
            )
        if self.sampling.source != "policy":
            raise ValueError(f"{head}{stored}sampling.source={self.sampling.source}; set sampling.source=policy")
        if pairing.reward != "win_rate" or pairing.opponents != "policy":
            raise ValueError(
                f"{head}reads win rates against the policies' own samples: set pairing.reward=win_rate and "
                f"pairing.opponents=policy (they are {pairing.reward} and {pairing.opponents})"
            )
        if pairing.rule in ("verdict", "spin"):
            raise ValueError(
                f"{head}with pairing.rule={pairing.rule}, which has no opponents: its pairs are made without win "
                "rates; set pairing.rule=all (or best_worst, large_margin)"
            )
        if self.annotation.nobody_judges:
            raise ValueError(f"{head}needs a judge, and annotation.kind={self.annotation.kind} asks nobody")
        if self.loss.kind.own_win_rates:
            raise ValueError(
                f"{head}regresses on differences of win rates, and loss.name={self.loss.name} reads one win rate of "
                "each sample; set loss.name=dno"
            )
        if scheme == "extragradient" and pairing.replay:
            raise ValueError(
                f"{head}trains twice on one iteration's samples: a pair replayed would be there twice; set "
                "pairing.replay=0"
            )
        if scheme == "extragradient" and self.iterations % 2:
            raise ValueError(
                f"{head}takes two iterations a step, and iterations={self.iterations}; give an even number"
            )
        return self

    @model_validator(mode="after")
    def _machines_apart_share_no_store(self) -> RunConfig:
        annotation = self.annotation
        if annotation.apart and "://" in self.run_dir:
            raise ValueError(
                f"annotation.apart=true with run_dir={self.run_dir.partition('://')[0]}://...: one process at a time "
                "works on a bucket's directory, so nobody else could write the verdicts; set annotation.apart=false, "
                "or give a directory of a file system that both machines see"
            )
        if annotation.apart and annotation.chats and annotation.store is None:
            raise ValueError(
                "annotation.apart=true without annotation.store: sqlite needs all processes that have a file open to be"
                " on one machine, and the run directory's annotations.sqlite may be open where `dno annotate` runs: "
                "give it a file on a local disk of this machine (the two may differ)"
            )
        return self

    @property
    def evaluation_judge(self) -> AnnotationSection:
        """Who judges held-out responses: with the run's own store, prices and limit."""
        purse = {name: getattr(self.annotation, name) for name in _PURSE}
        own = self.evaluation.annotation
        return self.annotation if own is None else own.model_copy(update=purse)

    @property
    def mixes(self) -> bool:
        """Whether anything is sampled from the mixture with the initial policy."""
        return self.sampling.source == "mixture" or self.sampling.num_opponents > 0

    def is_second_half(self, iteration: int) -> bool:
        """Whether iteration t ends an extragradient step, which the iteration before it began."""
        return self.outer.scheme == "extragradient" and iteration % 2 == 1

    def meets_previous(self, iteration: int) -> bool:
        """Whether the samples of policy t-1 are judged beside those of policy t."""
        return self.is_second_half(iteration) or (self.outer.scheme == "optimistic" and iteration > 0)

    def num_candidates(self, iteration: int) -> int:
        """Responses of policies that a prompt has in iteration t."""
        section = self.sampling
        return section.num_samples * (1 + self.meets_previous(iteration)) + section.num_opponents

    @property
    def uses_initial(self) -> bool:
        """Whether the loss reads log pi_ref beside log pi_t."""
        return self.reference.kind != "previous"

    def loss_at(self, iteration: int) -> LossSection:
        """The loss of iteration t, with beta = eta_t."""
        if self.loss.beta_schedule == "constant":
            return self.loss
        return self.loss.model_copy(update={"beta": self.reference.tau * (iteration + 2) / 2.0})

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence: prompt and response, whoever wrote it."""
        longest, total = self.prompts.max_length + self.sampling.max_new_tokens, self.sampling.max_total_tokens
        return longest if total is None else min(longest, total)


class SftModelSection(ModelConfigSection):
    """Start from `path`, or, with `init_config`, from random weights and the tokenizer in `path`."""

    init_config: ModelPath | None = Field(
        default=None,
        description="directory with a config.json, or an id on the Hub: start from random weights of that shape",
        json_schema_extra=contents("sft", "reward"),
    )


class SftDataSection(Section):
    path: DataPaths = Field(
        description="examples in any form of docs/data.md: a file, a pattern, a dataset's id, or a list of them",
        json_schema_extra=contents("sft"),
    )
    turns: Literal["last", "all"] = Field(
        default="last",
        description="which of the assistant's turns are trained: the last one, or each after the chat before it",
        json_schema_extra=decides("sft"),
    )
    max_length: Count = Field(
        default=512, description="tokens of the longest example", json_schema_extra=decides("sft")
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        default="error",
        description="what happens to a longer example; drops are counted. truncate cuts the prompt as "
        "prompts.too_long does, never the response",
        json_schema_extra=decides("sft"),
    )


class OneTraining(Section):
    """What every training has that is no iteration of a run."""

    run_dir: PathStr = Field(
        description="where all of it is written: a directory, or gs://BUCKET/PATH or s3://BUCKET/PATH",
        json_schema_extra=COSTS,
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="of every draw", json_schema_extra=decides("sft", "reward")
    )
    model: SftModelSection
    mesh: MeshSection = Field(default=MeshSection())
    optimizer: OptimizerSection = OptimizerSection(learning_rate=5e-6)
    training: TrainingSection = TrainingSection(num_epochs=3)
    report: ReportSection = Field(default=ReportSection())
    grace_seconds: GraceSeconds = GRACE_SECONDS
    heartbeat_seconds: HeartbeatSeconds = HEARTBEAT_SECONDS

    @model_validator(mode="after")
    def _one_iteration(self) -> OneTraining:
        for section, names in (("optimizer", ("learning_rate_decay", "carry")), ("training", ("keep_policies",))):
            own = getattr(self, section)
            for name in names:
                if getattr(own, name) != type(own).model_fields[name].default:
                    raise ValueError(
                        f"{section}.{name}: concerns what one iteration leaves to the next, and this training has one; "
                        "leave it out"
                    )
        return self


class SftConfig(OneTraining):
    """Supervised fine-tuning, the step before DNO (the paper: 3 epochs at 5e-6, prompt tokens masked)."""

    data: SftDataSection
    adapter: AdapterSection | None = None

    @property
    def max_length(self) -> int:
        """Tokens of the longest example."""
        return self.data.max_length

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> SftConfig:
        refuse_rounded_adapters(self.adapter, self.training)
        if self.adapter is not None and self.model.init_config is not None:
            raise ValueError(
                "adapter with model.init_config: adapters are trained beside the weights of a checkpoint, and random "
                "ones are no base; leave one of the two out"
            )
        return self
