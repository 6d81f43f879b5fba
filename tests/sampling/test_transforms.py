import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from jax.sharding import NamedSharding, PartitionSpec
from transformers.generation import logits_process as hf

from dno_jax.addresses import Purpose
from dno_jax.sampling.transforms import (
    Truncation,
    _first_above,
    _inverse_cdf,
    address,
    drawn_logprobs,
    penalised,
    sample_token,
    without_padding,
)

TRUNCATIONS = [
    Truncation(),
    Truncation(temperature=0.7),
    Truncation(top_k=5),
    Truncation(top_p=0.8),
    Truncation(min_p=0.2),
    Truncation(repetition_penalty=1.7),
    Truncation(top_p=1e-6),
    Truncation(temperature=1.5, top_k=5, top_p=0.9),
    Truncation(temperature=0.7, top_p=0.8, min_p=0.1),
    Truncation(temperature=1.3, top_k=12, top_p=0.7, min_p=0.1, repetition_penalty=1.3),
]
# Each rule by itself is for the soak; the last has them all.
EACH_AND_ALL = [*(pytest.param(one, marks=pytest.mark.soak) for one in TRUNCATIONS[:-4]), *TRUNCATIONS[-4:]]
# A right sampler fails one chi-square test with this probability, over the choice of the seed. The seeds are fixed, so
# a test that passes goes on passing; with 20 of them the first run was to fail by bad luck once in 50,000.
FALSE_ALARM = 1e-6
LOWEST, HIGHEST = 0.0, 1.0 - 2.0**-24  # of the float32 numbers in [0, 1)

draw = jax.jit(sample_token, static_argnames="truncation")
drawn = jax.jit(drawn_logprobs, static_argnames="truncation")


def reference(logits, truncation, seen=None):
    """One row's distribution in float64, by sorting: repetition, temperature, top-k, top-p of the rest, min-p."""
    scores = logits.astype(np.float64)
    if seen is not None:
        factor = truncation.repetition_penalty
        scores = np.where(seen, np.where(scores > 0, scores / factor, scores * factor), scores)
    scores = scores / truncation.temperature
    p = np.exp(scores - scores.max())
    if truncation.top_k:
        p[scores < np.sort(scores)[-truncation.top_k]] = 0.0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    likelier = np.cumsum(p[order]) - p[order]
    first_of_its_ties = np.searchsorted(-p[order], -p[order], side="left")
    kept = np.zeros(len(p), bool)
    kept[order] = likelier[first_of_its_ties] < truncation.top_p
    p = np.where(kept & (p >= truncation.min_p * p.max()), p, 0.0)
    return p / p.sum()


def rows_with_ties(count=1000, vocabulary=40):
    """A quarter each: no ties; logits in steps of a half; the same with impossible ids; all equal or nearly all."""
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2.0, size=(count, vocabulary)).astype(np.float32)
    quarter = count // 4
    logits[quarter:] = np.round(2 * logits[quarter:]) / 2
    impossible = rng.random((2 * quarter, vocabulary)) < rng.random((2 * quarter, 1)) * 0.9
    logits[3 * quarter :] = np.where(rng.random((quarter, vocabulary)) < 0.05, 1.0, rng.normal(size=(quarter, 1)))
    logits[2 * quarter :][impossible] = -np.inf
    logits[2 * quarter :, 7] = 0.5  # one id is possible in every row
    return logits, rng.random((count, vocabulary)) < 0.3


