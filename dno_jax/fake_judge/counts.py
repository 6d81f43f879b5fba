"""What a fake judge was asked and what it gave."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from dno_jax.fake_judge.reading import Form

VERDICTS: frozenset[Form] = frozenset({"listwise", "pairwise", "token"})


@dataclass(frozen=True)
class Entry:
    """One request.

    Attributes:
        body: digest of its body.
        form: what it asked for.
        outcome: what became of it: a name of OUTCOMES, a status, or "limited" for a rate limit's 429.
        in_flight: requests in flight when it had come, itself among them.
    """

    body: str
    form: Form | None
    outcome: str
    in_flight: int


@dataclass
class Counts:
    """Totals since the start.

    Attributes:
        forms: requests by what they asked for; what could not be read or was refused at the door is left out.
        outcomes: requests by what became of them.
        tries: requests for a verdict or an answer by digest of the body.
        answered: good verdicts and answers by digest of the body.
        in_flight, max_in_flight: requests that wait for their end, now and at most.
        prompt_tokens, completion_tokens: of everything that was answered with a completion.
        batches, batch_lines: that came by the Batch API; the lines are among the requests.
    """

    forms: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    tries: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    max_in_flight: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    batches: int = 0
    batch_lines: int = 0

    @property
    def requests(self) -> int:
        """Requests for a verdict, whatever became of them."""
        return sum(self.forms[form] for form in VERDICTS)

    @property
    def duplicates(self) -> int:
        """Good verdicts and answers given to a request that had been given one before: paid for twice."""
        return self.answered.total() - len(self.answered)

    def as_json(self) -> dict[str, Any]:
        named = ("in_flight", "max_in_flight", "prompt_tokens", "completion_tokens", "batches", "batch_lines")
        return {
            "requests": self.requests,
            "forms": dict(self.forms),
            "outcomes": dict(self.outcomes),
            "answered": self.answered.total(),
            "duplicates": self.duplicates,
            **{name: getattr(self, name) for name in named},
        }


def counts_table(counts: Counts) -> Table:
    """Render the totals for a person."""
    table = Table("served", "")
    table.columns[1].justify = "right"
    totals = counts.as_json()
    rows = [
        *((f"asked for: {form}", number) for form, number in sorted(totals.pop("forms").items())),
        *((f"came of it: {outcome}", number) for outcome, number in sorted(totals.pop("outcomes").items())),
        ("verdicts and answers", totals["answered"]),
        ("of them paid for twice", totals["duplicates"]),
        ("most requests in flight", totals["max_in_flight"]),
        ("prompt tokens", totals["prompt_tokens"]),
        ("completion tokens", totals["completion_tokens"]),
        ("batches", totals["batches"]),
        ("lines of batches", totals["batch_lines"]),
    ]
    for name, number in rows:
        table.add_row(name, f"{number:,}")
    return table
