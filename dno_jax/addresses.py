"""Every seeded draw, by a purpose and an address: the same in any order, on any machine and after a restart.

An address is what the draw is for (a seed, an iteration, the id of a prompt ...); all that is drawn comes from the
sha256 of its JSON, [purpose, *address]. Two purposes have no draw in common, whatever their addresses are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np


class Purpose(StrEnum):
    """What is drawn; in the comments, where."""

    PROMPT_SPLIT = "prompt split"  # which prompts are held out, and which iteration gets which: (seed)
    RESPONSE = "response"  # tokens of a response: (seed), then iteration, prompt and sample in the key
    SERVED_RESPONSE = "served response"  # a request's seed: (seed, iteration, prompt, sample, redraw)
    AUDITED_PROMPTS = "audited prompts"  # whose responses are audited: ()
    TEACHER = "teacher"  # a request's seed: (seed, prompt id)
    PRESENTATION = "presentation"  # the order in which a judge sees a pool: (seed, draw, prompt id)
    TOURNAMENT = "tournament"  # who meets whom first: (seed, 0, prompt id)
    SHOWN_FIRST = "shown first"  # of two that are shown in one order: (seed, prompt id, both ids)
    JUDGE = "judge"  # a request's seed: (seed, messages, repeat)
    ANOTHER_TRY = "another try"  # a request's seed after a reply that could not be read: (the seed before)
    REPEATED = "repeated"  # which pools are judged twice: (seed, prompt id)
    CALIBRATION = "calibration"  # which labelled pairs are asked about: (seed)
    TABLE = "table"  # verdicts of a table of probabilities: (seed, prompt id, both ids)
    READING = "reading"  # tokens of a policy's own verdict: (seed), then iteration, rollout and reading in the key
    MATCHING = "matching"  # who is paired with whom: (seed, iteration, prompt id)
    REPLAY = "replay"  # which earlier pairs are trained on again: (seed, iteration, age)
    BATCH_ORDER = "batch order"  # an epoch's rows: (seed, iteration, epoch)
    MIXTURE_MEMBER = "mixture member"  # the policy that answers for all of them: (seed, prompt id, sample)
    ROUNDING = "rounding"  # of a step's results: (seed, iteration, stage), then step and array in the key
    INITIAL_WEIGHTS = "initial weights"  # of a fine-tuning that starts from none: (seed)
    HELD_OUT_PAIRS = "held-out pairs"  # prompts that a reward model is measured by: (seed)
    JUDGE_ERRORS = "judge errors"  # a rate in the light of labels: (0, which rate)
    BATTLES = "battles"  # of an arena, drawn anew for its interval: (0, "battles")
    ERRORS = "errors"  # of means, where their joint spread has no closed form: (seed)
    ADAPTER = "adapter"  # the random half of a new adapter: (seed), then the matrix in the key


def rng(purpose: Purpose, *address: Any) -> np.random.Generator:
    """Return a generator of its own for an address.

    Args:
        address: what JSON can write.
    """
    seed = int.from_bytes(_digest(purpose, *address), "big")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def integer(purpose: Purpose, *address: Any, below: int) -> int:
    """Return a number in [0, below); uniform but for below / 2^64."""
    return int.from_bytes(_digest(purpose, *address)[:8], "big") % below


def uniform(purpose: Purpose, *address: Any) -> float:
    """Return a number in [0, 1), a multiple of 2^-53: as many bits as a double holds."""
    return (int.from_bytes(_digest(purpose, *address)[:8], "big") >> 11) * 2.0**-53


def order(purpose: Purpose, *address: Any, names: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of names in a random order that does not depend on the order they come in."""
    return tuple(sorted(range(len(names)), key=lambda index: _digest(purpose, *address, names[index])))


def key_data(purpose: Purpose, *address: Any) -> np.ndarray:
    """Return the [2] uint32 of a Threefry key, for `jax.random.wrap_key_data`."""
    return np.frombuffer(_digest(purpose, *address)[:8], ">u4").astype(np.uint32)


def name_bits(name: str) -> int:
    """Return 32 bits that stand for an id inside of a jax key."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _digest(purpose: Purpose, *address: Any) -> bytes:
    return hashlib.sha256(json.dumps([purpose, *address]).encode()).digest()
