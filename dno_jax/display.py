"""What others wrote, made fit for a terminal, a log and an error: no control sequence acts, no key is shown."""

from __future__ import annotations

import re

# C0 and C1 without tab and line feed, line separators, marks and overrides of direction, invisible tags, halves of
# surrogate pairs. Joiners (U+200C, U+200D) stay: emoji and Persian are written with them.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_HALVES = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# The beginnings that providers give their keys; and what is too long and too mixed to be a word of a name.
_KEY_LIKE = re.compile(
    r"\b(?:(?:sk-|Bearer )[\w*.-]{6,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{20,}"
    r"|(?:sk|rk|pk|gsk|csk|hf|r8|fw|xai|nvapi|pplx|tgp|gh[pousr]|github_pat|glpat|xox[abps]|esecret)[-_]"
    r"(?:[A-Za-z0-9]{1,15}[-_]){0,3}[A-Za-z0-9]{16,})"
)
_LONG = re.compile(r"[A-Za-z0-9]{20,}")


def printable(text: str) -> str:
    r"""Return a text with every character that acts on a terminal spelt as Python does: \x1b, \r, \u202e.

    Tabs and line feeds stay, and a carriage return before a line feed goes: it only ends the line twice.
    """
    return _ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def is_text(text: str) -> bool:
    """Whether a text can be written: halves of surrogate pairs cannot, which stand for bytes that are no UTF-8."""
    return not _HALVES.search(text)


def hide_keys(text: str) -> str:
    """Take out what looks like a key."""
    return _KEY_LIKE.sub("[key]", text)


def is_variable_name(text: str) -> bool:
    """Whether a text names an environment variable, and does not look like a key that was put in the name's place."""
    return bool(_NAME.fullmatch(text)) and not _KEY_LIKE.search(text) and not any(map(_is_random, _LONG.findall(text)))


def _is_random(run: str) -> bool:
    """Whether letters and digits so long are no words: with a digit among small letters, or several among capitals."""
    return sum(char.isdigit() for char in run) >= (4 if run.upper() == run else 1)
