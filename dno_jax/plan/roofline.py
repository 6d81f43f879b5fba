"""How long programs take, by what they compute, read and send, against what a chip can do.

An estimate: the slowest of the three decides, each at a share of the peak that good programs reach. The shares are
printed beside the times. What is computed again to save memory is counted in the time and not in MFU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from dno_jax.model.sizes import attention_layers, mixer_flops, state_bytes
from dno_jax.parallel.chips import Chip
from dno_jax.parallel.sharding import num_row_shards
from dno_jax.runtime.arguments import Call
from dno_jax.runtime.programs import Programs
from dno_jax.sampling.memory import SlotPlan
from dno_jax.training.flops import Work, body_params, forward_flops, train_flops, work_of
from dno_jax.training.packing import TextLengths

# Of the peaks, what is taken to be reached.
SHARES = {"arithmetic": 0.6, "memory": 0.7, "links": 0.7}
# Of the slots, those that have a text, once the last prompts are left out of account.
BUSY = 0.9
_LATENCY = 3e-6  # seconds of a collective of a few bytes


@dataclass(frozen=True)
class Load:
    """What one run of a program asks of one device.

    Attributes:
        needed: FLOPs that the model needs; `executed` with those that are done again.
        read: bytes of memory.
        sent: bytes to other devices.
        messages: collectives, each of which takes a while.
    """

    needed: float
    executed: float
    read: float
    sent: float = 0.0
    messages: int = 0


@dataclass(frozen=True)
class Time:
    """
    Attributes:
        seconds: of one run.
        bound: what decides: "arithmetic", "memory" or "links".
        mfu, mbu: shares of the chip's peaks.
    """

    seconds: float
    bound: str
    mfu: float
    mbu: float


def time_of(load: Load, chip: Chip, *, mfu: float | None = None) -> Time:
    """Return how long a program takes.

    Args:
        mfu: of somebody's own measurement, in place of the shares.
    """
    each = {
        "arithmetic": load.executed / (SHARES["arithmetic"] * chip.flops),
        "memory": load.read / (SHARES["memory"] * chip.bandwidth),
        "links": load.sent / (SHARES["links"] * chip.link) + load.messages * _LATENCY,
    }
    bound = max(each, key=lambda name: each[name])
    seconds = each[bound]
    if mfu is not None:
        seconds, bound = load.needed / (mfu * chip.flops), "--mfu"
    return Time(seconds, bound, load.needed / seconds / chip.flops, load.read / seconds / chip.bandwidth)


def train_load(programs: Programs[Any], lengths: TextLengths, call: Call) -> Load:
    """One optimiser step on texts of these lengths."""
    work, devices = _work(programs, lengths), programs.mesh.size
    needed = train_flops(programs.model_config, work, adapter_params=programs.adapter_params)
    again = {"full": 1.0, "dots": 0.0, "none": 0.0}[programs.config.model.remat]
    executed = needed + again * forward_flops(programs.model_config, work)
    state = call.parts.get("parameters", 0) + call.parts.get("moments", 0)
    # The state is read and written once; a micro-batch reads every weight forward, again and backward.
    parts = call.arguments[1].token.shape[0]
    width = jnp.dtype(programs.config.model.dtype).itemsize
    weights = (2 + again) * parts * programs.num_parameters * width / programs.mesh.shape["tensor"]
    axes = programs.mesh.shape
    own = programs.num_parameters * width / axes["tensor"]
    # Of every micro-batch: weights gathered forward and backward, gradients summed; along data, summed there and back.
    passes = 3 if programs.adapter is None else 2
    along = passes * _others(axes["fsdp"]) + 2 * (passes - 2) * _others(axes["data"]) / axes["fsdp"]
    return Load(needed / devices, executed / devices, float(2 * state + weights), parts * own * along)


def _others(devices: int) -> float:
    """The share of an axis's arrays that lies on other devices."""
    return 1.0 - 1.0 / devices


def score_load(programs: Programs[Any], lengths: TextLengths) -> Load:
    """The log-probabilities of texts of these lengths."""
    devices, work = programs.mesh.size, _work(programs, lengths)
    needed = forward_flops(programs.model_config, work) / devices
    width = jnp.dtype(programs.config.model.dtype).itemsize
    return Load(needed, needed, float(programs.num_parameters * width / programs.mesh.shape["tensor"]))


def _work(programs: Programs[Any], lengths: TextLengths) -> Work:
    packing = programs.packing
    return work_of(programs.model_config, lengths, share_prompt=packing.packed and packing.share_prompt)


def decode_load(slots: SlotPlan) -> Load:
    """One token of every slot of one row shard, texts being half of their length on average."""
    config, tensor = slots.programs.model.config, slots.programs.mesh.shape["tensor"]
    rows, policies = slots.slots, slots.num_policies
    length = slots.programs.num_slots / 2
    numbers = body_params(config) + config.hidden_size * config.vocab_size
    attended = 4 * config.num_attention_heads * config.head_dim * attention_layers(config) * length
    attended += sum(mixer_flops(config, mixer) for mixer in config.layer_mixers)
    needed = policies * rows * (2 * numbers + attended) / tensor
    # Half of the keys and values on average; a state is read and written whole.
    states = policies * state_bytes(config) / tensor
    cache = rows * ((slots.slot_bytes - states) / 2 + 2 * states)
    width = jnp.dtype(slots.programs.model.dtype).itemsize
    layers = config.num_hidden_layers
    # Two sums a layer of all rows' hidden states, and the logits of one part of the vocabulary at each device.
    sent = policies * rows * (2 * layers * config.hidden_size * width + config.vocab_size * 4) if tensor > 1 else 0
    messages = policies * (2 * layers + 1) if tensor > 1 else 0
    return Load(needed, needed, float(policies * slots.weight_bytes + cache), float(sent), messages)


def prefill_load(slots: SlotPlan) -> Load:
    """The longest prompts of one call, on one device."""
    config, tensor = slots.programs.model.config, slots.programs.mesh.shape["tensor"]
    shape = slots.programs.shape
    tokens = shape.fill_rows * shape.prompt_length
    lengths = np.full((shape.fill_rows, 1), shape.prompt_length, np.int64)
    work = work_of(config, TextLengths(lengths, np.zeros_like(lengths), np.zeros(len(lengths), bool)))
    needed = slots.num_policies * forward_flops(config, work) / tensor
    width = jnp.dtype(slots.programs.model.dtype).itemsize
    sent = 2 * config.num_hidden_layers * tokens * config.hidden_size * width if tensor > 1 else 0
    pieces = -(-shape.prompt_length // shape.prefill_chunk)
    read = float(pieces * slots.num_policies * slots.weight_bytes)
    return Load(needed, needed, read, slots.num_policies * float(sent))


def decode_seconds(slots: SlotPlan, time: Time, *, tokens: int, tokens_per_second: float | None = None) -> float:
    """Return how long so many tokens take on the whole mesh.

    Args:
        tokens_per_second: of somebody's own measurement, of all devices together.
    """
    rate = tokens_per_second or BUSY * slots.slots * num_row_shards(slots.programs.mesh) / time.seconds
    return tokens / rate