def keys(count, *, samples=None, seed=0):
    samples = samples or count
    row = jnp.arange(count, dtype=jnp.int32)
    return address(
        purpose=Purpose.RESPONSE,
        seed=seed,
        iteration=0,
        prompt=(row // samples).astype(jnp.uint32),
        sample=row % samples,
    )


def draws(logits, truncation, count, seen=None):
    """Many draws from one row of logits; half of them differ in the sample, half in the step."""
    row = jnp.arange(count, dtype=jnp.int32)
    name = jnp.zeros(count, jnp.uint32)
    key = address(purpose=Purpose.RESPONSE, seed=0, iteration=0, prompt=name, sample=row % 100)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    seen = None if seen is None else jnp.broadcast_to(jnp.asarray(seen), rows.shape)
    return np.asarray(draw(key, rows, step=row // 100, truncation=truncation, seen=seen))


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [16, 300])
def test_draws_follow_the_truncated_distribution(truncation, vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(scale=1.5, size=vocabulary).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # some tie
    seen = rng.random(vocabulary) < 0.4
    expected = reference(logits, truncation, seen)
    count = 20_000
    found = np.bincount(draws(logits, truncation, count, seen), minlength=vocabulary)
    assert np.all(found[expected == 0.0] == 0)
    # Cells of fewer than 20 expected draws are counted together: chi-square is a limit of many draws.
    big = expected * count >= 20
    cells = np.append(found[big], found[~big].sum()), np.append(expected[big], expected[~big].sum()) * count
    observed, wanted = (cell[cells[1] > 0] for cell in cells)
    chi = np.sum((observed - wanted) ** 2 / wanted)
    assert chi <= scipy.stats.chi2.isf(FALSE_ALARM, df=len(wanted) - 1) if len(wanted) > 1 else chi == 0


@pytest.mark.parametrize("truncation", EACH_AND_ALL, ids=str)
def test_kept_set_and_drawn_logprobs_equal_numpy_on_a_thousand_rows(truncation):
    logits, seen = rows_with_ties()
    expected = np.stack([reference(*row) for row in zip(logits, [truncation] * 1000, seen, strict=True)])
    each = jax.vmap(lambda t: drawn(logits, jnp.full(1000, t), truncation=truncation, seen=seen), out_axes=1)
    found = np.asarray(each(jnp.arange(40, dtype=jnp.int32)))
    np.testing.assert_array_equal(found > -np.inf, expected > 0)
    # Scaled logits reach 20, where float32 is right to 1e-6; their difference and two logarithms err as much again.
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, atol=5e-6)
    np.testing.assert_allclose(found[expected > 0], np.log(expected[expected > 0]), atol=5e-6)

    key, times = keys(1000), np.zeros((1000, 40), int)
    for step in range(300):
        token = draw(key, logits, step=jnp.full(1000, step), truncation=truncation, seen=seen)
        times[np.arange(1000), np.asarray(token)] += 1
    assert np.all(times[expected == 0] == 0)
    assert np.all(times[expected > 0.1] > 0)  # 300 draws miss such a token with probability 2e-14


def test_the_likeliest_are_drawn_where_they_tie_with_all():
    found = np.bincount(draws(np.zeros(20), Truncation(top_k=1, top_p=1e-3, min_p=0.99), 4000), minlength=20)
    assert found.min() > 100  # 200 expected, standard deviation 14
    assert set(draws(np.zeros(20), Truncation(temperature=0.0), 50)) == {0}


def test_greedy_takes_the_likeliest_after_the_repetition_penalty():
    logits = np.asarray([[1.0, 3.0, 2.0, 2.0, -1.0]], np.float32)
    seen = np.asarray([[False, True, False, False, False]])
    for truncation, mask, best in (
        (Truncation(temperature=0.0, top_k=2, top_p=0.5, min_p=0.5), None, 1),
        (Truncation(temperature=0.0, repetition_penalty=2.0), seen, 2),  # 3 becomes 1.5; 2 ties with 3
    ):
        assert draw(keys(1), logits, step=jnp.int32(0), truncation=truncation, seen=mask).tolist() == [best]
        each = [float(drawn(logits, jnp.asarray([t]), truncation=truncation, seen=mask)[0]) for t in range(5)]
        assert each == [0.0 if t == best else -np.inf for t in range(5)]


def hugging_face(truncation):
    """Its processors, one of each kind, in the order in which `generate` puts them."""
    return [
        hf.RepetitionPenaltyLogitsProcessor(truncation.repetition_penalty),
        hf.TemperatureLogitsWarper(truncation.temperature),
        hf.TopKLogitsWarper(truncation.top_k),
        hf.TopPLogitsWarper(truncation.top_p),
        hf.MinPLogitsWarper(truncation.min_p),
    ]


def composed(processors, ids, logits):
    scores = torch.tensor(logits)
    for processor in processors:
        scores = processor(torch.tensor(ids), scores)
    return scores.log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(8)
    logits = rng.normal(scale=2.0, size=(300, 50)).astype(np.float32)
    ids = rng.integers(0, 50, size=(300, 30))
    seen = np.zeros((300, 50), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    return ids, logits, seen


@pytest.mark.parametrize("penalty", [0.6, 1.0, 1.8])
def test_repetition_penalty_is_hugging_faces(texts, penalty):
    ids, logits, seen = texts
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(logits)).numpy()
    found = np.asarray(penalised(jnp.asarray(logits), jnp.asarray(seen), penalty=penalty))
    np.testing.assert_allclose(found, expected, rtol=2.0**-22)  # XLA multiplies by the reciprocal
    np.testing.assert_array_equal(found[~seen], logits[~seen])


@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(temperature=1.4, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
        Truncation(temperature=0.6, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=0.8),
    ],
    ids=str,
)
def test_the_order_is_hugging_faces(texts, truncation):
    ids, logits, seen = texts
    each = jax.vmap(lambda t: drawn(logits, jnp.full(300, t), truncation=truncation, seen=seen), out_axes=1)
    found = np.asarray(each(jnp.arange(50, dtype=jnp.int32)))
    processors = hugging_face(truncation)
    expected = composed(processors, ids, logits)
    np.testing.assert_array_equal(found > -np.inf, expected > -np.inf)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # both float32
    # The rows tell this order from its neighbours. Two pairs commute: a penalty is a factor of the logit like the
    # temperature, and temperature leaves the k likeliest what they are.
    for first in (2, 3):
        swapped = [*processors]
        swapped[first : first + 2] = processors[first + 1], processors[first]
        assert np.any((composed(swapped, ids, logits) > -np.inf) != (found > -np.inf)), first
    for late in (processors[1:] + processors[:1], processors[:1] + processors[2:] + processors[1:2]):
        assert np.any((composed(late, ids, logits) > -np.inf) != (found > -np.inf))


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(scale=3.0, size=(64, 200)), jnp.float32)
    seen = jnp.asarray(rng.random((64, 200)) < 0.2)
    key, step = keys(64, samples=5, seed=1), jnp.asarray(rng.integers(0, 9, size=64), jnp.int32)
    # Half of the rows have to draw again.
    truncation = Truncation(temperature=0.8, top_k=50, top_p=0.5, min_p=0.01, repetition_penalty=1.2)
    run = partial(draw, truncation=truncation)
    together = np.asarray(run(key, logits, step=step, seen=seen))
    order = rng.permutation(64)
    np.testing.assert_array_equal(run(key[order], logits[order], step=step[order], seen=seen[order]), together[order])
    for row in range(8):
        own = slice(row, row + 1)
        assert int(run(key[own], logits[own], step=step[own], seen=seen[own])[0]) == together[row]
        # One number for all rows is that number in each.
        assert int(run(key, logits, step=step[row], seen=seen)[row]) == together[row]
    # Neighbours may hold anything.
    wild = logits.at[::2].set(jnp.nan).at[::4].set(jnp.inf)
    np.testing.assert_array_equal(run(key, wild, step=step, seen=seen)[1::2], together[1::2])


