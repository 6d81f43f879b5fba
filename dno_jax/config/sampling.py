"""How candidates are drawn: by this program's sampler, or by a server of the exported policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dno_jax.config.base import COSTS, ROUNDS, SAMPLED, Count, Fraction, Section, Temperature, VariableName, decides
from dno_jax.config.mesh import MeshSection


class CompletionServerSection(Section):
    """A server of the exported policy with /v1/completions (vLLM, SGLang, llama.cpp's).

    The key itself never stands in a file: only the variable's name does.
    """

    model: str = Field(
        default="policy-{iteration}",
        min_length=1,
        description="name under which the server lists the policy; {iteration} becomes 000, 001, ...: without it, a "
        "server that still serves an older policy passes for the current one",
        json_schema_extra=COSTS,
    )
    base_url: str = Field(
        default="http://127.0.0.1:8000/v1",
        min_length=1,
        description="of its API; it usually ends in /v1",
        json_schema_extra=COSTS,
    )
    api_key_env: VariableName | None = Field(
        default=None,
        description="environment variable of the key; None for no key",
        json_schema_extra=COSTS,
    )
    logprobs: Literal["none", "processed", "raw"] = Field(
        default="none",
        description="what the server's log-probs are of. raw: the policy at temperature 1 (vLLM's default, llama.cpp, "
        "SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB). processed: what was drawn from, used only where sampling leaves "
        "the policy unchanged. none: they are not requested",
        json_schema_extra=decides("sample"),
    )
    max_concurrency: Count = Field(
        default=64, description="concurrent requests; each is one response", json_schema_extra=COSTS
    )
    max_tries: Count = Field(default=8, description="attempts per response", json_schema_extra=COSTS)
    timeout: float = Field(default=600.0, gt=0.0, description="seconds per request", json_schema_extra=COSTS)
    max_refused: Fraction = Field(
        default=0.0,
        description="share of an iteration's prompts (or the held-out ones) that may stay without responses because "
        "answers were refused (counted)",
        json_schema_extra=COSTS,
    )


class SamplingSection(Section):
    """How the candidates are drawn (the paper: K=5 from the policy, temperature 0.7, top-p 0.95)."""

    source: Literal["policy", "mixture", "data"] = Field(
        default="policy",
        description="policy t; the token-level mixture pi_t^(1-w) pi_ref^w (Algorithm 4, Option II); or the candidates "
        "that come with the prompt file (offline methods)",
        json_schema_extra=decides("sample"),
    )
    mixture_weight: Fraction | None = Field(
        default=None,
        description="w, the weight of the initial policy; None means tau/beta",
        json_schema_extra=decides("sample"),
    )
    num_opponents: int = Field(
        default=0,
        ge=0,
        description="further samples, from the mixture, used only as opponents (Nash-MD)",
        json_schema_extra=decides("sample"),
    )
    num_samples: int = Field(default=5, description="K", json_schema_extra=decides("sample"))
    max_new_tokens: Count = Field(default=512, description="tokens of the longest response", json_schema_extra=SAMPLED)
    temperature: Temperature = Field(
        default=0.7, description="0 is greedy; otherwise at least 1e-6", json_schema_extra=SAMPLED
    )
    top_k: int = Field(default=0, ge=0, description="0 keeps all", json_schema_extra=SAMPLED)
    top_p: float = Field(
        default=0.95,
        gt=0.0,
        le=1.0,
        description="draw from the likeliest tokens of this mass; 1.0: all",
        json_schema_extra=SAMPLED,
    )
    min_p: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="leave out tokens less likely than this share of the likeliest's",
        json_schema_extra=SAMPLED,
    )
    slots: Count | None = Field(
        default=None,
        description="rows decoded at once on each row shard of the mesh; None: as many as fit, see `dno plan`",
        json_schema_extra=ROUNDS,
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8", "float8_e4m3fn"] = Field(
        default="auto", description="dtype of the cached keys and values; auto: model.dtype", json_schema_extra=SAMPLED
    )
    mesh: MeshSection | None = Field(
        default=None,
        description="the devices laid out for decoding, where a policy is whole on data*fsdp and split over tensor; "
        "weights move once a stage. None: the run's mesh, or with as wide a tensor axis as its weights need",
    )
    chunk_steps: Count = Field(
        default=32, description="tokens drawn per slot between two looks of the host", json_schema_extra=ROUNDS
    )
    prefill_chunk: Count = Field(
        default=512, description="prompt tokens that go through the model at once", json_schema_extra=ROUNDS
    )
    shard_prompts: Count = Field(
        default=16,
        description="prompts per file of rollouts, the unit that is judged and processed together",
        json_schema_extra=SAMPLED,
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, description="penalty on ids in prompt or response; 1 means none", json_schema_extra=SAMPLED
    )
    stop: tuple[str, ...] = Field(
        default=(), description="strings that end a response; they are cut from its text", json_schema_extra=SAMPLED
    )
    max_total_tokens: Count | None = Field(
        default=None,
        description="bound on prompt and response together, the teacher's and the data's responses included",
        json_schema_extra=SAMPLED,
    )
    record_drawn_logprob: bool = Field(
        default=False,
        description="also keep each response's log-probability under the distribution it was drawn from",
        json_schema_extra=decides("sample"),
    )
    engine: Literal["jax", "openai"] = Field(
        default="jax",
        description="this program's sampler, or a server of the exported policy",
        json_schema_extra=SAMPLED,
    )
    server: CompletionServerSection = CompletionServerSection()
    audit_prompts: int = Field(
        default=1,
        ge=0,
        description="prompts per shard whose responses' log-probs are compared with the trainer's; 0 audits none",
        json_schema_extra=COSTS,
    )
    audit_bound: float | None = Field(
        default=None,
        gt=0.0,
        description="largest difference that counts as agreement, nats per token (sqrt(n) times that for n tokens); "
        "None follows model.dtype",
        json_schema_extra=COSTS,
    )
    as_reference: bool = Field(
        default=False,
        description="the sampler's log pi_t of its own responses is the reference: pairs of two such are not scored",
        json_schema_extra=ROUNDS,
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
        for text in self.stop:
            if "\ufffd" in text:
                raise ValueError(f"stop has {text!r}: U+FFFD stands for bytes that are no text, or none yet; remove it")
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
            raise ValueError(f"num_samples is {self.num_samples}; a preference pair needs K >= 2 samples per prompt")
        if self.num_opponents and self.source != "policy":
            raise ValueError(
                f"num_opponents is {self.num_opponents} with source={self.source}; opponents come besides samples of "
                "the policy: set source=policy, or num_opponents=0"
            )
        return self

    def unread(self) -> set[str]:
        return set() if self.engine == "openai" else {"server"}

    def response_limit(self, prompt_tokens: int) -> int:
        """Tokens of the longest response to a prompt of so many; at least 1 for every prompt that is sampled from."""
        total = self.max_total_tokens
        return self.max_new_tokens if total is None else min(self.max_new_tokens, total - prompt_tokens)
