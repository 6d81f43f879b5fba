"""Prompts from the user's files: read, checked, split over iterations, tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dno_jax.addresses import Purpose, name_bits, rng
from dno_jax.config import PromptsSection, RunConfig
from dno_jax.data.reading import Reading, prompts_of, words_of
from dno_jax.data.sources import named, read_rows
from dno_jax.errors import DnoError
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.model.text.truncation import shorten_chat
from dno_jax.records import Message, Prompt
from dno_jax.stage_dir import is_lookahead


def load_prompts(paths: str | Sequence[str]) -> list[Prompt]:
    """Read the prompts of files in any form of docs/data.md.

    Raises:
        DnoError: no such file, no prompts, a malformed row (file and line named), or an id that comes twice.
    """
    return read_prompts(paths)[0]


def read_prompts(paths: str | Sequence[str], *, candidates: bool = True) -> tuple[list[Prompt], str]:
    """Read prompts, and say in one line what they were taken for; raises as `load_prompts` does.

    Args:
        candidates: bring the responses that come with forms of others.
    """
    reading = Reading(paths)
    prompts = [prompt for prompt, _ in prompts_of(read_rows(paths), reading, candidates=candidates)]
    if not prompts:
        why = "".join(f"; {count} x {reason}" for reason, count in reading.left_out.items())
        raise DnoError(f"{named(paths)}: holds no prompts; expected one JSON object per line, or Parquet{why}")
    gold = sum(prompt.gold is not None for prompt in prompts)
    return prompts, reading.line(f"{len(prompts):,} prompts ({gold:,} with gold)")


@dataclass(frozen=True)
class PromptSplit:
    """A run's prompts.

    Attributes:
        training: one part per iteration.
        lines: what the files were taken for.
    """

    training: tuple[tuple[Prompt, ...], ...]
    held_out: tuple[Prompt, ...]
    lines: tuple[str, ...] = ()


def split_prompts(config: RunConfig) -> PromptSplit:
    """Set held-out prompts aside and give every iteration its part, as a function of the seed alone.

    Raises:
        DnoError: too few prompts, or a held-out prompt that is also trained on.
    """
    section: PromptsSection = config.prompts
    offline = config.sampling.source == "data" or config.annotation.kind == "given"
    prompts, line = read_prompts(section.path, candidates=offline)
    lines = [line]
    shuffled = [prompts[i] for i in rng(Purpose.PROMPT_SPLIT, config.seed).permutation(len(prompts))]
    if section.held_out_path:
        held_out, line = read_prompts(section.held_out_path, candidates=offline)
        lines.append(line)
    else:
        held_out, shuffled = shuffled[: section.held_out], shuffled[section.held_out :]
    refuse_leaks(held_out, shuffled, place=named(section.held_out_path or section.path), trained=named(section.path))
    # DNO-Lookahead's last iteration samples nothing: no prompt is set aside for it.
    sampling = sum(not is_lookahead(config, iteration) for iteration in range(config.iterations))
    parts = sampling if section.split == "disjoint" else 1
    if len(shuffled) < parts:
        raise DnoError(
            f"{named(section.path)}: {len(prompts)} prompts leave {len(shuffled)} to train on after {len(held_out)} "
            f"held out; {sampling} iterations with split={section.split} need at least {parts}"
        )
    training = [tuple(shuffled[part::parts]) for part in range(parts)] * (sampling // parts)
    return PromptSplit(training=tuple(training), held_out=tuple(held_out), lines=tuple(lines))


def leaks(held_out: Sequence[Prompt], trained: Sequence[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """Return held-out prompts with the first trained one of the same words, or of the same id."""
    words, ids = [words_of(prompt) for prompt in held_out], [prompt.prompt_id for prompt in held_out]
    wanted: set[bytes | str] = {*words, *ids}
    found: dict[bytes | str, Prompt] = {}
    for other in trained if wanted else ():
        for name in {words_of(other), other.prompt_id} & wanted:
            found.setdefault(name, other)
    matches = (found.get(word) or found.get(name) for word, name in zip(words, ids, strict=True))
    return [(prompt, other) for prompt, other in zip(held_out, matches, strict=True) if other is not None]


def refuse_leaks(held_out: Sequence[Prompt], prompts: Sequence[Prompt], *, place: str, trained: str) -> None:
    """Refuse prompts that are held out and trained on.

    Raises:
        DnoError: there are some, by their words or ids.
    """
    if found := leaks(held_out, prompts):
        prompt, other = found[0]
        text = prompt.messages[-1].content
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise DnoError(
            f"{place}: held-out prompt {prompt.prompt_id!r}{others}, {text[:60]!r}, is also in {trained}, as "
            f"{other.prompt_id!r}: a policy would be measured on what it was trained on; remove it from one of them "
            "(dno prompts check --held-out lists all)"
        )


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt with its ids; where it was truncated, `prompt` holds the messages that are left.

    Attributes:
        opens_thought: whether the ids end inside a thought, in which a response then begins.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    truncated: bool = False
    opens_thought: bool = False

    @property
    def name(self) -> int:
        """32 bits that name the prompt in the sampler's keys."""
        return name_bits(self.prompt.prompt_id)

    @property
    def text_ids_before(self) -> tuple[int, ...]:
        """What a response's text continues: the prompt where the assistant has begun, else nothing."""
        return self.token_ids if self.prompt.assistant_prefix else ()


