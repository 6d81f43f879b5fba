"""The day that templates take for today: the same throughout a run, and after a restart."""

from __future__ import annotations

import datetime
from typing import Any

# Any would do, so long as it stays: this is the one that Llama 3's templates fall back on.
TEMPLATE_DATE = datetime.date(2024, 7, 26)

# Templates ask `strftime_now` for today. A macro of the same name hides it and answers with the pinned day.
# Its line break is eaten (trim_blocks), so that the template itself still begins at the start of a line.
_PINNED_NOW = (
    "{%- macro strftime_now(format) -%}{%- set found = namespace(text=format) -%}"
    "{%- for code, value in pinned_date.items() -%}{%- set found.text = found.text.replace(code, value) -%}"
    "{%- endfor -%}{{- found.text -}}{%- endmacro %}\n"
)
_DATE_CODES = ("%-d", "%-m", "%d", "%e", "%b", "%B", "%m", "%y", "%Y", "%a", "%A", "%j", "%H", "%I", "%M", "%S", "%p")


def pinned(template: str, date: datetime.date) -> tuple[str, dict[str, Any]]:
    """Return a template that takes a day for today, and the variables that it reads."""
    variables: dict[str, Any] = {"date_string": date.strftime("%d %b %Y")}
    if "strftime_now" not in template:
        return template, variables
    return _PINNED_NOW + template, variables | {"pinned_date": {code: date.strftime(code) for code in _DATE_CODES}}
