"""The prompts that are planned for: counted by the run's tokenizer, by a guess without one, or assumed by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from dno_jax.config import ModelConfigSection, RunConfig
from dno_jax.console import Meter
from dno_jax.data.prompts import PromptSplit, TokenizedPrompt, split_prompts, tokenize_prompts
from dno_jax.errors import DnoError
from dno_jax.model.hf import folder
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.records import Message, Prompt
from dno_jax.runtime.runtime import load_tokenizer
from dno_jax.stage_dir import is_lookahead

_LETTERS = 4  # of a token, where no tokenizer counts them
_AT_ONCE = 256  # prompts between two looks of the bar


@dataclass
class Texts:
    """
    Attributes:
        split: the prompts by iteration; None where they are not here and nobody says how many there are.
        tokenizer: None where there is none: tokens are guessed by letters.
        note: what was not read, to a person.
    """

    config: RunConfig
    split: PromptSplit | None
    tokenizer: ChatTokenizer | None
    note: str = ""
    _known: dict[int, tuple[list[TokenizedPrompt], Counter[str]]] = field(default_factory=dict)

    @property
    def count(self) -> Callable[[str], int]:
        """Tokens of a text."""
        return _guess if self.tokenizer is None else self.tokenizer.num_tokens

    def tokenized(self, part: tuple[Prompt, ...]) -> tuple[list[TokenizedPrompt], Counter[str]]:
        """Return what the run keeps of a part, and why it drops the rest."""
        if id(part) not in self._known:
            self._known[id(part)] = self._tokenized(part)
        return self._known[id(part)]

    def _tokenized(self, part: tuple[Prompt, ...]) -> tuple[list[TokenizedPrompt], Counter[str]]:
        longest = self.config.prompts.max_length
        kept: list[TokenizedPrompt] = []
        dropped: Counter[str] = Counter()
        with Meter("plan", total=len(part), unit="prompts", enabled=len(part) > 4 * _AT_ONCE) as meter:
            for first in range(0, len(part), _AT_ONCE):
                some = part[first : first + _AT_ONCE]
                if self.tokenizer is None:
                    ids = [min(sum(map(_guess, prompt.texts)), longest) for prompt in some]
                    kept += [TokenizedPrompt(p, _zeros(count)) for p, count in zip(some, ids, strict=True)]
                else:
                    found, reasons = tokenize_prompts(some, tokenizer=self.tokenizer, config=self.config)
                    kept, dropped = kept + found, dropped + reasons
                meter.advance(len(some))
        return kept, dropped


@cache  # their number alone is read, and 100,000 prompts need no tuples of their own
def _zeros(count: int) -> tuple[int, ...]:
    return (0,) * count


def _guess(text: str) -> int:
    return -(-len(text) // _LETTERS)


def texts_of(config: RunConfig, *, num_prompts: int | None = None, named_shape: bool = False) -> Texts:
    """Read what is here of a run's texts.

    Args:
        num_prompts: take so many prompts, each as long as it may be, and read none.
        named_shape: the model is a bundled one, so that its tokenizer, and the prompts, need not be here.

    Raises:
        DnoError: as `split_prompts`, unless the shape is a bundled one; or too few prompts.
    """
    notes, tokenizer = [], None
    if not named_shape and has_tokenizer(config.model):
        tokenizer = load_tokenizer(config.model)
    else:
        notes.append(f"no tokenizer was read: a token is taken for {_LETTERS} letters")
    if num_prompts is not None:
        notes.append(f"{num_prompts:,} prompts are assumed, each of the longest length")
        return Texts(config, _assumed(config, num_prompts), None, "; ".join(notes))
    try:
        split = split_prompts(config)
    except DnoError as error:
        if not named_shape:
            raise
        notes = [f"no prompts were counted ({error}); --prompts N assumes so many"]
        split = None
    return Texts(config, split, tokenizer, "; ".join(notes))


def has_tokenizer(section: ModelConfigSection) -> bool:
    """Whether a model's tokenizer is here."""
    place = folder(section.path)
    return any((place / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def _assumed(config: RunConfig, count: int) -> PromptSplit:
    section = config.prompts
    held_out = section.held_out or (500 if section.held_out_path else 0)
    sampling = sum(not is_lookahead(config, iteration) for iteration in range(config.iterations))
    parts = sampling if section.split == "disjoint" else 1
    if count < held_out + parts:
        raise DnoError(f"--prompts is {count}; {held_out} are held out, and {parts} iterations need one each at least")
    text = "text" * section.max_length
    message, gold = (Message(role="user", content=text),), "text" * config.sampling.max_new_tokens
    prompt = Prompt(prompt_id="assumed", messages=message, gold=gold)
    of_part = (count - held_out) // parts
    return PromptSplit(training=((prompt,) * of_part,) * sampling, held_out=(prompt,) * held_out)
