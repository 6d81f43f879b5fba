from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.sampling.transforms import Truncation, address, inside_nucleus, sample_token, top_k_mask, without_padding

TRUNCATIONS = [
    Truncation(),
    Truncation(temperature=0.7),
    Truncation(temperature=1.5, top_k=5),
    Truncation(temperature=0.7, top_p=0.8),
    Truncation(min_p=0.2),
    Truncation(temperature=0.9, top_k=12, top_p=0.7, min_p=0.1),
    Truncation(top_p=1e-6),
]


def numpy_distribution(logits, truncation):
    """Hugging Face's order, by sorting: temperature, top-k, top-p of what is left, min-p."""
    scaled = logits.astype(np.float64) / truncation.temperature
    p = np.exp(scaled - scaled.max())
    if truncation.top_k:
        p[scaled < np.sort(scaled)[-truncation.top_k]] = 0.0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    kept = np.zeros(len(p), bool)
    kept[order[before < truncation.top_p]] = True
    kept &= p >= truncation.min_p * p.max()
    p = np.where(kept, p, 0.0)
    return p / p.sum()


def draws(logits, truncation, count, seed=0):
    key = address(
        seed=seed, iteration=0, prompt=jnp.zeros(count, jnp.uint32), sample=jnp.arange(count, dtype=jnp.int32)
    )
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(sample_token(key, rows, step=jnp.int32(3), truncation=truncation))


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [16, 300])
def test_draws_follow_the_truncated_distribution(truncation, vocabulary):
    logits = np.random.default_rng(vocabulary).normal(scale=1.5, size=vocabulary)
    expected = numpy_distribution(logits, truncation)
    count = 20_000
    found = np.bincount(draws(logits, truncation, count), minlength=vocabulary)
    assert np.all(found[expected == 0.0] == 0)
    # Chi-square over cells with enough mass; 6 sigma of its own deviation, so that a right sampler never fails by seed.
    big = expected * count >= 5
    rest = max(expected[~big].sum() * count, 1e-9)
    chi = np.sum((found[big] - expected[big] * count) ** 2 / (expected[big] * count))
    chi += (found[~big].sum() - rest) ** 2 / max(rest, 1.0)
    freedom = max(int(big.sum()), 1)
    assert chi < freedom + 6 * np.sqrt(2 * freedom) + 6


def test_kept_set_equals_numpy_on_a_thousand_rows():
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2.0, size=(1000, 40)).astype(np.float32)
    tokens = jnp.arange(40, dtype=jnp.int32)
    for top_k, top_p in [(0, 0.9), (7, 1.0), (7, 0.6), (1, 0.5), (0, 1e-9)]:
        kept = np.asarray(top_k_mask(jnp.asarray(logits), top_k))
        mass = np.where(kept, np.exp(logits - logits.max(-1, keepdims=True)), 0.0).astype(np.float32)
        accepts = partial(inside_nucleus, jnp.asarray(mass), top_p=top_p)
        inside = jax.vmap(lambda t, accepts=accepts: accepts(jnp.full(1000, t)))(tokens).T
        for row in range(1000):
            expected = numpy_distribution(logits[row], Truncation(top_k=top_k, top_p=top_p)) > 0
            np.testing.assert_array_equal(
                np.asarray(inside[row]) & kept[row], expected, err_msg=f"row {row} {top_k} {top_p}"
            )


def test_greedy_takes_the_likeliest():
    logits = np.random.default_rng(0).normal(size=50)
    assert set(draws(logits, Truncation(temperature=0.0), 8)) == {int(np.argmax(logits))}


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(scale=3.0, size=(64, 200)), jnp.float32)
    prompt, sample = jnp.arange(64, dtype=jnp.uint32), jnp.arange(64, dtype=jnp.int32) % 5
    key = address(seed=1, iteration=2, prompt=prompt, sample=sample)
    truncation = Truncation(temperature=0.8, top_p=0.5)  # half of the rows have to draw again
    together = np.asarray(sample_token(key, logits, step=jnp.int32(7), truncation=truncation))
    order = rng.permutation(64)
    np.testing.assert_array_equal(
        sample_token(key[order], logits[order], step=jnp.int32(7), truncation=truncation), together[order]
    )
    alone = [
        int(sample_token(key[i : i + 1], logits[i : i + 1], step=jnp.int32(7), truncation=truncation)[0])
        for i in range(8)
    ]
    np.testing.assert_array_equal(alone, together[:8])


def test_every_part_of_the_address_matters():
    logits = np.zeros(1000)

    def draw(seed=0, iteration=0, prompt=0, sample=0, step=0):
        key = address(
            seed=seed, iteration=iteration, prompt=jnp.asarray([prompt], jnp.uint32), sample=jnp.asarray([sample])
        )
        rows = jnp.asarray(logits, jnp.float32)[None]
        return int(sample_token(key, rows, step=jnp.int32(step), truncation=Truncation())[0])

    base = draw()
    assert draw() == base
    for part in ("seed", "iteration", "prompt", "sample", "step"):
        assert len({draw(**{part: value}) for value in range(6)}) > 3, part


def test_the_last_bin_is_never_overrun():
    # Mass at one token only, at either end of a block: rounding must not push a draw beyond it.
    for place in (0, 127, 128, 299):
        logits = np.full(300, -1e9)
        logits[place] = 0.0
        assert set(draws(logits, Truncation(), 500)) == {place}


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_padding_of_the_vocabulary_leaves_the_distribution_of_the_rest(truncation):
    """What is drawn beside impossible ids is what is drawn without them, token for token."""
    logits = 2.0 * np.random.default_rng(3).standard_normal(40).astype(np.float32)
    loud = np.concatenate([logits, np.full(24, 50.0, np.float32)])
    masked = np.asarray(without_padding(jnp.asarray(loud)[None], num_ids=40))[0]
    np.testing.assert_array_equal(masked[:40], logits)
    assert np.all(masked[40:] == -np.inf)
    np.testing.assert_array_equal(draws(masked, truncation, 500), draws(logits, truncation, 500))
    assert without_padding(jnp.asarray(loud)[None], num_ids=64).max() == 50.0
