"""A device that ran out of memory: one message with the field that decides, its value and the next smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from dno_jax.config import AnyConfig, RunConfig, SftConfig
from dno_jax.errors import DnoError
from dno_jax.parallel.sharding import num_row_shards
from dno_jax.runtime.programs import ConfigT, Programs

_SMALLEST_CHUNK = 64  # tokens per slice of the output head: below, slices are too small to be worth it


@dataclass(frozen=True)
class Setting:
    """A field that decides on how much memory something takes.

    Attributes:
        value: now; `note` says where it comes from, if not from the configuration.
        smaller: the next value that takes less; None where there is none.
    """

    field: str
    value: object
    smaller: object | None
    note: str = ""


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left: jax's own, of an allocation or of a program's plan."""
    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    )


@contextmanager
def explained(what: str, settings: Sequence[Setting]) -> Iterator[None]:
    """Raise a device's lack of memory as one message that says what to set.

    Args:
        what: is being done, such as "train of iteration 0".
        settings: in the order in which they are to be tried.

    Raises:
        DnoError: a device ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        said = str(error).strip().split("\n")[0][:160]
    else:
        return
    raise DnoError(_message(what, said, settings))  # after the error is gone, and with it what it held


def _message(what: str, said: str, settings: Sequence[Setting]) -> str:
    ways = [setting for setting in settings if setting.smaller is not None]
    lines = [f"{what}: a device ran out of memory ({said})."]
    if ways:
        first = ways[0]
        lines.append(
            f"{first.field} is {first.value}{first.note}; the next smaller is {first.smaller}: start the same command "
            f"again with {first.field}={first.smaller}, in the same run directory: what is finished is kept."
        )
    if len(ways) > 1:
        lines.append("If that is not enough: " + ", ".join(f"{way.field}={way.smaller}" for way in ways[1:]) + ".")
    if not ways:
        lines.append("; ".join(f"{one.field} is {one.value}{one.note}, which is the least" for one in settings) + ".")
    lines.append(
        "Shorter texts (max_length, max_new_tokens), more devices or devices with more memory help too; "
        "`dno plan CONFIG` says what a run takes before it starts. See that nothing else uses the device."
    )
    return "\n".join(lines)


def training_settings(programs: Programs[ConfigT]) -> list[Setting]:
    """What decides on the memory of training and scoring."""
    config: AnyConfig = programs.config
    section, texts = config.training, 1 if isinstance(config, SftConfig) else 2
    size = section.micro_batch_size or section.batch_size
    # Packed, a device takes a whole row at least: fewer texts than devices would take no less.
    shards = num_row_shards(programs.mesh)
    fitting = [n for n in range(1, size) if section.batch_size % n == 0 and n * texts % shards == 0]
    note = "" if section.micro_batch_size else " (training.batch_size)"
    chunk = section.logprob_chunk
    return [
        Setting("training.micro_batch_size", size, max(fitting, default=None), note),
        Setting("model.remat", config.model.remat, None if config.model.remat == "full" else "full"),
        Setting("training.logprob_chunk", chunk, chunk // 2 if chunk >= 2 * _SMALLEST_CHUNK else None),
        *weight_settings(programs),
    ]


def sampling_settings(programs: Programs[RunConfig], slots: int) -> list[Setting]:
    """What decides on the memory of decoding.

    Args:
        slots: rows that decode together on each row shard.
    """
    section = programs.config.sampling
    note = "" if section.slots else " (chosen by the program)"
    chunk = section.prefill_chunk
    return [
        Setting("sampling.slots", slots, slots // 2 or None, note),
        Setting("sampling.prefill_chunk", chunk, chunk // 2 if chunk >= 32 else None),
        *weight_settings(programs),
    ]


def reward_settings(programs: Programs[RunConfig], batch_size: int) -> list[Setting]:
    """What decides on the memory of a reward model's forward pass."""
    shards = num_row_shards(programs.submesh.mesh)
    smaller = batch_size // 2 // shards * shards
    return [
        Setting("annotation.reward_model.batch_size", batch_size, smaller or None),
        *weight_settings(programs),
    ]


def weight_settings(programs: Programs[ConfigT]) -> list[Setting]:
    """What decides on the memory of weights: over how many devices they are split."""
    mesh = programs.config.mesh
    split, devices = programs.mesh.shape["fsdp"], programs.mesh.size
    more = 2 * split if devices % (2 * split * mesh.expert * mesh.tensor) == 0 and mesh.data == -1 else None
    return [Setting("mesh.fsdp", split, more)]
