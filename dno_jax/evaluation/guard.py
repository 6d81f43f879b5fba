"""Questions with checkable answers: which responses are right, and whether a policy answers fewer than before."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

from dno_jax.statistics import Tally

Check = Literal["number", "choice", "exact", "contains"]
CHECKS: tuple[Check, ...] = ("number", "choice", "exact", "contains")

# A sign after a digit or a bracket takes away. A fraction is one number, a date is none.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?"
    r"(?:(?<![\d/.,])\d+/(?=\d*[1-9])\d+(?![/.,]?\d)|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
)
# "I" and "A" before a word in small letters are words themselves, but for "A is right".
_CHOICE = re.compile(
    r"(?<![A-Za-z'])\(?(?:([B-HJ])|([AI])(?![ \t]+(?!(?:is|was|because|since|as|and|or)\b)[a-z]))\)?(?![A-Za-z'])"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_SPELT = (
    (re.compile("[\u2212\u2010-\u2013]"), "-"),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,|[\u00a0\u2009\u202f])(?=\d{3})"), ","),
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"\1/\2"),
)


def check_of(answers: Sequence[str]) -> Check:
    """Return how answers are checked by default: numbers as numbers, a capital letter as a choice, else as words."""
    if all(_NUMBER.fullmatch(_spelt(answer).strip().lstrip("$€£¥").rstrip("%.")) for answer in answers):
        return "number"
    return "choice" if all(re.fullmatch(r"[A-J]", answer.strip()) for answer in answers) else "contains"


def is_right(response: str, answers: Sequence[str], check: Check) -> bool:
    """Return whether a response gives one of the answers.

    number: the last number in it is equal; choice: its last letter from A to J that stands alone; exact: its words, but
    for case, blanks and a full stop; contains: the answer stands in it as words. Of a response that puts its answer
    into \\boxed{} or behind ####, that is looked at alone.
    """
    said = final(response)
    match check:
        case "number":
            value = _value(said)
            return value is not None and any(value == _value(one) for one in answers)
        case "choice":
            letters = ["".join(found) for found in _CHOICE.findall(said)]
            return bool(letters) and letters[-1] in {one.strip() for one in answers}
        case "exact":
            return _plain(said) in {_plain(one) for one in answers}
        case "contains":
            words = f" {_words(said)} "
            return any(f" {_words(one)} " in words for one in answers if _words(one))


def final(text: str) -> str:
    """Return what a text gives as its answer: the last \\boxed{...} of it, or what stands behind ####; else all."""
    if boxed := _BOXED.findall(text):
        return boxed[-1]
    return text.rsplit("####", 1)[-1]


def _value(text: str) -> Fraction | None:
    """The last number of a text, exactly."""
    found = _NUMBER.findall(_spelt(text))
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").partition("/")
    return Fraction(Decimal(above)) / int(below or 1)


def _spelt(text: str) -> str:
    """The text with its signs, thousands and fractions as a keyboard has them."""
    for pattern, spelt in _SPELT:
        text = pattern.sub(spelt, text)
    return text


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


@dataclass(frozen=True)
class Fall:
    """A policy that answers fewer questions right than an earlier one; the 95 % interval lies below 0.

    Attributes:
        before, now: shares of right answers.
        low, high: of the difference, over questions.
    """

    policy: int
    earlier: int
    before: float
    now: float
    low: float
    high: float

    @property
    def sentence(self) -> str:
        return (
            f"the guard's questions: policy {self.policy} answers {100 * self.now:.1f} % right, policy {self.earlier} "
            f"answered {100 * self.before:.1f} % (difference {100 * self.low:+.1f} to {100 * self.high:+.1f} points): "
            "it forgets what the judge does not ask about; stop earlier, raise loss.beta, or mix in such prompts."
        )


def guard_figures(right: Mapping[int, Mapping[str, Sequence[bool]]]) -> dict[str, Any]:
    """Return each policy's share of right answers with its interval, and the newest policy's falls.

    Args:
        right: policy -> question -> of each answer whether it is right; policies answer the same questions.
    """
    tallies = {policy: _tally(own) for policy, own in right.items()}
    newest = max(right)
    earlier = {min(right), *([max(before, key=lambda p: (tallies[p].mean, p))] if (before := _before(right)) else [])}
    falls = [found for policy in sorted(earlier - {newest}) if (found := _fall(right, newest, policy))]
    return {
        "accuracy": {str(policy): tally.share().as_dict() for policy, tally in sorted(tallies.items())},
        "falls": [asdict(fall) for fall in falls],
        "warnings": [fall.sentence for fall in falls],
    }


def _before(right: Mapping[int, Any]) -> list[int]:
    return [policy for policy in right if policy < max(right)]


def _tally(own: Mapping[str, Sequence[bool]]) -> Tally:
    tally = Tally()
    for answers in own.values():
        tally.add(sum(answers), len(answers))
    return tally


def _fall(right: Mapping[int, Mapping[str, Sequence[bool]]], policy: int, earlier: int) -> Fall | None:
    now, before = right[policy], right[earlier]
    both = [name for name in now if now[name] and before.get(name)]
    difference = Tally()
    for name in both:
        difference.add(sum(now[name]) / len(now[name]) - sum(before[name]) / len(before[name]), 1)
    if difference.clusters < 2:
        return None
    found = difference.points()
    if found.high is None or found.low is None or found.high >= 0.0:
        return None
    share = (_tally({name: own[name] for name in both}).mean for own in (before, now))
    return Fall(policy, earlier, *share, low=found.low, high=found.high)