def test_every_part_of_the_address_matters():
    rows = jnp.zeros((1, 1000), jnp.float32)

    def one(seed=0, iteration=0, prompt=0, sample=0, step=0):
        prompt, sample = jnp.asarray([prompt], jnp.uint32), jnp.asarray([sample])
        key = address(purpose=Purpose.RESPONSE, seed=seed, iteration=iteration, prompt=prompt, sample=sample)
        return int(draw(key, rows, step=jnp.asarray([step]), truncation=Truncation())[0])

    base = one()
    assert one() == base
    for part in ("seed", "iteration", "prompt", "sample", "step"):
        assert len({one(**{part: value}) for value in range(6)}) > 3, part


@pytest.mark.timeout(120, method="thread")  # a loop on the device hears no signal
@pytest.mark.parametrize(
    "top_p", [1e-45, *(pytest.param(one, marks=pytest.mark.soak) for one in (0.5, 1e-30, 1.0 - 1e-12))]
)
def test_every_loop_ends(top_p):
    near = np.linspace(0.0, 1e-3, 4096, dtype=np.float32)  # thousands are rejected before the likeliest comes by chance
    huge = np.where(np.arange(4096) % 2 == 0, 3e38, -3e38).astype(np.float32)
    nan, part = np.full(4096, np.nan, np.float32), np.where(near > 5e-4, np.nan, near)
    infinite, impossible = np.where(near > 5e-4, np.inf, near), np.full(4096, -np.inf, np.float32)
    logits = jnp.asarray(np.stack([near, 0 * near, huge, 1e-40 * near, nan, part, infinite, impossible]), jnp.float32)
    for truncation in (
        Truncation(top_p=top_p),
        Truncation(temperature=1e-6, top_p=top_p),
        Truncation(temperature=1e6, top_k=4000, top_p=top_p, min_p=0.1),
    ):
        token = draw(keys(8), logits, step=jnp.arange(8), truncation=truncation)
        assert np.all((token >= 0) & (token < 4096))
        assert int(token[2]) % 2 == 0
        logprob = np.asarray(drawn(logits, token, truncation=truncation))
        assert np.all(np.isfinite(logprob[:4]))
        assert np.all(np.isnan(logprob[4:]))  # not a number that could be taken for one


def test_the_inverse_cdf_gives_each_token_its_share_and_the_others_nothing():
    rng = np.random.default_rng(6)
    mass = np.where(rng.random(700) < 0.7, 0.0, np.exp(rng.normal(size=700))).astype(np.float32)
    mass[:140] = mass[256:400] = mass[-70:] = 0.0  # a first, a middle and a last block begin or end with nothing
    count = 1 << 16
    uniform = (jnp.arange(count) + 0.5) / count
    token = jax.lax.map(lambda u: _inverse_cdf(jnp.asarray(mass)[None])(u[None])[0], uniform, batch_size=4096)
    found = np.bincount(np.asarray(token), minlength=700)
    assert np.all(found[mass == 0] == 0)
    # An interval of length p holds p * count points of the grid, give or take one; rounding moves either end by less.
    np.testing.assert_allclose(found, count * (mass.astype(np.float64) / mass.sum(dtype=np.float64)), atol=2.0)


