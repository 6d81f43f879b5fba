"""`dno reward`: a Bradley-Terry reward model from preferences."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dno_jax.config.adapter import AdapterSection
from dno_jax.config.base import Count, DataPaths, PathStr, Section, contents, decides
from dno_jax.config.runs import OneTraining
from dno_jax.config.training import OptimizerSection, TrainingSection


class RewardPairsSection(Section):
    """Preferences: files of other people's, or what the judge of a run has said."""

    path: DataPaths | None = Field(
        default=None,
        description="prompts with two or more responses and their points, in any form of docs/data.md (chosen and "
        "rejected, completions, candidates): a file, a pattern, a dataset's id, or a list of them",
        json_schema_extra=contents("reward"),
    )
    run: PathStr | None = Field(
        default=None,
        description="a run directory in place of `path`: every pair of every pool that its judge has compared",
        json_schema_extra=contents("reward"),
    )
    iterations: tuple[int, ...] = Field(
        default=(), description="of `run`; empty: all that are judged", json_schema_extra=decides("reward")
    )
    score_temperature: float = Field(
        default=0.0,
        ge=0.0,
        description="what points mean; 0: the higher is preferred, equals are 1/2; above: P = sigma of their "
        "difference over it",
        json_schema_extra=decides("reward"),
    )
    held_out: int = Field(
        default=0,
        ge=0,
        description="prompts set aside to measure by",
        json_schema_extra=decides("reward"),
    )
    max_length: Count = Field(
        default=1024,
        description="tokens of the longest conversation with its response",
        json_schema_extra=decides("reward"),
    )
    too_long: Literal["error", "drop"] = Field(
        default="error",
        description="what happens to a pair with a longer one; drops are counted",
        json_schema_extra=decides("reward"),
    )

    @model_validator(mode="after")
    def _one_source(self) -> RewardPairsSection:
        if (self.path is None) == (self.run is None):
            raise ValueError(
                "give one of pairs.path (files of preferences) and pairs.run (a run directory whose verdicts are taken)"
            )
        if self.iterations and self.run is None:
            raise ValueError("pairs.iterations are those of pairs.run, and none is given: leave it out")
        if min(self.iterations, default=0) < 0:
            raise ValueError(f"pairs.iterations is {list(self.iterations)}; expected numbers from 0")
        return self


class RewardConfig(OneTraining):
    """A reward model: -log sigma(r(x, y_w) - r(x, y_l)) (the paper, section 2.1), all parameters trained."""

    adapter: ClassVar[AdapterSection | None] = None

    pairs: RewardPairsSection
    optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-5)
    training: TrainingSection = TrainingSection(num_epochs=1)

    @property
    def max_length(self) -> int:
        """Tokens of the longest text as it is trained on: with one more, behind which its reward is read."""
        return self.pairs.max_length + 1

    @model_validator(mode="after")
    def _whoever_judges_with_it_reads_chats_alike(self) -> RewardConfig:
        if self.model.chat_template == "raw":
            raise ValueError(
                "model.chat_template=raw: whoever judges with a reward model reads chats by the template in its "
                "directory, and raw has none; give 'tokenizer', or the path of a Jinja file"
            )
        if self.model.template_options:
            raise ValueError(
                "model.template_options: whoever judges with a reward model gives its template none; write them into a "
                "Jinja file for model.chat_template"
            )
        return self
