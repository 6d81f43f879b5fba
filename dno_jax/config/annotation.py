"""Who judges: the preference functions and how they are reached."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from dno_jax.config.base import (
    COSTS,
    JUDGED,
    Count,
    Fraction,
    PathStr,
    Section,
    VariableName,
    contents,
    decides,
)
from dno_jax.config.extras import AddressExtras, Extras
from dno_jax.config.judges import (
    OracleSection,
    PythonSection,
    QualitySection,
    RewardModelSection,
    Rubric,
    SelfSection,
    TableSection,
)


class PriceSection(Section):
    """What a model's tokens cost, in US dollars per million."""

    input: float = Field(ge=0.0, description="of prompts", json_schema_extra=COSTS)
    output: float = Field(ge=0.0, description="of replies", json_schema_extra=COSTS)
    batch: Fraction = Field(default=0.5, description="the Batch API's share of that price", json_schema_extra=COSTS)


class EndpointSection(AddressExtras):
    """Another address of the same model. The key itself never stands in a file: only the variable's name does."""

    base_url: str = Field(min_length=1, description="of its API; it usually ends in /v1", json_schema_extra=COSTS)
    api_key_env: VariableName | None = Field(
        default=None, description="environment variable of its key; None for no key", json_schema_extra=COSTS
    )


class ChatSection(Extras):
    """A model behind chat.completions endpoints, and how they are asked."""

    model: str = Field(
        default="gpt-4.1-mini", min_length=1, description="as the endpoint names it", json_schema_extra=JUDGED
    )
    base_url: str | None = Field(default=None, description="None: the client's default", json_schema_extra=COSTS)
    api_key_env: VariableName | None = Field(
        default="OPENAI_API_KEY",
        description="environment variable of the key; None for no key",
        json_schema_extra=COSTS,
    )
    more_endpoints: tuple[EndpointSection, ...] = Field(
        default=(),
        description="fallbacks, tried in this order while those before them do not answer",
        json_schema_extra=COSTS,
    )
    temperature: float | None = Field(
        default=0.0,
        ge=0.0,
        description="None sends none: some models accept only their own",
        json_schema_extra=JUDGED,
    )
    max_tokens: Count = Field(default=2048, description="tokens of the longest reply", json_schema_extra=JUDGED)
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens",
        description="the endpoint's name for it (reasoning models: max_completion_tokens)",
        json_schema_extra=JUDGED,
    )
    send_seed: bool = Field(
        default=True,
        description="send a seed with each request, derived from the run's seed and the request",
        json_schema_extra=JUDGED,
    )
    max_concurrency: Count = Field(
        default=32, description="concurrent requests; fewer while the endpoint is slow", json_schema_extra=COSTS
    )
    requests_per_minute: Count | None = Field(
        default=None, description="None: what the endpoint's headers say", json_schema_extra=COSTS
    )
    tokens_per_minute: Count | None = Field(
        default=None, description="None: what the endpoint's headers say", json_schema_extra=COSTS
    )
    max_tries: Count = Field(default=5, description="attempts per verdict and run", json_schema_extra=COSTS)
    timeout: float = Field(default=120.0, gt=0.0, description="seconds per request", json_schema_extra=COSTS)
    max_outage: float = Field(
        default=600.0,
        ge=0.0,
        description="seconds that a run waits while no endpoint answers, before it stops",
        json_schema_extra=COSTS,
    )

    @property
    def extras(self) -> dict[str, Any]:
        """What it is sent besides questions that can change an answer; empty where nothing is."""
        return self.told(self.base_url)


