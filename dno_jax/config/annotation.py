"""Who judges: the preference functions and how they are reached."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dno_jax.config.base import MAY_CHANGE, Count, Fraction, Section, absolute


def _rubric(name: str) -> str:
    return absolute(name) if name.endswith((".yaml", ".yml")) else name


Rubric = Annotated[str, AfterValidator(_rubric)]


class OpenAISection(Section):
    """Any chat.completions endpoint. The key itself never stands in a file: only the variable's name does."""

    model: str = Field(default="gpt-4.1-mini", min_length=1)
    base_url: str | None = Field(default=None, description="None is the client's default", json_schema_extra=MAY_CHANGE)
    api_key_env: str | None = Field(
        default="OPENAI_API_KEY",
        description="environment variable of the key; None for no key",
        json_schema_extra=MAY_CHANGE,
    )
    rubric: Rubric = Field(default="listwise_6point", description="built in, or a YAML file")
    temperature: float | None = Field(
        default=0.0, ge=0.0, description="None sends none: some models take no other than theirs"
    )
    max_tokens: Count = Field(default=2048, description="tokens of the longest reply")
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="what the endpoint calls it (reasoning models: max_completion_tokens)"
    )
    max_concurrency: Count = Field(default=32, json_schema_extra=MAY_CHANGE)
    max_tries: Count = Field(default=5, description="requests for one verdict in one run", json_schema_extra=MAY_CHANGE)
    timeout: float = Field(default=120.0, gt=0.0, description="seconds a request", json_schema_extra=MAY_CHANGE)


class OracleSection(Section):
    """The embedded preference: a majority over criteria, hence general (cycles exist) and deterministic."""

    criteria: tuple[str, ...] = ("relevance", "variety", "brevity")
    target_words: Count = Field(default=30, description="the length that 'brevity' likes best")

    @model_validator(mode="after")
    def _odd(self) -> OracleSection:
        if len(self.criteria) < 3 or len(self.criteria) % 2 == 0 or len(set(self.criteria)) != len(self.criteria):
            raise ValueError(f"criteria {self.criteria}: expected an odd number, at least three, none twice")
        return self


class TableSection(Section):
    """A preference over a few answers, known exactly: for games that a language model plays."""

    answers: tuple[str, ...] = Field(min_length=2, description="a response counts as the answer it begins with")
    preferences: tuple[tuple[float, ...], ...] = Field(
        description="P(row beats column) in [0, 1], as many rows and columns as answers; P + P^T = 1"
    )
    draws: bool = Field(
        default=True, description="each verdict is one draw, as a judge's is; false states the probability"
    )


class SelfSection(Section):
    """The policy judges its own responses (Self-Rewarding, arXiv 2401.10020: points averaged over 3 readings)."""

    rubric: Rubric = Field(default="additive_5point", description="built in, or a YAML file")
    num_judgements: Count = Field(default=3, description="readings of a response, whose points are averaged")
    max_prompt_length: Count = Field(default=2048, description="tokens of the longest judge prompt, template included")
    max_new_tokens: Count = Field(default=256, description="tokens of the longest reading")
    temperature: float = Field(default=0.7, ge=0.0)
    top_p: float = Field(default=0.9, gt=0.0, le=1.0)


class AnnotationSection(Section):
    """Who is asked for preferences.

    oracle, table: embedded. openai: any chat.completions endpoint. self: the policy through its own sampler. given: the
    points that come with the data. gold: nobody, the teacher's response wins by definition (SPIN).
    """

    kind: Literal["oracle", "openai", "table", "self", "given", "gold"] = "oracle"
    oracle: OracleSection = OracleSection()
    openai: OpenAISection = OpenAISection()
    table: TableSection | None = None
    self_judge: SelfSection = SelfSection()
    max_failed: Fraction = Field(
        default=0.0,
        description="share of pools that may stay without a verdict (dropped and counted)",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _table_is_there(self) -> AnnotationSection:
        if self.kind == "table" and self.table is None:
            raise ValueError("kind=table needs annotation.table with its answers and preferences")
        return self

    @property
    def gives_scores(self) -> bool:
        """Whether verdicts are points a response, not wins a pair."""
        return self.kind in ("openai", "self", "given")

    @property
    def is_judge(self) -> bool:
        """Whether it can compare any responses, of held-out prompts too."""
        return self.kind in ("oracle", "openai", "table")
