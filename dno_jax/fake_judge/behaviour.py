"""What a fake judge is like: what it prefers, how sure it is, how its endpoint fails."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from statistics import NormalDist
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from rich.table import Table

from dno_jax.config.base import Count, Fraction, Section
from dno_jax.config.loading import lay_over, parse_config

OUTCOMES = {
    "ok": "an answer",
    # the connection
    "hang": "no byte, ever",
    "trickle": "a byte now and then, and never an end",
    "close": "the connection is closed without a byte",
    "reset": "the connection is reset",
    "truncated": "half of the body, then the connection is closed",
    # the body of the reply
    "html": "a proxy's front page, with HTTP 200",
    "cut_json": "a body that ends in the middle of its JSON",
    "no_choices": "a completion without choices",
    # what the model said
    "refusal": "the message's refusal field",
    "filter": "finish_reason content_filter",
    "length": "finish_reason length, the text cut after 40 characters",
    "null": "a message without content",
    "empty": "a message with empty content",
    "garbage": "prose in place of a verdict",
    "echo": "the candidates in place of a verdict",
    "malformed": "a verdict that ends in the middle of its JSON",
    "wrong_ids": "candidates numbered from 0; a pair's verdict under another name; a token that is none of the two",
    "too_few": "a score too few; a pair without its verdict; a token without log-probabilities",
    "too_many": "a score too many; a pair with two verdicts; two tokens",
    "out_of_range": "a score, verdict or log-probability that there is none of",
}
"""What may become of a request, beside HTTP statuses from 400 on ("429", "500")."""

BROKEN = frozenset({"hang", "trickle", "close", "reset", "truncated", "html", "cut_json"})
"""Outcomes that happen to the reply's bytes."""

MISJUDGED = frozenset({"garbage", "echo", "malformed", "wrong_ids", "too_few", "too_many", "out_of_range"})
"""Outcomes that only a verdict can have."""

FAULTS = ("429", "500", "hang", "garbage", "refusal", "wrong_ids", "close")


def check_outcome(name: str) -> str:
    if name not in OUTCOMES and not re.fullmatch("[45][0-9][0-9]", name):
        raise ValueError(f"no outcome {name!r}; there are HTTP statuses from 400 on, {', '.join(OUTCOMES)}")
    return name


Outcome = Annotated[str, BeforeValidator(str), AfterValidator(check_outcome)]  # YAML reads 429 as a number


class Behaviour(Section):
    """A judge's character, and its endpoint's. All chance is drawn from the seed, the request and how often it came."""

    seed: int = Field(default=0, description="seed of everything that is drawn")
    prefers: Literal["oracle", "longest", "marker"] = Field(
        default="oracle",
        description="the embedded oracle (ranks in the pool); the longer text (ranks); points as the texts' q=0.37 say",
    )
    noise: float = Field(default=0.0, ge=0.0, description="standard deviation of an error in each candidate's points")
    tie_margin: float = Field(default=0.0, ge=0.0, description="points that tell no pair apart")
    ties: Fraction = Field(default=0.0, description="share of pairs that are a tie whatever they say")
    first_bias: float = Field(
        default=0.0, ge=-1.0, le=1.0, description="share of pairs that the first shown wins unread; below 0: the second"
    )
    first_bonus: float = Field(default=0.0, description="points that the first of a list gets beyond its due")
    sharpness: float = Field(default=1.0, gt=0.0, description="log-odds (nats) per point in log-probabilities")
    refusals: Fraction = Field(default=0.0, description="share of requests that are refused however often they come")
    fraction: Fraction = Field(default=0.0, description="share of requests that meet a fault; the next try may not")
    faults: tuple[Outcome, ...] = Field(default=FAULTS, min_length=1, description="the faults, equally likely")
    retry_after: str = Field(default="0", description="the Retry-After header of a planted 429")
    delay: float = Field(default=0.0, ge=0.0, description="seconds an answer takes: all, their mean, or their median")
    delay_shape: Literal["constant", "exponential", "lognormal"] = Field(
        default="constant", description="constant, exponential (of that mean) or lognormal (of that median)"
    )
    delay_sigma: float = Field(default=0.5, gt=0.0, description="standard deviation of the lognormal's logarithm")
    requests_per_minute: Count | None = Field(default=None, description="more get a 429 that says how long to wait")
    tokens_per_minute: Count | None = Field(default=None, description="prompts and max_tokens, as above")
    burst_seconds: float = Field(
        default=60.0, gt=0.0, description="seconds' worth of those rates that may come at once"
    )
    api_key: str | None = Field(default=None, description="key that is demanded; errors quote the one received")
    echoes_key: bool = Field(default=False, description="everything it says reveals that key: replies, errors, headers")
    models: tuple[str, ...] = Field(default=(), description="any other is a 404; none listed: every name is one")
    refused_fields: tuple[str, ...] = Field(default=(), description="fields of a request that a 400 refuses")
    ignored_fields: tuple[str, ...] = Field(
        default=(), description="fields of a request that are ignored: logprobs, n, max_tokens, ..."
    )
    batches: bool = Field(default=True, description="whether there is a Batch API")
    batch_delay: float = Field(default=1.0, ge=0.0, description="seconds a batch takes")
    batch_fraction: Fraction = Field(
        default=0.0, description="share of calls to files and batches that fail, or whose reply is lost"
    )
    batch_expired: Fraction = Field(default=0.0, description="share of a batch's lines that its window closes on")


def read_settings(settings: Sequence[str]) -> Behaviour:
    """Read `name=value` settings, whose values are YAML.

    Raises:
        DnoError: naming the setting, what was expected and, for an unknown one, those that there are.
    """
    tree: dict[str, Any] = {}
    for setting in settings:
        lay_over(tree, setting, kind=Behaviour)
    return parse_config(Behaviour, tree, place="dno fake-judge")


def settings_table(behaviour: Behaviour) -> Table:
    """Render what can be set, with what is set now."""
    table = Table("setting", "value", "", box=None)
    for name, field in Behaviour.model_fields.items():
        value = getattr(behaviour, name)
        shown = ", ".join(value) if isinstance(value, tuple) else str(value)
        table.add_row(name, shown, field.description or "")
    return table


def uniform(*names: object) -> float:
    """Draw from (0, 1) by name."""
    digest = hashlib.blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 11) + 0.5) / 2**53


def normal(*names: object) -> float:
    """Draw from the standard normal distribution by name."""
    return NormalDist().inv_cdf(uniform(*names))


def draw_delay(behaviour: Behaviour, *names: object) -> float:
    """Draw the seconds that an answer takes."""
    if not behaviour.delay or behaviour.delay_shape == "constant":
        return behaviour.delay
    if behaviour.delay_shape == "exponential":
        return -behaviour.delay * math.log(uniform(behaviour.seed, "delay", *names))
    return behaviour.delay * math.exp(behaviour.delay_sigma * normal(behaviour.seed, "delay", *names))