@dataclass(frozen=True)
class TokenizedPart:
    """The prompts of one part that can be sampled from, in order of length, and why others cannot, by reason."""

    kept: tuple[TokenizedPrompt, ...]
    dropped: Counter[str]


class PromptSet:
    """A run's prompts: the file is read once, when it is first asked for, and every prompt is tokenised once."""

    def __init__(self, config: RunConfig, tokenizer: ChatTokenizer):
        self._config = config
        self._tokenizer = tokenizer
        self._parts: dict[int, TokenizedPart] = {}  # by identity: iterations that share their prompts share one

    @cached_property
    def split(self) -> PromptSplit:
        return split_prompts(self._config)

    def training(self, iteration: int) -> TokenizedPart:
        """Iteration t's part."""
        return self.tokenized(self.split.training[iteration])

    @property
    def held_out(self) -> TokenizedPart:
        return self.tokenized(self.split.held_out)

    def tokenized(self, part: tuple[Prompt, ...]) -> TokenizedPart:
        if id(part) not in self._parts:
            kept, dropped = tokenize_prompts(part, tokenizer=self._tokenizer, config=self._config)
            self._parts[id(part)] = TokenizedPart(tuple(kept), dropped)
        return self._parts[id(part)]


def tokenize_prompts(
    prompts: Sequence[Prompt], *, tokenizer: ChatTokenizer, config: RunConfig
) -> tuple[list[TokenizedPrompt], Counter[str]]:
    """Tokenise, and sort by length (then id) so that a batch holds prompts of like length.

    A prompt that spells a control token is dropped: tokenised, its words would end turns and begin others. So is one
    that holds a token which the model has no embedding of.

    Raises:
        DnoError: a prompt is longer than prompts.max_length, or leaves no token of sampling.max_total_tokens to a
            response, and too_long is "error"; or the template refuses it.
    """
    kept: list[TokenizedPrompt] = []
    dropped: Counter[str] = Counter()
    for prompt in prompts:
        if tokenizer.rowless_tokens(*prompt.texts):
            dropped["prompt holds a token without an embedding"] += 1
        elif tokenizer.control_tokens(*prompt.texts):
            dropped["prompt spells a control token"] += 1
        elif found := _tokenized(prompt, tokenizer=tokenizer, config=config):
            kept.append(found)
        else:
            dropped["prompt too long"] += 1
    kept.sort(key=lambda item: (len(item.token_ids), item.prompt.prompt_id))
    return kept, dropped


def _tokenized(prompt: Prompt, *, tokenizer: ChatTokenizer, config: RunConfig) -> TokenizedPrompt | None:
    section, total = config.prompts, config.sampling.max_total_tokens
    longest = section.max_length if total is None else min(section.max_length, total - 1)

    def encode(messages: Sequence[Message]) -> tuple[int, ...]:
        try:
            return tokenizer.prompt_ids(messages, prompt.assistant_prefix)
        except DnoError as error:
            raise DnoError(f"prompt {prompt.prompt_id!r}: {error}") from None

    ids = encode(prompt.messages)
    if len(ids) <= longest:
        return TokenizedPrompt(prompt, ids, opens_thought=tokenizer.opens_thought(ids))
    if section.too_long == "error":
        limit = f"prompts.max_length is {section.max_length}"
        if longest < section.max_length:
            limit = f"sampling.max_total_tokens is {total}, of which a response needs one at least"
        raise DnoError(
            f"prompt {prompt.prompt_id!r} has {len(ids)} tokens, {limit}; raise it, shorten the prompt, or set "
            "prompts.too_long=drop (or truncate)"
        )
    if section.too_long == "drop":
        return None
    left = shorten_chat(prompt.messages, max_length=longest, count=lambda chat: len(encode(chat)))
    if left is None:
        return None
    ids = encode(left)
    shortened = prompt.model_copy(update={"messages": left})
    return TokenizedPrompt(shortened, ids, truncated=True, opens_thought=tokenizer.opens_thought(ids))
