"""What files of prompts or examples hold, as `dno prompts check` shows it; nothing is stopped by one bad row."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dno_jax.annotation.refusals import is_refusal
from dno_jax.data.prompts import leaks, load_prompts
from dno_jax.data.reading import Reading, RowT, examples_of, prompts_of
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.records import Prompt


@dataclass
class Checked:
    """What was found.

    Attributes:
        prompts, examples: what was read as the one and as the other.
        counts: of prompts, gold responses, candidates, those with points, and examples.
        lengths: least, median, 95 % and most of a text's words, or of a prompt's tokens.
        dropped: what a run would leave out besides, by reason.
        leaked: held-out prompts that are trained on: (held out, trained).
        first: the first prompt, as it was understood.
        faults: what is wrong, each with its place.
    """

    prompts: Reading
    examples: Reading
    counts: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    leaked: list[tuple[Prompt, Prompt]] = field(default_factory=list)
    first: Prompt | None = None
    faults: list[str] = field(default_factory=list)


def check(
    paths: Sequence[str],
    *,
    held_out: Sequence[str] = (),
    tokenizer: ChatTokenizer | None = None,
    max_length: int | None = None,
) -> Checked:
    """Read files as prompts, and their answers as examples, and count.

    Args:
        held_out: files of prompts that must not be among these.
        tokenizer: with it, tokens are counted, and texts that spell control tokens.
        max_length: tokens of the longest prompt that a run takes.
    """
    found = Checked(Reading(paths, errors=[]), Reading(paths, errors=[]))
    counts, dropped = Counter(), found.dropped
    words: dict[str, array] = {name: array("q") for name in ("prompt", "answer", "prompt tokens")}
    kept: list[Prompt] = []
    for prompt in _until_it_breaks(prompts_of(read_rows(paths), found.prompts), found):
        found.first = found.first or prompt
        counts["prompts"] += 1
        counts["candidates"] += len(prompt.candidates)
        counts["scored"] += sum(item.score is not None for item in prompt.candidates)
        words["prompt"].append(sum(len(text.split()) for text in prompt.texts))
        if prompt.gold is not None:
            counts["gold"] += 1
            words["answer"].append(len(prompt.gold.split()))
            dropped["gold: empty"] += not prompt.gold.strip()
            dropped["gold: refuses in words"] += is_refusal(prompt.gold)
        if tokenizer is not None:
            dropped["gold: spells a control token"] += bool(prompt.gold and tokenizer.control_tokens(prompt.gold))
            dropped["gold: holds a token without an embedding"] += bool(tokenizer.rowless_tokens(prompt.gold or ""))
            if tokenizer.rowless_tokens(*prompt.texts):
                dropped["prompt: holds a token without an embedding"] += 1
            elif tokenizer.control_tokens(*prompt.texts):
                dropped["prompt: spells a control token"] += 1
            elif (count := _num_tokens(prompt, tokenizer, found)) is not None:
                words["prompt tokens"].append(count)
                dropped[f"prompt: above {max_length} tokens"] += max_length is not None and count > max_length
        if held_out:
            kept.append(prompt.model_copy(update={"candidates": (), "gold": None}))
    for _ in _until_it_breaks(examples_of(read_rows(paths), found.examples), found):
        counts["examples"] += 1
    found.counts = dict(counts)
    found.faults[:0] = found.prompts.errors or ()
    if not counts and not found.faults:
        found.faults.append("no prompts and no examples in it")
    found.dropped = +dropped
    found.lengths = {name: _spread(values) for name, values in words.items() if values}
    if held_out:
        found.leaked = leaks(load_prompts(list(held_out)), kept)
    return found


def _until_it_breaks(rows: Iterator[tuple[RowT, str]], found: Checked) -> Iterator[RowT]:
    """Yield rows without their places, up to where the file itself cannot be read."""
    try:
        for row, _ in rows:
            yield row
    except DnoError as error:
        if str(error) not in found.faults:
            found.faults.append(str(error))


def _num_tokens(prompt: Prompt, tokenizer: ChatTokenizer, found: Checked) -> int | None:
    try:
        return len(tokenizer.prompt_ids(prompt.messages, prompt.assistant_prefix))
    except DnoError as error:
        found.faults.append(f"prompt {prompt.prompt_id!r}: {error}")
        return None


def _spread(values: array) -> tuple[int, int, int, int]:
    least, median, most_of, most = np.quantile(np.asarray(values), (0, 0.5, 0.95, 1), method="nearest")
    return int(least), int(median), int(most_of), int(most)