class OpenAISection(ChatSection):
    """A judge behind any chat.completions endpoint.

    listwise: one reply grades all candidates. pairwise: a reply names the better of two, or a tie. logprob: the
    probabilities of a one-token verdict (AlpacaEval's m / M). Pairs come by `schedule`.
    """

    form: Literal["listwise", "pairwise", "logprob"] = Field(
        default="listwise", description="how it is asked; see docs/annotation.md", json_schema_extra=JUDGED
    )
    rubric: Rubric | None = Field(
        default=None,
        description="built in, or a YAML file; None: the form's own",
        json_schema_extra=contents("annotate", "evaluate"),
    )
    num_orders: Count = Field(
        default=1,
        description="listwise: orders in which the candidates are shown; their points are averaged",
        json_schema_extra=JUDGED,
    )
    both_orders: bool = Field(
        default=True, description="pairs: each is asked about in both orders", json_schema_extra=JUDGED
    )
    schedule: Literal["all_pairs", "tournament"] = Field(
        default="all_pairs",
        description="every pair; or rounds in which the winners of the round before meet",
        json_schema_extra=JUDGED,
    )
    structured: Literal["auto", "json_schema", "none"] = Field(
        default="auto",
        description="request replies that fit a JSON schema: where the endpoint supports it, always, never",
        json_schema_extra=JUDGED,
    )
    batch: bool = Field(
        default=False, description="use the Batch API; what it leaves unanswered is asked live", json_schema_extra=COSTS
    )

    @property
    def question(self) -> tuple[object, ...]:
        """What tells its questions about the same responses from another judge's; no address is part of it."""
        length = None if self.form == "logprob" else self.max_tokens
        told = (self.model, self.form, self.rubric_name)
        extras = json.dumps(self.extras, sort_keys=True)
        return (*told, self.temperature, length, self.max_tokens_field, self.send_seed, extras)

    @property
    def rubric_name(self) -> str:
        """The rubric in use: the configured one, or the form's own."""
        own = {"listwise": "listwise_6point", "pairwise": "pairwise_verdict", "logprob": "pairwise_token"}
        return self.rubric or own[self.form]


class TeacherSection(ChatSection):
    """Who writes the gold responses that the data lacks."""

    temperature: float | None = Field(
        default=0.7, ge=0.0, description="None sends none", json_schema_extra=decides("teach")
    )
    top_p: float | None = Field(
        default=None, gt=0.0, le=1.0, description="None sends none", json_schema_extra=decides("teach")
    )
    system: str = Field(
        default="", description="a system message for prompts that have none", json_schema_extra=decides("teach")
    )


