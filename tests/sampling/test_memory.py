"""Bytes of slots against arrays that are really allocated, and what is said where they do not fit."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder
from dno_jax.model.params import abstract_params, computing_params, init_params, param_axes
from dno_jax.parallel.cache import ShardedWrite
from dno_jax.parallel.mesh import abstract_mesh, make_mesh
from dno_jax.parallel.sharding import DECODE, Constrain, row_sharding, weight_shardings
from dno_jax.sampling import memory
from dno_jax.sampling.decode import decode, fill
from dno_jax.sampling.memory import (
    ACCELERATOR_SLOTS,
    CPU_SLOTS,
    LOGITS_COPIES,
    Capacity,
    plan_slots,
    queue_length,
    show_bytes,
    weight_bytes,
)
from dno_jax.sampling.requests import SamplingParams
from dno_jax.sampling.state import CompiledPrograms, EngineShape, Prompts, abstract_start, start
from dno_jax.sampling.transforms import Truncation

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


ONE, SPREAD = {}, {"data": 2, "expert": 2, "tensor": 2}


def mesh_of(axes):
    return make_mesh(MeshSection(**axes), jax.devices()[: math.prod(axes.values())])


def plan(*, slots=None, capacity=PLENTY, num_prompts=100, num_policies=1, beside=(), platform=None, **changes):
    """Plan five responses of up to 24 tokens to each prompt of up to 16, unless told otherwise."""
    told = {"mesh": mesh_of(ONE), "config": CONFIG, "dtype": "float32", "kv_dtype": "float32", "penalty": 1.0}
    told |= {"total": None, "drawn": False, "samples": 5, "prompt_length": 16, "prefill_chunk": 512, **changes}
    programs = CompiledPrograms(
        Decoder(told["config"], dtype=jnp.dtype(told["dtype"])),
        SamplingParams(
            num_samples=told["samples"],
            max_new_tokens=24,
            end_ids=(2,),
            truncation=Truncation(repetition_penalty=told["penalty"]),
            seed=0,
            max_total_tokens=told["total"],
        ),
        EngineShape(
            slots=1,
            prompt_length=told["prompt_length"],
            fill_rows=2,
            prefill_chunk=told["prefill_chunk"],
            kv_dtype=told["kv_dtype"],
        ),
        told["mesh"],
        told["drawn"],
    )
    return plan_slots(
        programs,
        capacity=capacity,
        num_prompts=num_prompts,
        slots=slots,
        num_policies=num_policies,
        beside=beside,
        platform=platform,
    )


def cache_arrays(length, kv_dtype):
    """Keys, values and, where a byte holds a number, their scales."""
    arrays = [jnp.zeros((L, K, H, length), kv_dtype) for _ in range(2)]
    if WIDTHS[kv_dtype] == 1:
        arrays += [jnp.zeros((L, K, length), jnp.float32) for _ in range(2)]
    return arrays


def nbytes(*arrays):
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("kv_dtype", WIDTHS)
def test_a_slot_is_its_cache_its_hidden_state_and_counters(kv_dtype):
    found, two = plan(kv_dtype=kv_dtype, slots=3), plan(kv_dtype=kv_dtype, slots=3, num_policies=2)
    texts = [nbytes(*cache_arrays(length, kv_dtype), jnp.zeros(D)) for length in (40, 16)]
    # The text and its length, a key of two words, the output row, the step and the limit.
    assert found.slot_bytes == texts[0] + 6 * 4
    assert two.slot_bytes == 2 * texts[0] + 6 * 4
    # An entry: the text, its length, the first output row and the limit, and the keys of K samples. Once: two counters.
    assert found.parts["queue"] == found.queue_entries * (texts[1] + 3 * 4 + 5 * 8) + 2 * 4
    assert plan(kv_dtype=kv_dtype, slots=3, penalty=1.1).slot_bytes == found.slot_bytes + V  # which ids were there
    assert plan(kv_dtype=kv_dtype, slots=3, total=30).slot_bytes == nbytes(*cache_arrays(30, kv_dtype)) + 4 * D + 6 * 4


@pytest.mark.parametrize("axes", [ONE, SPREAD], ids=["1", "2x2x2"])
@pytest.mark.parametrize("kv_dtype", WIDTHS)
def test_a_plan_is_the_bytes_of_arrays_that_are_really_there(axes, kv_dtype):
    changes = {} if kv_dtype == "float32" else {"drawn": True, "num_policies": 2, "dtype": "bfloat16", "penalty": 1.1}
    found = plan(mesh=mesh_of(axes), kv_dtype=kv_dtype, slots=3, **changes)
    state, outputs = start(found.programs, policies=found.num_policies)

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert found.parts["slots"] == held(state.slots)
    assert found.parts["queue"] == held(state.queue)
    assert found.parts["responses"] == 2 * held(outputs)
    assert found.total == sum(found.parts.values())


def test_an_abstract_mesh_gives_the_same_plan():
    there = plan(mesh=mesh_of(SPREAD), slots=3, kv_dtype="int8")
    elsewhere = plan(mesh=abstract_mesh(MeshSection(**SPREAD), 8), slots=3, kv_dtype="int8")
    assert there.parts == elsewhere.parts


@pytest.mark.parametrize("kv_dtype", WIDTHS)
def test_logits_are_the_whole_vocabularys_and_what_is_read_of_a_cache_a_layers(kv_dtype):
    wide = replace(CONFIG, vocab_size=50_000)
    for axes, heads in ((ONE, K), (SPREAD, K // 2)):
        found = plan(config=wide, mesh=mesh_of(axes), slots=3, kv_dtype=kv_dtype)
        layer = 3 * 2 * jnp.zeros((heads, H, 40)).nbytes  # keys and values of three slots, in the model's float32
        assert found.parts["temporaries"] == 3 * LOGITS_COPIES * jnp.zeros(50_000).nbytes + layer


def test_draws_in_turn_share_the_memory():
    """A policy's own samples and its mixture's: the weights are there once, all else for both."""
    own, mixed = plan(slots=3), plan(slots=3, samples=2, num_policies=2)
    both = partial(plan, beside=[(mixed.programs, 2)])
    found = both(slots=3)
    assert found.beside[0].programs.shape == mixed.programs.shape
    for part in ("slots", "queue", "responses"):
        assert found.parts[part] == own.parts[part] + mixed.parts[part]
    assert found.parts["weights"] == mixed.parts["weights"] == 2 * own.parts["weights"]
    assert found.loaded_policies == 2
    room = Capacity(capacity_of(found.total), "a test")
    assert (both(capacity=room).slots, both(capacity=room).beside[0].slots) == (3, 3)
    tight = Capacity(room.bytes - 1, "a test")
    assert both(capacity=tight).slots == 2
    assert min(plan(capacity=tight).slots, plan(capacity=tight, samples=2, num_policies=2).slots) > 3  # each alone
    with pytest.raises(DnoError, match=r"3 slots of 40 tokens on each row shard for each of 2 draws .* 2 would fit"):
        both(slots=3, capacity=tight)


def compiled_fill(found, *, width):
    model = Decoder(found.programs.model.config, constrain=Constrain(found.programs.mesh, DECODE))
    programs, rows = replace(found.programs, model=model), found.programs.shape.fill_rows
    params = dict(abstract_params(model.config))
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["layers"])
    params["layers"] = (layer,) * model.config.num_hidden_layers
    state, _ = abstract_start(programs, policies=1)
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    prompts = Prompts(
        token=jax.ShapeDtypeStruct((rows, width), jnp.int32),
        length=row,
        name=jax.ShapeDtypeStruct((rows,), jnp.uint32),
        output=row,
        limit=row,
    )
    iteration = jax.ShapeDtypeStruct((), jnp.int32)
    return fill.lower((params,), state, prompts, iteration=iteration, programs=programs).compile().memory_analysis()


@pytest.mark.parametrize(("prompt_length", "width"), [(90, 90), (90, 128)], ids=["whole", "in pieces"])
def test_a_prefill_takes_the_state_in_place_and_no_more_than_is_planned(prompt_length, width):
    """A prompt in pieces is padded to whole ones, and so is its cache."""
    config = replace(CONFIG, num_hidden_layers=8, head_dim=64)
    chunk = 512 if width == prompt_length else 64
    found = plan(config=config, slots=4, prompt_length=prompt_length, prefill_chunk=chunk)
    stats = compiled_fill(found, width=width)
    state = found.parts["slots"] + found.parts["queue"]
    assert stats.alias_size_in_bytes >= state - 256
    assert stats.output_size_in_bytes - stats.alias_size_in_bytes < 1024
    planned = found.parts["temporaries"]
    assert 0.8 * planned < stats.temp_size_in_bytes < planned


def test_a_prefill_makes_a_cache_of_its_own():
    many = replace(CONFIG, num_hidden_layers=300)
    deep = plan(config=many, slots=1)
    assert deep.parts["temporaries"] > 2 * nbytes(*cache_arrays(16, "float32")) * 100  # two rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "axes"),
    [(CONFIG, {}), (CONFIG, {"data": 4, "tensor": 2}), (MIXTURE, {"data": 1, "expert": 4, "tensor": 2})],
    ids=["1", "4x2", "experts"],
)
def test_weights_are_the_bytes_of_one_devices_shards(config, axes, dtype):
    mesh = make_mesh(MeshSection(**axes), jax.devices()[: math.prod(axes.values())])
    shapes = computing_params(config, dtype)
    params = jax.tree.map(lambda leaf, held: leaf.astype(held.dtype), init_params(config, jax.random.key(0)), shapes)
    shardings = weight_shardings(mesh, DECODE, axes=param_axes(config), shapes=shapes)
    placed = jax.device_put(params, shardings)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert weight_bytes(config, mesh=mesh, dtype=dtype) == held


def test_key_heads_that_the_mesh_does_not_divide_are_refused():
    with pytest.raises(DnoError, match=r"parameter layers/k .*: size 2 cannot be split over tensor=4 devices"):
        plan(mesh=abstract_mesh(MeshSection(tensor=4), 4))


def capacity_of(usable):
    """The smallest capacity that leaves so many bytes, so that one byte less leaves one less."""
    count = next(count for count in range(usable, 2 * usable) if Capacity(count, "").usable == usable)
    assert Capacity(count - 1, "").usable == usable - 1
    return count


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_it_fits_to_the_byte(kv_dtype):
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


def test_the_most_slots_are_those_that_counting_finds():
    for room in range(310_000, 900_000, 71_000):
        found = plan(slots=1, capacity=Capacity(room, "a test"))
        slots = 1
        while found.with_slots(slots + 1).total <= found.capacity.usable:
            slots += 1
        assert found.most_slots == slots


def test_a_refusal_says_what_takes_how_much_of_what():
    capacity = Capacity(400_000, "a test")
    with pytest.raises(DnoError) as caught:
        plan(slots=1000, capacity=capacity)
    said, wanted = str(caught.value), plan(slots=1000)
    for part in (*wanted.parts.values(), wanted.total, capacity.usable, capacity.reserve):
        assert show_bytes(part) in said
    assert f"{show_bytes(400_000)} (a test)" in said
    most = int(re.search(r"(\d+) would fit", said)[1])
    assert plan(slots=most, capacity=capacity).slots == most
    with pytest.raises(DnoError):
        plan(slots=most + 1, capacity=capacity)


@pytest.mark.parametrize("slots", [1, None])
def test_not_even_one_slot_fits(slots):
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


def test_without_a_configured_number_no_more_slots_are_taken_than_are_of_use():
    for platform, most in (("cpu", CPU_SLOTS), ("gpu", ACCELERATOR_SLOTS), (None, ACCELERATOR_SLOTS)):
        found = plan(platform=platform)
        assert (found.slots, found.chosen_by) == (most, "the default")
        assert found.most_slots > most
    found = plan(num_prompts=3)
    assert (found.slots, found.chosen_by) == (15, "responses to draw")
    # Two row shards share five prompts: one has three.
    assert plan(mesh=mesh_of({"data": 2}), num_prompts=5).slots == 15
    assert plan(slots=1000, platform="cpu").chosen_by == "sampling.slots"


def test_the_queue_fills_every_slot_anew():
    assert queue_length(8, num_samples=1, fill_rows=4) == 20
    assert queue_length(64, num_samples=5, fill_rows=2) == 2 * 13 + 2
    for slots in (1, 7, 64):
        shape = plan(slots=slots).programs.shape
        assert shape.entries >= shape.fill_rows
        assert shape.entries * 5 >= slots + 5 * shape.fill_rows


def test_sizes_are_shown_in_the_unit_that_fits_them():
    shape = {
        0: "0 B",
        1023: "1023 B",
        1024: "1.00 KiB",
        3 * 2**19: "1.50 MiB",
        16 * 2**30: "16.00 GiB",
        2**41: "2.00 TiB",
    }
    assert {count: show_bytes(count) for count in shape} == shape


@pytest.mark.parametrize(("axes", "kv_dtype"), [(ONE, "int8"), ({"data": 4, "tensor": 2}, "float32")], ids=["1", "4x2"])
def test_the_plan_is_what_the_compiler_counts_on_each_device(axes, kv_dtype):
    """Arguments and results to the byte, so no cache is copied; and on a tensor axis no weight is made whole."""
    config, mesh = replace(CONFIG, vocab_size=20_000), mesh_of(axes)
    found = plan(config=config, mesh=mesh, slots=8, kv_dtype=kv_dtype)
    model = Decoder(config, constrain=Constrain(mesh, DECODE), write=ShardedWrite(mesh, DECODE))
    programs = replace(found.programs, model=model)

    def shaped(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = abstract_params(config)
    params = jax.tree.map(shaped, shapes, weight_shardings(mesh, DECODE, axes=param_axes(config), shapes=shapes))

    def one_layer(leaf):
        own = NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=own)

    params["layers"] = (jax.tree.map(one_layer, params["layers"]),) * config.num_hidden_layers
    state, outputs = abstract_start(programs, policies=1)
    marks = shaped(outputs.done, row_sharding(mesh, ndim=1))
    compiled = decode.lower(
        (params,), state, outputs, jax.ShapeDtypeStruct((), jnp.float32), fresh=marks, cancelled=marks,
        programs=programs,
    ).compile()  # fmt: skip
    stats, parts = compiled.memory_analysis(), found.parts  # both of one device
    # Held are weights, slots, queue and responses; results are what is no donated argument: the responses once more, so
    # that a copied cache would be seen. Beside the plan's there are two marks of every response and three numbers; and
    # of results a table of pointers.
    rows = (found.slots + found.queue_entries) * 5
    results = parts["responses"] // 2
    held = parts["weights"] + parts["slots"] + parts["queue"] + results
    assert 0 <= stats.argument_size_in_bytes - held <= 2 * rows + 64
    returned = stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert 0 <= returned - results < 512
    assert returned < parts["slots"]
    # The plan's is a bound of what truncations need; loops and outputs on their way add little.
    temporaries = memory._decode_temporaries(found.programs, abstract_start(found.programs, policies=1)[0])
    assert stats.temp_size_in_bytes < 1.1 * temporaries
    whole = config.vocab_size * D * 4
    assert not axes or stats.temp_size_in_bytes < temporaries + whole // 2
