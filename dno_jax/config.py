"""The whole configuration: frozen pydantic models, read from YAML, overridden by `a.b=value`.

Names follow Hugging Face where one exists: num_x counts, max_x is an inclusive bound, x_id identifies. A relative path
is relative to the directory the command runs in. Nothing here imports jax.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dno_jax.errors import DnoError
from dno_jax.records import explain

# A field marked so may differ when a run directory is resumed: it changes cost, not results.
MAY_CHANGE: dict[str, Any] = {"may_change": True}


def _absolute(path: str) -> str:
    if not path:
        raise ValueError("an empty path")
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _rubric(name: str) -> str:
    return _absolute(name) if name.endswith((".yaml", ".yml")) else name


PathStr = Annotated[str, AfterValidator(_absolute)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
    chat_template: str = Field(
        default="tokenizer",
        description="'tokenizer' (its own), 'raw' (no template: a base model), or the path of a Jinja file",
    )


class MeshSection(Section):
    """Devices by mesh axis; one axis may be -1 and takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    @model_validator(mode="after")
    def _axes(self) -> MeshSection:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
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
    too_long: Literal["error", "drop"] = Field(
        default="error", description="what becomes of a longer prompt; drops are counted"
    )


class SamplingSection(Section):
    """How the K responses are drawn (the paper: K=5, temperature 0.7, top-p 0.95)."""

    num_samples: int = Field(default=5, description="K")
    max_new_tokens: Count = 512
    temperature: float = Field(default=0.7, ge=0.0, description="0 is greedy")
    top_k: int = Field(default=0, ge=0, description="0 keeps all")
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, lt=1.0)
    batch_prompts: Count = Field(default=16, description="prompts a call, over all devices; each becomes K rows")

    @model_validator(mode="after")
    def _pairs_need_two(self) -> SamplingSection:
        if self.num_samples < 2:
            raise ValueError(f"num_samples is {self.num_samples}; a preference pair needs K >= 2 samples a prompt")
        return self


class OpenAISection(Section):
    """Any chat.completions endpoint. The key itself never stands in a file: only the variable's name does."""

    model: str = Field(default="gpt-4.1-mini", min_length=1)
    base_url: str | None = Field(default=None, description="None is the client's default", json_schema_extra=MAY_CHANGE)
    api_key_env: str | None = Field(
        default="OPENAI_API_KEY",
        description="environment variable of the key; None for no key",
        json_schema_extra=MAY_CHANGE,
    )
    rubric: Annotated[str, AfterValidator(_rubric)] = Field(
        default="listwise_6point", description="built in, or a YAML file"
    )
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


class AnnotationSection(Section):
    kind: Literal["oracle", "openai"] = "oracle"
    oracle: OracleSection = OracleSection()
    openai: OpenAISection = OpenAISection()
    max_failed: Fraction = Field(
        default=0.0,
        description="share of pools that may stay without a verdict (dropped and counted)",
        json_schema_extra=MAY_CHANGE,
    )


