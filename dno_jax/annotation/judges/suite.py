"""A published suite's judge: two responses in an order that the suite decides, by the suite's own template if given."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dno_jax.annotation.judges.forms import FIVE_WAY, load_rubric
from dno_jax.annotation.judges.functions import PairWise
from dno_jax.annotation.judges.rubric import Rubric
from dno_jax.annotation.pool import Pool
from dno_jax.config import OpenAISection
from dno_jax.errors import DnoError
from dno_jax.records import Message

_BLOCK = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)\n?<\|im_end\|>", re.DOTALL)
_FIELD = re.compile(r"\{(instruction|output_1|output_2)\}")


class SuiteJudge(PairWise):
    """Shows each pair once, in the order that a function gives."""

    def __init__(
        self,
        section: OpenAISection,
        *,
        seed: int,
        place: str,
        shown: Callable[[Pool], tuple[int, int]],
        template: str | None = None,
    ):
        """
        Args:
            shown: indices of a pool's two candidates, the first shown first.
            template: path of the suite's own text in ChatML; None: the section's rubric.

        Raises:
            DnoError: an unreadable template or rubric.
        """
        super().__init__(section, seed=seed, place=place)
        self._shown = shown
        if template is not None:
            self.rubric = _read_template(template, self.rubric)

    @property
    def _plan(self) -> str:
        return "the suite's order"

    def _orders(self, pool: Pool, pair: tuple[int, int]) -> Iterator[tuple[int, int]]:
        yield self._shown(pool)


class FiveWayJudge(PairWise):
    """Arena-Hard's: each pair in both orders, with one of five verdicts, by our own words for what the suite asks."""

    def __init__(self, section: OpenAISection, *, seed: int, place: str):
        super().__init__(section, seed=seed, place=place)
        self.rubric = load_rubric(FIVE_WAY, place=place)

    @property
    def _plan(self) -> str:
        return "both orders"

    def _orders(self, pool: Pool, pair: tuple[int, int]) -> Iterator[tuple[int, int]]:
        yield pair
        yield pair[1], pair[0]


@dataclass(frozen=True)
class _Template(Rubric):
    """A request of fixed blocks, in which what others wrote is put once and never read as a template."""

    blocks: tuple[tuple[str, str], ...] = ()

    def messages(self, conversation: Sequence[Message], texts: Sequence[str]) -> list[dict[str, str]]:
        fields = {"instruction": conversation[-1].content, "output_1": texts[0], "output_2": texts[1]}
        return [
            {"role": role, "content": _FIELD.sub(lambda found: fields[found[1]], text)} for role, text in self.blocks
        ]


def _read_template(path: str, own: Rubric) -> Rubric:
    """
    Args:
        own: the rubric whose way of reading replies is kept.
    """
    try:
        data = Path(path).expanduser().read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DnoError(f"--template {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    blocks = tuple(_BLOCK.findall(text))
    shown = {name for _, block in blocks for name in _FIELD.findall(block)}
    if shown != {"instruction", "output_1", "output_2"}:
        missing = ", ".join(sorted({"instruction", "output_1", "output_2"} - shown))
        raise DnoError(
            f"--template {path}: expected ChatML blocks (<|im_start|>user ... <|im_end|>) that show {{instruction}}, "
            f"{{output_1}} and {{output_2}}, and ask for the name m or M; missing: {missing}"
        )
    return _Template(
        name=Path(path).stem,
        version="given",
        digest=hashlib.sha256(data).hexdigest(),
        system="",
        user="",
        titles=own.titles,
        reply_shape=own.reply_shape,
        read=own.read,
        schema=own.schema,
        optional=own.optional,
        blocks=blocks,
    )
