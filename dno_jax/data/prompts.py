"""Prompts from the user's file: read, checked, split over iterations, tokenised."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etils import epath
from pydantic import ValidationError

from dno_jax.addresses import Purpose, name_bits, rng
from dno_jax.config import PromptsSection, RunConfig
from dno_jax.errors import DnoError
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.model.text.truncation import shorten_chat
from dno_jax.records import Message, Prompt, explain
from dno_jax.stage_dir import is_lookahead

_HALF = re.compile(r"[\ud800-\udfff]")  # half of a character, as JSON's \ud800 may spell one
_DEEPEST = 20  # levels of a row: the fields that a row may have need three


def load_prompts(path: str) -> list[Prompt]:
    """Read a JSONL file of Prompt rows, or of {"prompt": text, "gold": text?, "prompt_id"?: text} rows.

    Raises:
        DnoError: no such file, no prompts, a malformed row (file and line named), or an id that comes twice.
    """
    prompts = [_prompt(row, place=place) for row, place in read_rows(path)]
    if not prompts:
        raise DnoError(f"{path}: holds no prompts; expected one JSON object per line")
    counts = Counter(prompt.prompt_id for prompt in prompts)
    most, count = counts.most_common(1)[0]
    if count > 1:
        raise DnoError(f"{path}: prompt_id {most!r} comes {count} times; ids must be unique")
    return prompts


def read_rows(path: str) -> list[tuple[dict[str, Any], str]]:
    """Read JSON objects with their places ("file:line").

    Raises:
        DnoError: no such file, one that cannot be read, or a line that is no JSON object of whole characters.
    """
    file = epath.Path(path)
    try:
        if not file.exists():
            raise DnoError(f"{path}: no such file")
        lines = file.read_text(encoding="utf-8").split("\n")  # texts may have U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DnoError(f"{path}: cannot be read ({error}); expected UTF-8 JSON lines") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of 5000 digits is a ValueError
            raise DnoError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise DnoError(f"{place}: expected a JSON object, got {type(row).__name__}")
        _check_texts(row, place=place)
        rows.append((row, place))
    return rows


def with_messages(row: dict[str, Any]) -> dict[str, Any]:
    """Turn the short form {"prompt": text, ...} into {"messages": [...], ...}, with an id made of the text."""
    if "prompt" in row and "messages" not in row:
        row = {**row, "messages": [{"role": "user", "content": row["prompt"]}]}
        del row["prompt"]
    if "prompt_id" not in row and "messages" in row:
        parts = [row["messages"], *([row["assistant_prefix"]] if row.get("assistant_prefix") else [])]
        identity = ", ".join(json.dumps(part, sort_keys=True) for part in parts)
        row = {**row, "prompt_id": hashlib.sha256(identity.encode()).hexdigest()[:16]}
    return row


def _check_texts(value: Any, *, place: str, field: str = "", depth: int = 0) -> None:
    """Refuse halves of characters, which no tokenizer takes, and nesting that is too deep to be written again."""
    if isinstance(value, str) and (half := _HALF.search(value)):
        shown = value[max(0, half.start() - 20) : half.end() + 20]
        raise DnoError(
            f"{place}: {field}: {shown!r} holds {half[0]!r}, half of a surrogate pair; expected whole characters: "
            "write both halves, or remove this one"
        )
    if depth > _DEEPEST:
        raise DnoError(f"{place}: {field}: nested more than {_DEEPEST} deep; expected a prompt or an example")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_texts(name, place=place, field="a name")
            _check_texts(item, place=place, field=field or name, depth=depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, place=place, field=field, depth=depth + 1)


def _prompt(row: dict[str, Any], *, place: str) -> Prompt:
    try:
        return Prompt.model_validate(with_messages(row))
    except ValidationError as error:
        raise DnoError(f"{place}: not a valid prompt: {explain(error)}") from None


@dataclass(frozen=True)
class PromptSplit:
    training: tuple[tuple[Prompt, ...], ...]  # one part per iteration
    held_out: tuple[Prompt, ...]


def split_prompts(config: RunConfig) -> PromptSplit:
    """Set held-out prompts aside and give every iteration its part, as a function of the seed alone.

    Raises:
        DnoError: too few prompts, or a held-out prompt that is also trained on.
    """
    section: PromptsSection = config.prompts
    prompts = load_prompts(section.path)
    shuffled = [prompts[i] for i in rng(Purpose.PROMPT_SPLIT, config.seed).permutation(len(prompts))]
    if section.held_out_path:
        held_out = load_prompts(section.held_out_path)
        common = {p.prompt_id for p in prompts} & {p.prompt_id for p in held_out}
        if common:
            raise DnoError(f"{section.held_out_path}: prompt {min(common)!r} is also in {section.path}")
    else:
        held_out, shuffled = shuffled[: section.held_out], shuffled[section.held_out :]
    # DNO-Lookahead's last iteration samples nothing: no prompt is set aside for it.
    sampling = sum(not is_lookahead(config, iteration) for iteration in range(config.iterations))
    parts = sampling if section.split == "disjoint" else 1
    if len(shuffled) < parts:
        raise DnoError(
            f"{section.path}: {len(prompts)} prompts leave {len(shuffled)} to train on after {len(held_out)} held out; "
            f"{sampling} iterations with split={section.split} need at least {parts}"
        )
    training = [tuple(shuffled[part::parts]) for part in range(parts)] * (sampling // parts)
    return PromptSplit(training=tuple(training), held_out=tuple(held_out))


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
