"""Keys and addresses of endpoints: read from the environment, taken out of all that others wrote, kept out of files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from dno_jax.display import hide_keys
from dno_jax.errors import DnoError

# What stands for a key at servers without any (in lower case): to scrub these would garble words.
_PLACEHOLDERS = {"none", "null", "empty", "dummy", "x", "xxx", "ollama", "lm-studio", "no-key", "not-needed"}
_SHORTEST_KEY = 4  # a shorter one stands in every other word
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
_SECRET_NAME = re.compile(r"key|token|secret|passw|auth|cookie|credential|signature|\bsig\b|\bcode\b", re.IGNORECASE)


class Secrets:
    """Texts that leave this process in requests only."""

    def __init__(self) -> None:
        self._found: dict[str, re.Pattern[str]] = {}

    def add(self, key: str) -> None:
        if key.lower() not in _PLACEHOLDERS:
            self._found[key] = _spellings(key)

    def without(self, text: str) -> str:
        """Take them out of a text, however JSON or a URL spells them there."""
        for key, spelt in self._found.items():
            text = text.replace(key, "[key]")
            text = spelt.sub("[key]", text) if "\\" in text or "%" in text else text
        return text


def read_key(variable: str | None, *, url: str, place: str) -> str:
    """Return what an environment variable holds; "none" for none.

    Args:
        url: whose key it is.
        place: the section of the configuration that names the variable.

    Raises:
        DnoError: there is no key in it.
    """
    if variable is None:
        return "none"
    # A trailing newline, usual in mounted secrets, makes an illegal header, and the error would quote the key.
    key = os.environ.get(variable, "").strip()
    if not key:
        raise DnoError(
            f"{place}: the environment variable {variable} is not set; put the key of "
            f"{url} there, or set {place}.api_key_env=null for a server without keys"
        )
    if len(key) < _SHORTEST_KEY and key.lower() not in _PLACEHOLDERS:
        raise DnoError(
            f"{place}: the variable {variable} holds {len(key)} characters, too few to be kept out of logs; set "
            f"{place}.api_key_env=null for a server without keys, or a key of {_SHORTEST_KEY} characters or more"
        )
    if not (key.isascii() and key.isprintable()):
        raise DnoError(f"{place}: the variable {variable} holds no key: it has odd characters")
    return key


def read_headers(headers: Mapping[str, str], *, url: str, place: str, secrets: Secrets) -> dict[str, str]:
    """Return headers with what their $VARIABLES hold, which becomes secret.

    Raises:
        DnoError: as `read_key`.
    """

    def held(found: re.Match[str]) -> str:
        key = read_key(found[1] or found[2], url=url, place=place)
        secrets.add(key)
        return key

    return {name: _VARIABLE.sub(held, value) for name, value in headers.items()}


def names_variable(text: str) -> bool:
    """Whether a text takes its value from the environment, as "Bearer $KEY" does."""
    return _VARIABLE.search(text) is not None


def may_be_secret(name: str, value: str) -> bool:
    """Whether a header or a field of a query holds what no file should, by its name or its looks."""
    return not names_variable(value) and (bool(_SECRET_NAME.search(name)) or hide_keys(value) != value)


def checked_url(url: str, *, place: str) -> tuple[str, dict[str, str]]:
    """Return a URL without its query, and the query, if both can be used and shown: they stand in files and messages.

    Raises:
        DnoError: it is none, or holds a user, a password or what may be a key.
    """
    try:
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        raise DnoError(f"{place}.base_url: not a URL; expected http(s)://host[:port]/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        bare = shown if parts.scheme and parts.hostname else _without_secrets(url)
        raise DnoError(f"{place}.base_url: {bare!r}: expected http(s)://host[:port]/path")
    bare, query = split_query(url)
    secret = any(may_be_secret(name, value) for name, value in query.items())
    if parts.username is not None or parts.password is not None or parts.fragment or secret:
        raise DnoError(
            f"{place}.base_url: {shown} with a user, a query that may hold a key, or a fragment; give the bare URL, "
            f"and the key in the environment variable that {place}.api_key_env names"
        )
    return bare, query


def split_query(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL without its query, and the query."""
    bare, _, query = url.partition("?")
    return bare, dict(parse_qsl(query, keep_blank_values=True))


def _spellings(key: str) -> re.Pattern[str]:
    """Match a key with any of its characters as JSON or a URL may spell them: \\/, \\u002f, %2F."""
    return re.compile("".join(
        rf"(?:{re.escape(char)}|\\{re.escape(char)}|\\u(?i:{ord(char):04x})|%(?i:{ord(char):02x}))" for char in key
    ))  # fmt: skip


def _without_secrets(text: str) -> str:
    """Leave out what may be a user, a password or a query of a text that is no URL, whichever parts it has."""
    user, _, rest = text.rpartition("@")
    return "..." if re.search(r"[?#]", user) else re.split(r"[?#]", rest)[0]
