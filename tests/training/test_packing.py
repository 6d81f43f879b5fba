"""Packed batches: the same numbers as unpacked ones, and hardly any padding."""

import dataclasses
import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.config import MeshSection
from dno_jax.model.attention import SplashAttention, xla_attention
from dno_jax.model.decoder import Decoder
from dno_jax.parallel.attention import ShardedAttention
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN, Constrain
from dno_jax.training.batches import TrainingRow, batch_order, make_batch, text_lengths
from dno_jax.training.packing import BatchShape, Packing, Plan, TextLengths, lay_out, plan_batches
from dno_jax.training.state import param_shardings
from dno_jax.training.step import batch_logprobs
from tests.batches import response_tokens
from tests.training.test_step import assert_same, take_steps

LENGTH = 48
PACKED = Packing(packed=True, skips=True)
SHARED = Packing(packed=True, share_prompt=True, skips=True)


def packed(rows, packing, *, batch_size=8):
    return make_batch(rows, batch_size=batch_size, max_length=LENGTH, packing=packing)


def logprobs_and_gradients(config, params, batch, *, attention=xla_attention, mesh=None):
    """log pi of every text, by micro-batch, and the gradient of their sum weighted at random."""
    constrain = {} if mesh is None else {"constrain": Constrain(mesh, TRAIN)}
    model = Decoder(config, attention=attention, **constrain)
    part = batch.part(0) if mesh is None else batch.place(mesh).part(0)
    weight = np.random.default_rng(3).normal(size=batch.num_tokens.shape[1:]).astype(np.float32)

    def total(p):
        logprob = batch_logprobs(model, p, part, chunk=64)
        return jnp.sum(logprob * weight), logprob

    placed = params if mesh is None else jax.device_put(params, param_shardings(config, mesh, TRAIN))
    (_, logprob), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(placed)
    return np.asarray(logprob), jax.tree.map(np.asarray, gradient)


@pytest.fixture(scope="module")
def plain(config, params, rows):
    return logprobs_and_gradients(config, params, make_batch(rows[:8], batch_size=8, max_length=LENGTH))


