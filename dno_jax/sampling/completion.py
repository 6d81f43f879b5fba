"""What is asked of a completion server, and the strict reading of its answer.

Servers differ in what they say beyond OpenAI's fields, all of which is read where it is there:

- vLLM and SGLang return the drawn ids (`return_token_ids`) and what ended a response (`stop_reason`, `matched_stop`);
- llama.cpp's server returns ids with log-probs;
- a server that returns none is read by its text, which our tokenizer makes ids of. That is only right where the model
  drew those very ids, so text and count of tokens must both come back the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dno_jax.addresses import Purpose, integer
from dno_jax.config import CompletionServerSection
from dno_jax.errors import DnoError
from dno_jax.sampling.requests import Request, Response, SamplingParams
from dno_jax.sampling.transforms import Truncation


class Refused(Exception):
    """An answer that is no sample of the policy, or not surely one; the text says why, and counts are kept by it."""


@dataclass(frozen=True)
class Codec:
    """The student's tokenizer.

    Attributes:
        encode: (index of a request, text) -> ids of that text as a response to it, without an end id.
        decode: (index of a request, ids) -> text.
        text_ids: what the tokenizer makes of a text of its own accord, with its begin token if it has one.
    """

    encode: Callable[[int, str], Sequence[int]]
    decode: Callable[[int, Sequence[int]], str]
    text_ids: Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Task:
    """What is drawn for every prompt alike, from whom, and the tokenizer that reads it.

    Attributes:
        section: of the server.
        sampling_params: `end_ids` are sent as stop_token_ids; ids from `num_ids` on are refused.
        iteration: of the policy that is to be served; part of each seed, and of the model's name where it asks for it.
        stop: strings that end a response. The text is then cut before the string, and the ids are not.
    """

    section: CompletionServerSection
    sampling_params: SamplingParams
    codec: Codec
    iteration: int
    stop: tuple[str, ...] = ()

    @property
    def takes_logprobs(self) -> bool:
        """Whether the server's log-probs are the policy's own, at temperature 1."""
        of_what, drawn_from = self.section.logprobs, self.sampling_params.truncation
        return of_what == "raw" or (of_what == "processed" and drawn_from == Truncation(temperature=1.0))


@dataclass(frozen=True)
class Answer:
    """A completion as the server told it; None is what it did not tell.

    Attributes:
        by_string: whether the server says that a stop string ended it.
        end_id: the id that ended it; None also where that was the usual one.
        tells_stop: whether the server says what ended a response.
        completion_tokens: drawn tokens; servers count the end id or do not.
    """

    text: str
    finish: str | None
    token_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    by_string: bool
    end_id: int | None
    tells_stop: bool
    prompt_token_ids: tuple[int, ...] | None
    prompt_tokens: int | None
    completion_tokens: int | None


def request_seed(*, seed: int, iteration: int, prompt: int, sample: int, redraw: int) -> int:
    """Return the seed of one response, made of nothing but its address; below 2**31, which every server takes.

    Args:
        seed, iteration: of the run.
        prompt: 32 bits that name the prompt.
        sample: index of the sample.
        redraw: answers for it that were refused before.
    """
    return integer(Purpose.SERVED_RESPONSE, seed, iteration, prompt, sample, redraw, below=2**31)


def sampling_fields(task: Task) -> dict[str, Any]:
    """Return the fields that all requests share.

    Every knob is sent, also one that does nothing: servers have defaults of their own, and vLLM and SGLang take them
    from the checkpoint's generation_config.json.
    """
    truncation, logprobs = task.sampling_params.truncation, task.section.logprobs != "none"
    return {
        "n": 1,
        "temperature": truncation.temperature,
        "top_p": truncation.top_p,
        **({"stop": list(task.stop)} if task.stop else {}),
        **({"logprobs": 1} if logprobs else {}),
        "top_k": truncation.top_k or -1,
        "min_p": truncation.min_p,
        "repetition_penalty": truncation.repetition_penalty,
        "stop_token_ids": list(task.sampling_params.end_ids),
        "return_token_ids": True,
        # llama.cpp's names, and our order: its own cuts before it divides by the temperature.
        "repeat_penalty": truncation.repetition_penalty,
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        **({"n_probs": 1} if logprobs else {}),
    }


def parse_answer(text: str) -> Answer | None:
    """Read the body of a 200; None if it is anything but one completion."""
    try:
        body = json.loads(text)
        (choice,) = body["choices"]
        if not isinstance(choice["text"], str):
            return None
        usage = body.get("usage") or {}
        token_ids, logprobs = _ids_and_logprobs(choice)
        finish = choice.get("finish_reason")
        stopped_by = choice.get("stop_reason", choice.get("matched_stop"))
        return Answer(
            text=choice["text"],
            finish=finish if isinstance(finish, str) else None,
            token_ids=token_ids,
            logprobs=logprobs,
            by_string=isinstance(stopped_by, str),
            end_id=_integer(stopped_by),
            tells_stop="stop_reason" in choice or "matched_stop" in choice,
            prompt_token_ids=_integers(choice.get("prompt_token_ids")),
            prompt_tokens=_integer(usage.get("prompt_tokens")),
            completion_tokens=_integer(usage.get("completion_tokens")),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def check_prompt(answer: Answer, request: Request) -> None:
    """See that the server read the very prompt it was sent.

    Raises:
        DnoError: it did not.
    """
    sent = len(request.token_ids)
    read = answer.prompt_tokens if answer.prompt_token_ids is None else len(answer.prompt_token_ids)
    altered = answer.prompt_token_ids is not None and answer.prompt_token_ids != request.token_ids
    if altered or read not in (None, sent):
        raise DnoError(
            f"sampling.server: a prompt of {sent} token ids was sent, and the server read another of {read}; it must "
            "take prompts as they are: serve /v1/completions without a template of its own and without adding BOS to "
            "ids, with the tokenizer files that were exported with the policy"
        )


def check_text(answer: Answer, ours: Sequence[int]) -> bool:
    """See that the server's tokenizer makes of a text what ours does, but for a begin token.

    Returns:
        Whether the server said enough to see it.

    Raises:
        DnoError: its tokenizer is another one.
    """
    ours, theirs = tuple(ours), answer.prompt_token_ids
    if theirs is not None:
        same = theirs in (ours, ours[1:]) or theirs[1:] == ours
        said = f"{len(theirs)} ids {_few(theirs)}"
    elif answer.prompt_tokens is not None:
        same = abs(answer.prompt_tokens - len(ours)) <= 1
        said = f"{answer.prompt_tokens} ids"
    else:
        return False
    if not same:
        raise DnoError(
            f"sampling.server: the server's tokenizer makes {said} of a text that ours makes {len(ours)} ids "
            f"{_few(ours)} of; serve the exported policy with the tokenizer files that were exported with it"
        )
    return True


def read_response(answer: Answer, index: int, *, task: Task, limit: int) -> Response:
    """Make a response of an answer whose `finish` is "stop" or "length".

    Args:
        index: of the request.
        limit: the most tokens that it may have.

    Raises:
        Refused: it is no sample of the policy, or not surely one.
        DnoError: the server does what no further request can fix.
    """
    if task.stop and answer.finish == "stop" and not _says_what_stopped(answer, task.sampling_params):
        raise DnoError(
            "sampling.server: the server does not say whether a stop string or the end id ended a response; use one "
            "that returns stop_reason (vLLM) or matched_stop (SGLang), or set sampling.stop=[]"
        )
    response = _from_text(answer, index, task=task) if answer.token_ids is None else _from_ids(answer, task=task)
    if len(response.token_ids) > limit:
        raise Refused("longer than it may be")
    drawn = answer.completion_tokens if answer.token_ids is None else len(answer.token_ids)
    if response.finish == "length" and drawn is None and len(response.token_ids) != limit:
        raise Refused("text of other tokens than were drawn")
    if response.finish == "length" and drawn is not None and drawn < limit:
        raise DnoError(
            f"sampling.server: the server cut a response after {drawn} tokens, where {limit} were asked for; start it "
            "with room for the longest prompt and its response (vLLM: --max-model-len)"
        )
    return response


def _says_what_stopped(answer: Answer, sampling_params: SamplingParams) -> bool:
    ended = bool(answer.token_ids) and answer.token_ids[-1] in sampling_params.end_ids
    return answer.tells_stop or ended


def _from_ids(answer: Answer, *, task: Task) -> Response:
    ids, sampling_params = answer.token_ids or (), task.sampling_params
    logprobs = answer.logprobs if task.takes_logprobs else None
    if not ids:
        raise Refused("empty")
    num_ids = sampling_params.num_ids
    if any(token < 0 or (num_ids is not None and token >= num_ids) for token in ids):
        raise Refused("ids that the tokenizer does not have")
    by_string = answer.finish == "stop" and answer.by_string
    ends = [position for position, token in enumerate(ids) if token in sampling_params.end_ids]
    if ends:  # a server that continues after an end id has drawn the same response up to there
        ids, finish, by_string = ids[: ends[0] + 1], "stop", False
    elif answer.finish == "stop" and not by_string:
        ids, finish = (*ids, _end_id(answer, sampling_params)), "stop"
    else:
        finish = answer.finish
    if logprobs is not None:
        logprobs = logprobs[: len(ids)] if len(logprobs) >= len(ids) else None
    return Response(
        token_ids=ids,
        logprobs=logprobs,
        finish="stop" if finish == "stop" else "length",
        text=answer.text if by_string else None,
    )


def _end_id(answer: Answer, sampling_params: SamplingParams) -> int:
    """Return the end id that a server ended by and did not return."""
    if answer.end_id is None:
        return sampling_params.end_ids[0]
    if answer.end_id not in sampling_params.end_ids:
        raise DnoError(
            f"sampling.server: the server ended a response by id {answer.end_id}, and the policy's end ids are "
            f"{list(sampling_params.end_ids)}; serve the generation_config.json that was exported with the policy"
        )
    return answer.end_id


def _from_text(answer: Answer, index: int, *, task: Task) -> Response:
    ids = _ids_of(answer.text, index, codec=task.codec)
    ended = answer.finish == "stop"
    by_string = ended and answer.by_string
    # Servers count the end id or do not. A stop string is counted, but cut from the text: there, any higher count may
    # be right.
    count, fewest = answer.completion_tokens, len(ids)
    most = math.inf if by_string else fewest + ended
    if count is not None and not fewest <= count <= most:
        raise Refused("text of other tokens than were drawn")
    if ended and not by_string:
        ids = (*ids, _end_id(answer, task.sampling_params))
    return Response(token_ids=ids, logprobs=None, finish="stop" if ended else "length", text=answer.text)


def _ids_of(text: str, index: int, *, codec: Codec) -> tuple[int, ...]:
    """Return the ids that our tokenizer makes of a response's text, where it gives the same text back."""
    if not text:
        raise Refused("empty")
    if "\ufffd" in text:
        raise Refused("text with a broken character")
    try:
        ids = tuple(codec.encode(index, text))
    except DnoError:
        ids = ()
    if not ids:
        raise Refused("text that our tokenizer does not take")
    if codec.decode(index, ids) != text:
        raise Refused("text that our tokenizer does not give back")
    return ids


def _ids_and_logprobs(choice: dict[str, Any]) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    token_ids, given = _integers(choice.get("token_ids")), choice.get("logprobs")
    if not isinstance(given, dict):
        return token_ids, None
    if isinstance(given.get("content"), list):  # llama.cpp's
        if token_ids is None and all("id" in item for item in given["content"]):
            token_ids = _integers([item["id"] for item in given["content"]])
        values = [item["logprob"] for item in given["content"]]
    else:
        values = given.get("token_logprobs")
    return token_ids, _logprobs(values, count=None if token_ids is None else len(token_ids))


def _logprobs(values: Any, *, count: int | None) -> tuple[float, ...] | None:
    """Take numbers that can be log-probs of drawn tokens, one each; servers write -9999 and the like for -inf."""
    if not isinstance(values, list) or len(values) != count:
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) and -1e3 < value < 1e-3 for value in values):
        return None
    return tuple(float(value) for value in values)


def _integers(values: Any) -> tuple[int, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError("no list of ids")
    return tuple(values)


def _integer(value: Any) -> int | None:
    return value if type(value) is int else None


def _few(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"
