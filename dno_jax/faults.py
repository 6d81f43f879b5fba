"""What an answer that is none says: of this request, of the moment, or of every request. Shapes differ by server.

Nothing here sends or waits. What others wrote is read, and shown only by who scrubs it.
"""

from __future__ import annotations

import datetime
import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dno_jax.errors import DnoError

Then = Literal["retry", "give up", "refused", "raise"]

_UNIX = 1e9  # seconds; as a pause it would be 31 years
_LONGEST_RESET = 2.0 * 86_400.0  # seconds; what is further off is no limit of requests
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_AGAIN_IN = re.compile(r"(?:try again|retry|wait|reset)\D{0,20}?((?:\d+(?:\.\d+)?(?:ms|s|m|h|d)(?![a-z]))+"
                       r"|\d+(?:\.\d+)? ?sec)", re.IGNORECASE)  # fmt: skip
_TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)

# Codes and types by which servers say the same of a request, in lower case.
_NO_KEY = {"invalid_api_key", "api_key_invalid", "expired_api_key", "api_key_expired", "token_expired",
           "unauthenticated", "authentication_error", "invalid_authentication_error"}  # fmt: skip
_NO_MONEY = {"insufficient_quota", "billing_hard_limit_reached", "exceeded_current_quota_error", "arrearage",
             "insufficient_balance", "insufficient_credits", "billing_not_active"}  # fmt: skip
_REFUSED = {"content_filter", "content_policy_violation", "invalid_prompt", "responsibleaipolicyviolation",
            "data_inspection_failed", "moderation_blocked", "prohibited_content", "content_filtered",
            "guardrail_intervened", "safety"}  # fmt: skip
_NO_KEY_WORDS = re.compile(
    r"(?:api[ _-]?key|access token|credentials?)\b.{0,60}?\b(?:expired|not valid|invalid|revoked|disabled)"
    r"|(?:expired|invalid|revoked|disabled) (?:api[ _-]?key|access token|credentials?)",
    re.IGNORECASE | re.DOTALL,
)
_REFUSED_WORDS = re.compile(
    r"content[ _-]?(?:filter|management polic|polic|safety)|responsible ?ai|polic(?:y|ies) ?violation"
    r"|violat\w+ (?:of )?(?:our|the|openai'?s?) [\w ]{0,20}polic|prohibited_content|inappropriate content"
    r"|data_inspection|content exists risk|considered high risk|was (?:flagged|blocked)[\w ]{0,30}"
    r"(?:moderation|safety|polic|content)|flagged as",
    re.IGNORECASE,
)


class EndpointError(DnoError):
    """No request of this configuration can succeed: the key, the model, the path or the account is refused.

    Attributes:
        status: of the HTTP response.
        said: the server's words in one line.
        is_doubtful: a firewall or a gateway says the same of single requests.
    """

    def __init__(self, message: str, *, status: int, said: str = "", is_doubtful: bool = False):
        super().__init__(message)
        self.status = status
        self.said = said or message
        self.is_doubtful = is_doubtful


@dataclass(frozen=True)
class Trouble:
    """A try without a reply, and what follows from it: another try, none for this request, or none for any.

    Attributes:
        detail: one line for people, free of keys.
        unreachable: nothing was sent, for there was no connection.
        retry_after: seconds the endpoint asks to be left alone; a try before that is wasted.
        status: of the HTTP response, None if none came.
        parameter: the request's field that the endpoint names as the culprit.
        headers: of the response, as they came: they may hold a key.
        said: the server's words alone, in one line.
        is_doubtful: one that says "raise" may be meant for this request only, as a firewall's.
    """

    detail: str
    then: Then = "retry"
    unreachable: bool = False
    retry_after: float | None = None
    status: int | None = None
    parameter: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    said: str = field(default="", repr=False, compare=False)
    is_doubtful: bool = field(default=False, compare=False)

    @property
    def asks_for_a_pause(self) -> bool:
        """Whether it speaks of the endpoint's limits, and not of the request."""
        return self.status in (429, 529) or (self.retry_after is not None and (self.status or 0) >= 500)

    @property
    def is_the_servers(self) -> bool:
        """Whether the server says that it has failed: of one request, or of all for a while."""
        return self.then == "retry" and (self.status or 0) >= 500