def assert_equal(found, expected):
    """To float32 rounding of sums in another order."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=2e-5)
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(found[1]), jax.tree.leaves_with_path(expected[1]), strict=True
    ):
        scale = float(np.max(np.abs(b)))
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("packing", [PACKED, SHARED], ids=["packed", "shared prompt"])
def test_packed_rows_give_the_same_logprobs_and_gradients(config, params, rows, plain, packing):
    batch = packed(rows[:8], packing)
    assert batch.token.shape[1] == 1  # sixteen texts in one row
    assert_equal(logprobs_and_gradients(config, params, batch), plain)


@pytest.mark.parametrize("kernel", [SplashAttention(interpret=True)], ids=["splash"])
def test_kernels_keep_packed_texts_apart(config, params, rows, plain, kernel):
    assert_equal(logprobs_and_gradients(config, params, packed(rows[:8], PACKED), attention=kernel), plain)


@pytest.mark.parametrize("window", [5, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_windows_and_soft_caps_hold_in_packed_rows(config, params, rows, window, softcap):
    local = dataclasses.replace(config, windows=(window, 7), attention_softcap=softcap)
    expected = logprobs_and_gradients(local, params, make_batch(rows[:4], batch_size=4, max_length=LENGTH))
    assert_equal(logprobs_and_gradients(local, params, packed(rows[:4], SHARED, batch_size=4)), expected)


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("packing", [PACKED, SHARED], ids=["packed", "shared prompt"])
def test_meshes_split_rows_and_change_nothing(config, params, rows, plain, packing, axes):
    data, fsdp, tensor = axes
    mesh = make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: math.prod(axes)])
    batch = packed(rows[:8], dataclasses.replace(packing, row_shards=data * fsdp))
    assert batch.token.shape[1] == data * fsdp
    attention = ShardedAttention(mesh, TRAIN, xla_attention)
    assert_equal(logprobs_and_gradients(config, params, batch, attention=attention, mesh=mesh), plain)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_packed_step_is_the_unpacked_one(config, params, rows, parts):
    """Five pairs of unequal lengths in a batch of eight: filler, accumulation and packing together."""
    expected = take_steps(config, params, [make_batch(rows[:5], batch_size=8, max_length=LENGTH)])
    two_rows = dataclasses.replace(SHARED, row_shards=2)
    batch = in_parts(rows[:5], two_rows, parts)
    assert batch.token.shape[:2] == (parts, 2)
    assert_same(take_steps(config, params, [batch]), expected)


def in_parts(rows, packing, parts):
    """A batch of so many micro-batches, whatever memory it would take as one."""
    layout = lay_out(text_lengths(rows), packing, parts=parts, rows=packing.row_shards)
    shape = BatchShape(parts, layout.most_pairs, packing.row_shards, layout.longest, layout.window)
    return make_batch(rows, batch_size=8, max_length=LENGTH, plan=Plan(packing, (shape,)))


@pytest.mark.parametrize("packing", [PACKED, SHARED], ids=["packed", "shared prompt"])
def test_texts_see_nothing_of_each_other(config, params, rows, packing):
    """Other tokens in one text leave the log-probabilities of all others as they are, bit for bit."""
    others = list(rows[:8])
    changed = tuple((token + 1) % 95 + 1 for token in rows[3].response_ids[0])
    others[3] = dataclasses.replace(rows[3], response_ids=(changed, rows[3].response_ids[1]))
    score = jax.jit(partial(batch_logprobs, Decoder(config), chunk=64))
    before, after = (np.array(score(params, packed(own, packing).part(0))) for own in (rows[:8], others))
    assert before[3, 0] != after[3, 0]
    before[3, 0] = after[3, 0] = 0.0
    np.testing.assert_array_equal(before, after)


def test_a_row_without_segments_would_see_its_neighbour(config, params, rows):
    """What the test above would miss if it could not fail: without segments the numbers are others."""
    part = packed(rows[:8], PACKED).part(0)
    blind = part.replace(places=part.places.replace(segment=jnp.zeros_like(jnp.asarray(part.places.segment))))
    right, wrong = (batch_logprobs(Decoder(config), params, one, chunk=64) for one in (part, blind))
    assert float(jnp.max(jnp.abs(right - wrong))) > 0.1


def test_supervised_rows_are_packed_too(config, params, rows):
    examples = [TrainingRow(row.prompt_ids[:1], row.response_ids[:1], (0.0,)) for row in rows[:8]]
    whole, own = (make_batch(examples, batch_size=8, max_length=LENGTH, packing=how) for how in (SHARED, None))
    assert whole.places.branch is None
    found, expected = (batch_logprobs(Decoder(config), params, one.part(0), chunk=64) for one in (whole, own))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


# What lies where, on the host alone.


def test_a_shared_prompt_stands_once_with_its_responses_as_branches():
    row = TrainingRow(((1, 2, 3), (1, 2, 3)), ((4, 5), (6,)))
    other = TrainingRow(((7,), (8,)), ((9,), (10, 11)))  # two prompts: nothing to share
    batch = make_batch([row, other], batch_size=2, max_length=8, packing=dataclasses.replace(SHARED, granule=1))
    assert batch.token[0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 8, 10, 11, 0]
    assert batch.places.position[0, 0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 0, 1, 2, -1]
    assert batch.places.segment[0, 0].tolist() == [0] * 6 + [6] * 2 + [8] * 3 + [-1]
    assert batch.places.branch[0, 0].tolist() == [0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 0, 0]
    assert batch.source[0, 0].tolist() == [2, 3, 2, 6, 8, 9]  # the first token of either branch: the prompt's last
    assert batch.text[0, 0].tolist() == [0, 0, 1, 2, 3, 3]
    assert [response_tokens(batch, p, c).tolist() for p in range(2) for c in range(2)] == [[4, 5], [6], [9], [10, 11]]


def like_answers(count, rng, *, longest):
    """Lengths as those of answers to instructions: long-tailed, cut at a limit."""
    prompt = np.minimum(rng.lognormal(3.6, 0.9, count).astype(int) + 8, longest // 4)
    response = np.minimum(rng.lognormal(5.4, 0.8, (count, 2)).astype(int) + 1, longest - longest // 4)
    return TextLengths(np.repeat(prompt[:, None], 2, axis=1), response, np.ones(count, bool))


@pytest.mark.parametrize(
    "packing",
    [
        Packing(packed=True, share_prompt=True, skips=True, granule=32),
        Packing(packed=True, row_shards=16, granule=128),
        Packing(packed=True, share_prompt=True, row_shards=8, granule=64),
    ],
    ids=["cpu", "16 devices, splash", "8 devices, xla"],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_less_than_five_percent_is_padding_in_few_programs(packing, parts):
    rng = np.random.default_rng(0)
    lengths = like_answers(1 << 14, rng, longest=1024)
    order = list(batch_order(1 << 14, batch_size=128, num_epochs=1, seed=0, iteration=0))
    plan = plan_batches(lengths, order, packing, batch_size=128, parts=parts, max_length=1024)
    assert len(plan.shapes) <= 8
    used = computed = 0
    for batch in order:
        own = lengths.take(batch)
        layout, shape = plan.lay_out(own)
        assert shape.rows % packing.row_shards == 0
        # A pass over a micro-batch holds no more tokens than that of an unpacked one.
        assert shape.rows * shape.length <= 128 // parts * 2 * 1024
        prompts = own.prompt.sum() - (own.prompt[:, 1].sum() if packing.share_prompt else 0)
        used += prompts + own.response.sum()
        computed += shape.num_tokens
        assert layout.most_pairs <= shape.pairs
    assert 1 - used / computed < 0.05


def test_the_layout_is_of_the_lengths_alone():
    rng = np.random.default_rng(1)
    lengths = like_answers(64, rng, longest=512)
    one, two = (lay_out(lengths, PACKED, parts=2, rows=4) for _ in range(2))
    for name in ("part", "place", "row", "prompt", "response"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    # No two texts of a row overlap, and a pair's texts are in one micro-batch.
    spans = {}
    for pair in range(64):
        for c in range(2):
            key = (one.part[pair], one.row[pair, c])
            start = one.prompt[pair, c]
            spans.setdefault(key, []).append((start, start + lengths.prompt[pair, c] + lengths.response[pair, c]))
    for own in spans.values():
        own.sort()
        assert all(a[1] == b[0] for a, b in pairwise(own)), own
        assert own[0][0] == 0
