"""What every sampling engine takes and gives: prompts as token ids in, prompts with all their responses out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dno_jax.addresses import Purpose
from dno_jax.sampling.transforms import Truncation


@dataclass(frozen=True)
class SamplingParams:
    """What decides a generation besides weights and prompts; static, so each value compiles its own programs.

    Attributes:
        num_samples: K, responses per prompt.
        max_new_tokens: tokens of the longest response, its end id included.
        end_ids: ids that end a response.
        truncation: the sampling distribution.
        seed: of the run, the first part of every response's address.
        first_sample: number of the first of the K samples; others of one prompt then draw from other keys.
        num_ids: ids that may be drawn are below this, the tokenizer's count; further rows of the embedding are padding.
            None draws from all of it.
        max_total_tokens: tokens of prompt and response together; None leaves it to max_new_tokens.
        purpose: what is drawn: one that is for something else draws from other keys.

    Raises:
        ValueError: a count is not positive, or there is no end id.
    """

    num_samples: int
    max_new_tokens: int
    end_ids: tuple[int, ...]
    truncation: Truncation
    seed: int
    first_sample: int = 0
    num_ids: int | None = None
    max_total_tokens: int | None = None
    purpose: Purpose = Purpose.RESPONSE

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.end_ids:
            raise ValueError("end_ids is empty; expected at least one id that ends a response")


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        token_ids: of the whole prompt, at least one.
        name: 32 bits that stand for the prompt in the keys of its samples, in [0, 2**32).
        max_new_tokens: of its responses; None leaves it to the generation, whose limit no request can raise.
    """

    token_ids: tuple[int, ...]
    name: int
    max_new_tokens: int | None = None


def response_limit(request: Request, sampling_params: SamplingParams) -> int:
    """Return the most tokens that a request's response may have; below 1 where its prompt fills the total."""
    limits = [sampling_params.max_new_tokens]
    if request.max_new_tokens is not None:
        limits.append(request.max_new_tokens)
    if sampling_params.max_total_tokens is not None:
        limits.append(sampling_params.max_total_tokens - len(request.token_ids))
    return min(limits)


@dataclass(frozen=True)
class Response:
    """One sample of a prompt.

    Attributes:
        token_ids: generated ids, the end id included.
        logprobs: of each, log pi(token | prefix) in nats, at temperature 1 over the whole embedding, whatever was cut
            from what it was drawn from; None where an engine does not give them.
        drawn_logprobs: of each, under the distribution that it was drawn from; None unless asked for.
        finish: "stop" where an end id or a stop string ended it, "length" where a limit did.
        text: where the engine gives text of its own; None where the tokenizer is to decode the ids.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: Literal["stop", "length"]
    drawn_logprobs: tuple[float, ...] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Finished:
    """A prompt all of whose responses are there.

    Attributes:
        index: of its request, as they were given.
        responses: sample 0 first.
    """

    index: int
    responses: tuple[Response, ...]