class PairingSection(Section):
    """Section 5.1's rules. Floors and margins are in the unit of `reward`."""

    reward: Literal["score", "win_rate"] = Field(
        default="score", description="list-wise points, or mean win rate in the pool"
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
        if self.reward == "win_rate":
            for name in ("positive_floor", "margin", "student_margin"):
                if not 0.0 <= getattr(self, name) <= 1.0:
                    raise ValueError(f"{name} is {getattr(self, name)}, no win rate; with reward=win_rate give 0 to 1")
        total = sum(self.replay * self.replay_decay**age for age in range(64)) if self.replay_decay < 1 else self.replay
        if self.replay and total >= 1.0:
            raise ValueError(f"replay {self.replay} with decay {self.replay_decay} leaves no room for new pairs")
        return self


class LossSection(Section):
    name: Literal["dno"] = "dno"
    beta: float = Field(default=0.1, gt=0.0, description="the paper's eta-tilde: the KL coefficient of Eq. 13")

    if TYPE_CHECKING:  # pydantic gives frozen models one at run time, which type checkers do not see

        def __hash__(self) -> int: ...


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


class ReportSection(Section):
    tensorboard: bool = True


class RunConfig(Section):
    """One run of Algorithm 2 (DNO-Prct): T iterations from a checkpoint to a better checkpoint."""

    run_dir: PathStr = Field(json_schema_extra=MAY_CHANGE)
    seed: int = Field(default=0, ge=0, lt=2**31)
    iterations: Count = Field(default=3, description="T")
    model: ModelConfigSection
    mesh: MeshSection = Field(default=MeshSection(), json_schema_extra=MAY_CHANGE)
    prompts: PromptsSection
    sampling: SamplingSection = SamplingSection()
    annotation: AnnotationSection = AnnotationSection()
    pairing: PairingSection = PairingSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    report: ReportSection = Field(default=ReportSection(), json_schema_extra=MAY_CHANGE)

    @model_validator(mode="after")
    def _rooms_agree(self) -> RunConfig:
        if self.annotation.kind == "oracle" and self.pairing.reward == "score":
            raise ValueError("annotation.kind=oracle gives pairwise verdicts, no scores: set pairing.reward=win_rate")
        if self.prompts.held_out and self.prompts.held_out_path:
            raise ValueError("prompts.held_out and prompts.held_out_path are both given: choose one")
        return self

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence: prompt and response."""
        return self.prompts.max_length + self.sampling.max_new_tokens


class SftModelSection(ModelConfigSection):
    """Start from `path`, or, with `init_config`, from random weights and the tokenizer in `path`."""

    init_config: PathStr | None = Field(
        default=None, description="directory with a config.json: start from random weights of that shape"
    )


class SftDataSection(Section):
    path: PathStr = Field(description="JSONL of {messages, response} or {prompt, response} rows")
    max_length: Count = Field(default=512, description="tokens of the longest example; longer ones are an error")


class SftConfig(Section):
    """Supervised fine-tuning, the step before DNO (the paper: 3 epochs at 5e-6, prompt tokens masked)."""

    run_dir: PathStr = Field(json_schema_extra=MAY_CHANGE)
    seed: int = Field(default=0, ge=0, lt=2**31)
    model: SftModelSection
    mesh: MeshSection = Field(default=MeshSection(), json_schema_extra=MAY_CHANGE)
    data: SftDataSection
    optimizer: OptimizerSection = OptimizerSection(learning_rate=5e-6)
    training: TrainingSection = TrainingSection(num_epochs=3)
    report: ReportSection = Field(default=ReportSection(), json_schema_extra=MAY_CHANGE)


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, lay `a.b=value` overrides over it (values are YAML), and validate.

    Raises:
        DnoError: naming the file, the field's path, what was expected and, for an unknown field, the known ones.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise DnoError(f"{path}: no such configuration file") from None
    except yaml.YAMLError as error:
        raise DnoError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise DnoError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    for override in overrides:
        _lay_over(tree, override)
    return parse_config(kind, tree, place=str(path))


def parse_config(kind: type[ConfigT], tree: dict[str, Any], *, place: str) -> ConfigT:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        unknown = [item for item in error.errors() if item["type"] == "extra_forbidden"]
        hint = "".join(f"\n  {_known_fields(kind, item['loc'])}" for item in unknown)
        raise DnoError(f"{place}: {explain(error)}{hint}") from None


def _lay_over(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise DnoError(f"override {override!r}: expected a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DnoError(f"override {override!r}: the value is not valid YAML: {error}") from None
    *parents, leaf = name.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise DnoError(f"override {override!r}: {parent} is a value, not a section")
        tree = below
    tree[leaf] = value


def _known_fields(kind: type[Section], loc: Iterable[Any]) -> str:
    *parents, leaf = loc
    for parent in parents:
        annotation = kind.model_fields[parent].annotation if parent in kind.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            break
        kind = annotation
    return f"{leaf!r} is unknown; known here: {', '.join(kind.model_fields)}"


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_digest(config: Section) -> str:
    """Identity of everything that decides results (fields that may change are left out)."""
    return hashlib.sha256(json.dumps(_deciding(config), sort_keys=True).encode()).hexdigest()


def changed_fields(old: Section, new: Section) -> list[str]:
    """Dotted names of the deciding fields in which two configurations differ, with both values."""
    before, after = _flat(_deciding(old)), _flat(_deciding(new))
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in names]


def _deciding(config: Section) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("may_change"):
            continue
        value = getattr(config, name)
        tree[name] = _deciding(value) if isinstance(value, Section) else value
    return json.loads(json.dumps(tree))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