class AnnotationSection(Section):
    """Who is asked for preferences.

    oracle, table: embedded. python: a function of yours. openai: any chat.completions endpoint. ensemble: several of
    those. self: the policy through its own sampler. reward_model: a scalar reward model on the devices. given: the
    points that come with the data. gold: nobody, the teacher's response wins by definition (SPIN).
    """

    kind: Literal["oracle", "openai", "ensemble", "table", "python", "self", "reward_model", "given", "gold"] = Field(
        default="oracle", description="who is asked; see docs/annotation.md", json_schema_extra=JUDGED
    )
    oracle: OracleSection = OracleSection()
    openai: OpenAISection = OpenAISection()
    ensemble: tuple[OpenAISection, ...] = Field(default=(), description="their preferences are averaged")
    table: TableSection | None = None
    python: PythonSection | None = None
    self_judge: SelfSection = SelfSection()
    reward_model: RewardModelSection | None = None
    teacher: TeacherSection | None = Field(
        default=None, description="writes gold responses where the data has none", json_schema_extra=decides("teach")
    )
    store: PathStr | None = Field(
        default=None,
        description="sqlite file of verdicts, which runs may share; None: in the run directory",
        json_schema_extra=COSTS,
    )
    prices: dict[str, PriceSection] = Field(
        default={}, description="by model name, as in the configuration", json_schema_extra=COSTS
    )
    max_usd: float | None = Field(
        default=None,
        ge=0.0,
        description="what this run may spend on verdicts, held-out ones too, and teachers, all iterations; it stops "
        "before the call that would exceed it",
        json_schema_extra=COSTS,
    )
    quality: QualitySection = QualitySection()
    apart: bool = Field(
        default=False,
        description="`dno annotate` runs separately, on any machine with the same run directory; this run waits",
        json_schema_extra=COSTS,
    )
    show_reasoning: bool = Field(
        default=False,
        description="show a judge the thought (<think>) before an answer too",
        json_schema_extra=decides("annotate", "pair", "evaluate"),
    )
    max_failed: Fraction = Field(
        default=0.0,
        description="share of pools that may stay without a verdict (dropped and counted)",
        json_schema_extra=COSTS,
    )

    @model_validator(mode="after")
    def _what_the_kind_needs_is_there(self) -> AnnotationSection:
        if self.kind == "table" and self.table is None:
            raise ValueError("kind=table needs annotation.table with its answers and preferences")
        if self.kind == "python" and self.python is None:
            raise ValueError("kind=python needs annotation.python.function, such as my_judge:points")
        if self.kind == "reward_model" and self.reward_model is None:
            raise ValueError("kind=reward_model needs annotation.reward_model.path")
        if self.kind == "ensemble" and len(self.ensemble) < 2:
            raise ValueError(f"kind=ensemble with {len(self.ensemble)} in annotation.ensemble; expected two or more")
        if self.kind == "given" and self.teacher is not None:
            raise ValueError("kind=given with a teacher: nobody would give its responses points; remove one of them")
        questions = [judge.question for judge in self.ensemble]
        for number, question in enumerate(questions):
            if (before := questions.index(question)) < number:
                raise ValueError(
                    f"annotation.ensemble: {before} and {number} ask {self.ensemble[number].model!r} the same, and one "
                    "verdict would answer both: no address is part of a question. Serve them under names of their own "
                    "(vLLM: --served-model-name, llama.cpp: --alias), or give one another rubric, form or temperature"
                )
        return self

    @model_validator(mode="after")
    def _who_is_measured_can_be_asked(self) -> AnnotationSection:
        if self.nobody_judges:
            return self
        if self.quality.repeat and self.kind not in ("openai", "ensemble"):
            raise ValueError(
                f"quality.repeat={self.quality.repeat} asks an endpoint more than it must, and annotation.kind="
                f"{self.kind} has none (kinds that do: openai, ensemble); leave it out"
            )
        if self.quality.calibration and not self.is_judge:
            raise ValueError(
                f"quality.calibration={self.quality.calibration} holds a judge to labelled pairs, and annotation.kind="
                f"{self.kind} is not asked about any (kinds that are: oracle, openai, ensemble, table, python); leave "
                "it out"
            )
        return self

    @model_validator(mode="after")
    def _what_is_limited_has_a_price(self) -> AnnotationSection:
        self.refuse_missing_prices()
        return self

    def refuse_missing_prices(self) -> None:
        """
        Raises:
            ValueError: there is a limit, and a model without a price.
        """
        for chat in self.chats if self.max_usd is not None else ():
            if chat.model not in self.prices:
                raise ValueError(
                    f"max_usd={self.max_usd:g}, and annotation.prices has no {chat.model!r}: give its "
                    "{input: dollars per million prompt tokens, output: ...}, 0 for a server of your own"
                )

    def unread(self) -> set[str]:
        own = {"self": "self_judge"}.get(self.kind, self.kind)
        return {"oracle", "openai", "ensemble", "table", "python", "self_judge", "reward_model"} - {own}

    @property
    def judges(self) -> tuple[OpenAISection, ...]:
        """The endpoints that are asked for verdicts."""
        return {"openai": (self.openai,), "ensemble": self.ensemble}.get(self.kind, ())

    @property
    def chats(self) -> tuple[ChatSection, ...]:
        """Every model that is paid per token."""
        return (*self.judges, *((self.teacher,) if self.teacher else ()))

    @property
    def shows_reasoning(self) -> bool:
        """Whether thoughts are part of what is judged: points that come with the data are for all of a text."""
        return self.show_reasoning or self.kind == "given"

    @property
    def nobody_judges(self) -> bool:
        """Whether preferences come with the data, or by definition."""
        return self.kind in ("given", "gold")

    @property
    def on_devices(self) -> bool:
        """Whether it judges with the run's own devices, after sampling: no annotator of the host's."""
        return self.kind in ("self", "reward_model")

    @property
    def gives_scores(self) -> bool:
        """Whether verdicts are points per response, not wins per pair."""
        if self.kind == "openai":
            return self.openai.form == "listwise"
        if self.python is not None and self.kind == "python":
            return self.python.returns == "points"
        return self.kind in ("self", "given")

    @property
    def infers_preferences(self) -> bool:
        """Whether some pairs are never asked about."""
        return any(judge.form != "listwise" and judge.schedule == "tournament" for judge in self.judges)

    @property
    def is_judge(self) -> bool:
        """Whether it can compare any responses, of held-out prompts too."""
        return self.kind in ("oracle", "openai", "ensemble", "table", "python")
