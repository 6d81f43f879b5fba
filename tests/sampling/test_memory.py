"""Bytes of slots against arrays that are really allocated, and what is said where they do not fit."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import init_params, param_axes
from dno_jax.parallel.mesh import abstract_mesh, make_mesh
from dno_jax.parallel.sharding import DECODE, ROW_AXES, weight_shardings
from dno_jax.sampling.memory import (
    ACCELERATOR_SLOTS,
    CPU_SLOTS,
    LOGITS_COPIES,
    Capacity,
    cache_bytes,
    compare_with_compiler,
    plan_slots,
    queue_length,
    show_bytes,
    weight_bytes,
)

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
L, K, H, D, V = 3, 2, 8, 32, 96
MIXTURE = replace(CONFIG, num_experts=4, num_experts_per_tok=2)
WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
PLENTY = Capacity(2**40, "a test")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshSection(), jax.devices()[:1])


@pytest.fixture
def plan(mesh):
    """Plan five responses of up to 24 tokens to each of 100 prompts of up to 16, unless told otherwise."""

    def make(**changes):
        told = {
            "config": CONFIG,
            "mesh": mesh,
            "capacity": PLENTY,
            "dtype": "float32",
            "kv_dtype": "auto",
            "num_samples": 5,
            "num_prompts": 100,
            "prompt_length": 16,
            "max_new_tokens": 24,
        }
        return plan_slots(**{**told, **changes})

    return make


def cache_arrays(length, kv_dtype, rows=1):
    """Keys, values and, where a byte holds a number, their scales."""
    arrays = [jnp.zeros((L, rows, K, H, length), kv_dtype) for _ in range(2)]
    if WIDTHS[kv_dtype] == 1:
        arrays += [jnp.zeros((L, rows, K, length), jnp.float32) for _ in range(2)]
    return arrays


def nbytes(*arrays):
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("kv_dtype", WIDTHS)
def test_a_slot_and_a_queue_entry_are_the_bytes_of_their_arrays(plan, kv_dtype):
    found = plan(kv_dtype=kv_dtype, slots=3)
    responses = [jnp.zeros((5, 24), jnp.int32), jnp.zeros((5, 24), jnp.float32)]
    assert found.kv_dtype == kv_dtype
    assert found.slot_bytes == nbytes(*cache_arrays(40, kv_dtype))
    assert found.entry_bytes == nbytes(*cache_arrays(16, kv_dtype), jnp.zeros(D, jnp.float32), *responses)
    assert found.parts["slots"] == nbytes(*cache_arrays(40, kv_dtype, rows=3))
    assert found.logits_bytes == LOGITS_COPIES * jnp.zeros(V, jnp.float32).nbytes
    assert found.total == sum(found.parts.values())


def test_auto_is_the_compute_dtype_and_hidden_states_are_in_it(plan):
    found, wide = plan(dtype="bfloat16", slots=1), plan(slots=1)
    assert (found.kv_dtype, wide.kv_dtype) == ("bfloat16", "float32")
    assert found.slot_bytes * 2 == wide.slot_bytes
    assert found.weight_bytes * 2 == wide.weight_bytes
    assert wide.entry_bytes - found.entry_bytes == nbytes(*cache_arrays(16, "bfloat16"), jnp.zeros(D, jnp.bfloat16))


def test_a_mixture_doubles_all_but_the_responses(plan):
    one, two = plan(slots=2), plan(slots=2, num_policies=2)
    assert two.slot_bytes == 2 * one.slot_bytes
    assert two.parts["weights"] == 2 * one.parts["weights"]
    responses = 5 * 24 * 8
    assert two.entry_bytes - responses == 2 * (one.entry_bytes - responses)
    assert plan(slots=2, drawn_logprobs=True).entry_bytes == one.entry_bytes + 5 * 24 * 4


def test_the_limit_of_a_whole_text_shortens_slots_and_never_lengthens_them(plan):
    assert plan(total_length=30).total_length == 30
    assert plan(total_length=30).slot_bytes == nbytes(*cache_arrays(30, "float32"))
    assert plan(total_length=99).total_length == 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "axes"),
    [(CONFIG, {}), (CONFIG, {"data": 4, "tensor": 2}), (MIXTURE, {"data": 1, "expert": 4, "tensor": 2})],
    ids=["1", "4x2", "experts"],
)
def test_weights_are_the_bytes_of_one_devices_shards(config, axes, dtype):
    mesh = make_mesh(MeshSection(**axes), jax.devices()[: math.prod(axes.values())])
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(config, jax.random.key(0)))
    shardings = weight_shardings(mesh, DECODE, axes=param_axes(config), shapes=params)
    placed = jax.device_put(params, shardings)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert weight_bytes(config, mesh=mesh, dtype=dtype) == held


@pytest.mark.parametrize("kv_dtype", WIDTHS)
def test_a_tensor_axis_divides_a_row_and_a_row_axis_does_not(kv_dtype):
    section = MeshSection(data=2, expert=2, tensor=2)
    mesh = make_mesh(section)
    rows = 3  # of each row shard
    place = NamedSharding(mesh, PartitionSpec(None, ROW_AXES, "tensor"))
    arrays = jax.device_put(cache_arrays(40, kv_dtype, rows=4 * rows), place)
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays)
    found = cache_bytes(CONFIG, mesh=mesh, length=40, kv_dtype=kv_dtype)
    assert rows * found == held
    assert cache_bytes(CONFIG, mesh=abstract_mesh(section, 8), length=40, kv_dtype=kv_dtype) == found


def test_key_heads_that_the_mesh_does_not_divide_are_refused(plan):
    with pytest.raises(DnoError, match=r"the KV cache .*: size 2 cannot be split over tensor=8 devices"):
        plan(mesh=abstract_mesh(MeshSection(tensor=8), 8))


def capacity_of(usable):
    """The smallest capacity that leaves so many bytes, so that one byte less leaves one less."""
    count = next(count for count in range(usable, 2 * usable) if Capacity(count, "").usable == usable)
    assert Capacity(count - 1, "").usable == usable - 1
    return count


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_it_fits_to_the_byte(plan, kv_dtype):
    wanted = plan(kv_dtype=kv_dtype, slots=7)
    room = capacity_of(wanted.total)
    for slots in (7, None):
        found = plan(kv_dtype=kv_dtype, slots=slots, capacity=Capacity(room, "a test"))
        assert found.slots == found.most_slots == 7
        assert found.total == found.capacity.usable
    assert found.chosen_by == "memory"
    tight = Capacity(room - 1, "a test")
    assert plan(kv_dtype=kv_dtype, capacity=tight).slots == 6
    with pytest.raises(DnoError, match=r"sampling\.slots is 7, but 7 slots of 40 tokens .* 6 would fit: set .* 6"):
        plan(kv_dtype=kv_dtype, slots=7, capacity=tight)


def test_the_most_slots_are_those_that_counting_finds(plan):
    for room in range(190_000, 900_000, 71_000):
        found = plan(slots=1, capacity=Capacity(room, "a test"))
        slots = 1
        while replace(found, slots=slots + 1).total <= found.capacity.usable:
            slots += 1
        assert found.most_slots == slots


def test_a_refusal_says_what_takes_how_much_of_what(plan):
    capacity = Capacity(200_000, "a test")
    with pytest.raises(DnoError) as caught:
        plan(slots=1000, capacity=capacity)
    said, wanted = str(caught.value), plan(slots=1000)
    for part in (*wanted.parts.values(), wanted.total, capacity.usable, capacity.reserve):
        assert show_bytes(part) in said
    assert f"{show_bytes(200_000)} (a test)" in said
    most = int(re.search(r"(\d+) would fit", said)[1])
    assert plan(slots=most, capacity=capacity).slots == most
    with pytest.raises(DnoError):
        plan(slots=most + 1, capacity=capacity)


@pytest.mark.parametrize("slots", [1, None])
def test_not_even_one_slot_fits(plan, slots):
    one = plan(slots=1)
    tight = Capacity(capacity_of(one.total) - 1, "a test")
    assert replace(one, capacity=tight).most_slots == 0
    said = (
        "sampling.slots is 1, but 1 slot of .* not even one would fit"
        if slots
        else "not even one sampling slot fits: 1"
    )
    with pytest.raises(DnoError, match=said) as caught:
        plan(slots=slots, capacity=tight)
    assert "set sampling.slots" not in str(caught.value)
    with pytest.raises(DnoError, match="not even one"):
        plan(slots=slots, num_policies=2, capacity=Capacity(one.weight_bytes, "a test"))


def test_without_a_configured_number_no_more_slots_are_taken_than_are_of_use(plan):
    for platform, most in (("cpu", CPU_SLOTS), ("gpu", ACCELERATOR_SLOTS), (None, ACCELERATOR_SLOTS)):
        found = plan(platform=platform)
        assert (found.slots, found.chosen_by) == (most, "the default")
        assert found.most_slots > most
    found = plan(num_prompts=3)
    assert (found.slots, found.chosen_by) == (15, "responses to draw")
    # Two row shards share five prompts: one has three.
    two = make_mesh(MeshSection(), jax.devices()[:2])
    assert plan(mesh=two, num_prompts=5).slots == 15
    assert plan(slots=1000, platform="cpu").chosen_by == "sampling.slots"


def test_the_queue_holds_what_is_decoded_and_what_comes_next():
    assert queue_length(8, num_samples=1) == 16
    assert queue_length(60, num_samples=2) == 45 + 30  # the longer of two lasts 3/2 of the mean
    assert queue_length(1, num_samples=5) == 2


def test_sizes_are_shown_in_the_unit_that_fits_them():
    sizes = {
        0: "0 B",
        1023: "1023 B",
        1024: "1.00 KiB",
        3 * 2**19: "1.50 MiB",
        16 * 2**30: "16.00 GiB",
        2**41: "2.00 TiB",
    }
    assert {count: show_bytes(count) for count in sizes} == sizes


@pytest.mark.parametrize("donate", [True, False])
def test_the_plan_is_what_the_compiler_counts_on_each_device(plan, donate):
    """A program that holds what the plan counts, and writes a column of the cache in place, or in a copy of it."""
    mesh = make_mesh(MeshSection(data=4, tensor=2))
    found = plan(mesh=mesh, slots=3, kv_dtype="int8")
    rows, heads = PartitionSpec(None, ROW_AXES, "tensor"), PartitionSpec(ROW_AXES)

    def spread(arrays, spec):
        return [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)) for a in arrays]

    entries = found.queue_entries
    params = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    shardings = weight_shardings(mesh, DECODE, axes=param_axes(CONFIG), shapes=params)
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, shardings)
    slots = spread(cache_arrays(40, "int8", rows=4 * 3), rows)
    queue = spread(cache_arrays(16, "int8", rows=4 * entries), rows)
    queue += spread([jnp.zeros((4 * entries, D)), jnp.zeros((4 * entries, 5, 24, 2))], heads)

    def step(params, queue, slots):
        return [array.at[..., 0].set(1) for array in slots]

    program = jax.jit(step, keep_unused=True, donate_argnums=2 if donate else ())
    compared = compare_with_compiler(found, program.lower(params, queue, slots).compile().memory_analysis())
    assert compared["held"].planned == compared["held"].compiled
    assert compared["temporaries"].planned == 3 * LOGITS_COPIES * V * 4
    copied = compared["copied"].compiled
    assert copied < 256 if donate else copied >= found.parts["slots"]  # a table of pointers is a few bytes
