"""The part of a configuration that a stage reads, and its digest: the identity of what the stage writes.

Paths are left out, as contents are identity: stages name those among their inputs. So are fields that only round or
cost, and fields that the configuration as a whole does not read (the judge's own section of another kind, for one).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dno_jax.config.base import Section, Stage
from dno_jax.config.runs import RunConfig


def deciding(config: Section, stage: str) -> dict[str, Any]:
    """Return what decides a stage's results: dotted name -> value as JSON has it."""
    found = {name: value for name, value, stages in _leaves(config, prefix="", inherited=None) if stage in stages}
    if isinstance(config, RunConfig):
        if stage == "evaluate" and config.evaluation.annotation is not None:  # the run's own judge is not asked
            found = {name: value for name, value in found.items() if not name.startswith("annotation.")}
        if stage == "sample":
            found |= _decides_samples(config)
    return json.loads(json.dumps(found))


def stage_digest(config: Section, stage: str) -> str:
    """sha256 of what decides a stage's results."""
    return hashlib.sha256(json.dumps(deciding(config, stage), sort_keys=True).encode()).hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which values differ, one line per name."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names]


def _decides_samples(config: RunConfig) -> dict[str, Any]:
    """Fields of other sections that decide samples in some configurations only."""
    found: dict[str, Any] = {}
    if config.mixes and config.sampling.mixture_weight is None:  # the weight is tau / beta_t
        found |= {
            "reference.tau": config.reference.tau,
            "loss.beta": config.loss.beta,
            "loss.beta_schedule": config.loss.beta_schedule,
        }
    if config.mixes and config.outer.every is not None:  # pi_ref moves
        found["outer.every"] = config.outer.every
    if config.outer.scheme in ("optimistic", "extragradient"):  # the samples of the policy before stand beside its own
        found["outer.scheme"] = config.outer.scheme
    if config.annotation.kind == "given":  # a gold response without points is no candidate
        found["annotation.kind"] = "given"
    return found


def _leaves(
    section: Section, *, prefix: str, inherited: tuple[Stage, ...] | None
) -> Iterator[tuple[str, Any, tuple[Stage, ...]]]:
    """Yield the name, value and stages of every field that decides something.

    Args:
        inherited: stages that a field above names in place of the fields' own.
    """
    unread = section.unread()
    for name, field in type(section).model_fields.items():
        if name in unread:
            continue
        declared = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        stages: Any = inherited or declared.get("stages")
        yield from _values(getattr(section, name), prefix + name, kind=declared.get("kind"), stages=stages)


def _values(
    value: Any, name: str, *, kind: Any, stages: tuple[Stage, ...] | None
) -> Iterator[tuple[str, Any, tuple[Stage, ...]]]:
    if kind in ("rounds", "costs"):
        return
    if isinstance(value, Section):
        yield from _leaves(value, prefix=f"{name}.", inherited=stages)
    elif isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, prefix=f"{name}.{number}.", inherited=stages)
    elif kind == "decides" or (kind == "contents" and isinstance(value, str) and not set(value) & set("/.")):
        yield name, value, stages or ()