@pytest.mark.parametrize("vocabulary", [1, 127, 300, 128_256])
def test_a_token_without_mass_is_never_drawn_at_any_border(vocabulary):
    rng = np.random.default_rng(vocabulary)
    rows = 24
    mass = np.where(rng.random((rows, vocabulary)) < 0.003, np.exp(3 * rng.normal(size=(rows, vocabulary))), 0.0)
    mass[np.arange(rows), rng.integers(0, vocabulary, size=rows)] = 1.0
    mass = (mass / mass.max(axis=1, keepdims=True)).astype(np.float32)
    at = jax.jit(lambda uniform: _inverse_cdf(jnp.asarray(mass))(uniform))
    uniforms = [np.full(rows, u) for u in (LOWEST, 2.0**-24, 0.5, HIGHEST)]
    ends = np.cumsum(mass, axis=1, dtype=np.float64)
    for _ in range(100):  # a border of two tokens, hit from both sides
        border = np.take_along_axis(ends / ends[:, -1:], rng.integers(0, vocabulary, size=(rows, 1)), axis=1)[:, 0]
        uniforms += [np.clip(border + side * 2.0**-24, LOWEST, HIGHEST) for side in (-2, -1, 0, 1, 2)]
    for uniform in uniforms:
        token = np.asarray(at(jnp.asarray(uniform, jnp.float32)))
        assert np.all(mass[np.arange(rows), token] > 0)


def test_sums_that_rise_over_nothing_or_fall_choose_a_bin_with_mass():
    # Sums made in parallel: the second bin is empty and rises by a rounding, the fourth is not and falls by one.
    tiny = 2.0**-23
    mass = jnp.asarray([[1.0, 0.0, 1.0, 1e-9, 0.0]] * 5)
    ends = jnp.asarray([[1.0, 1.0 + tiny, 2.0 + 2 * tiny, 2.0, 2.0]] * 5)
    goal = jnp.asarray([0.0, 1.0, 1.0 + tiny, 2.0, 2.5])
    np.testing.assert_array_equal(_first_above(mass, ends, goal), [0, 2, 2, 2, 3])
    np.testing.assert_array_equal(_first_above(jnp.zeros((5, 5)), jnp.zeros((5, 5)), goal), 0)


@pytest.mark.parametrize(
    "truncation", [*(pytest.param(one, marks=pytest.mark.soak) for one in TRUNCATIONS[-3:-1]), TRUNCATIONS[-1]], ids=str
)
def test_padding_of_the_vocabulary_leaves_the_distribution_of_the_rest(truncation):
    """What is drawn beside impossible ids is what is drawn without them, token for token."""
    truncation = dataclasses.replace(truncation, repetition_penalty=1.0)
    logits = 2.0 * np.random.default_rng(3).standard_normal(40).astype(np.float32)
    loud = np.concatenate([logits, np.full(24, 50.0, np.float32)])
    masked = np.asarray(without_padding(jnp.asarray(loud)[None], num_ids=40))[0]
    np.testing.assert_array_equal(masked[:40], logits)
    assert np.all(masked[40:] == -np.inf)
    np.testing.assert_array_equal(draws(masked, truncation, 500), draws(logits, truncation, 500))
    assert without_padding(jnp.asarray(loud)[None], num_ids=64).max() == 50.0


def test_rows_that_are_split_over_devices_stay_there():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    key, logits, step = jax.device_put((keys(16), jnp.zeros((16, 300)), jnp.zeros(16, jnp.int32)), rows)
    truncation = Truncation(top_k=9, top_p=0.9, min_p=0.1)
    for programs, allowed in (
        (draw.lower(key, logits, step=step, truncation=truncation), {"pred[]"}),  # whether a row has to draw again
        (drawn.lower(logits, step, truncation=truncation), set()),
    ):
        text = programs.compile().as_text()
        moved = re.findall(r"= (\S+?)(?:\{\S*)? (?:all-|collective-|reduce-scatter)", text)
        assert set(moved) == allowed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-38),
        ("temperature", 9e-7),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_a_number_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value}; expected .*\d"):
        Truncation(**{name: value})


def test_a_penalty_needs_the_ids_that_were_seen():
    with pytest.raises(ValueError, match=r"repetition_penalty is 1.2 but seen is None"):
        sample_token(keys(1), jnp.zeros((1, 4)), step=jnp.int32(0), truncation=Truncation(repetition_penalty=1.2))