class Fault:
    """The error that a response's body holds: {"error": {...}}, [{"error": {...}}], {"message": ...}, a web page.

    Args:
        body: as JSON, or as it came.
    """

    def __init__(self, body: object):
        if isinstance(body, list) and body:
            body = body[0]
        found = body if isinstance(body, dict) else {}
        inner = found.get("error")
        self._fields: dict[str, Any] = inner if isinstance(inner, dict) else found
        said = self._fields.get("message") or (inner if isinstance(inner, str) else None) or found.get("detail")
        title = _TITLE.search(body[:100_000]) if isinstance(body, str) and not said else None
        self.message = f"a web page ({title[1].strip()!r})" if title else str(said or body)
        self.parameter = self._fields.get("param")
        details = self._fields.get("details")
        self._details = [one for one in details if isinstance(one, dict)] if isinstance(details, list) else []

    @property
    def status(self) -> int | None:
        """The HTTP status that it names; None where it names none."""
        code = str(self._fields.get("code") or self._fields.get("status") or "")
        return int(code) if re.fullmatch("[45][0-9][0-9]", code) else None

    @property
    def names(self) -> set[str]:
        """Its codes and types, in lower case."""
        inner = self._fields.get("innererror")
        sources = [self._fields, inner if isinstance(inner, dict) else {}, *self._details]
        return {
            str(source[name]).lower()
            for source in sources
            for name in ("code", "type", "status", "reason")
            if source.get(name)
        }

    @property
    def is_refusal(self) -> bool:
        """Whether a moderation objects to what is asked."""
        metadata = self._fields.get("metadata")
        flagged = isinstance(metadata, dict) and bool(metadata.get("reasons") or metadata.get("flagged_input"))
        return flagged or bool(self.names & _REFUSED) or _REFUSED_WORDS.search(self.message[:2000]) is not None

    @property
    def is_about_the_key(self) -> bool:
        return bool(self.names & _NO_KEY) or _NO_KEY_WORDS.search(self.message[:2000]) is not None

    @property
    def is_about_money(self) -> bool:
        return bool(self.names & _NO_MONEY)

    @property
    def pause(self) -> float | None:
        """Seconds that it asks to be left alone, where it does so in words."""
        for one in self._details:
            if (delay := parse_duration(str(one.get("retryDelay")))) is not None:
                return delay
        found = _AGAIN_IN.search(self.message[:2000])
        return parse_duration(re.sub(" ?sec", "s", found[1], flags=re.IGNORECASE).lower()) if found else None


def parse_retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Read Retry-After (seconds, a Unix time or an HTTP date) or retry-after-ms; None if absent or senseless."""
    if (milliseconds := amount(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000.0
    value = headers.get("retry-after")
    if value is None or (seconds := amount(value)) is not None:
        return None if value is None else _from_now(seconds, now=now)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def parse_reset(text: str | None, *, now: float) -> float | None:
    """Read when a limit is reset, as seconds from now: a duration, a Unix time (of seconds or less), or an ISO time.

    None if it is none of these, or further off than any limit of requests.
    """
    seconds = parse_duration(text)
    if seconds is not None:
        seconds = _from_now(seconds, now=now)
    elif text is not None and re.fullmatch(r"\s*\d{4}-\d\d-\d\dT[\d:.]{5,20}(Z|[+-]\d\d:?\d\d)\s*", text):
        try:
            seconds = max(0.0, datetime.datetime.fromisoformat(text.strip()).timestamp() - now)
        except (ValueError, OverflowError):
            return None
    return seconds if seconds is not None and seconds <= _LONGEST_RESET else None


def parse_duration(text: str | None) -> float | None:
    """Read "1s", "6m0s", "20ms", "1h2m3.5s" or bare seconds, in seconds; None if it is none of these."""
    if text is None or len(text) > 32:
        return None
    text = text.strip()
    if (seconds := amount(text)) is not None:
        return seconds
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _from_now(seconds: float | None, *, now: float) -> float | None:
    """Take what is too long for a pause as a Unix time, of seconds, milliseconds, microseconds or nanoseconds."""
    if seconds is None or seconds < _UNIX:
        return seconds
    while seconds > 100.0 * _UNIX:
        seconds /= 1000.0
    return max(0.0, seconds - now)


def amount(text: str | None) -> float | None:
    """Read a number without sign or exponent; None if it is none."""
    return float(text) if text is not None and re.fullmatch(r"\s*\d{1,19}(\.\d{0,9})?\s*", text) else None
