"""Blockwise attention against attention over the whole square, and which blocks it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.model.attention import attend
from dno_jax.model.blockwise import blockwise_attention, visible_blocks
from dno_jax.model.places import NO_WINDOW, Places, visible

BLOCK = 64


def laid_out(texts, length):
    """One row of (prompt, responses...) lengths, each text a segment with a branch per response, then padding."""
    position, segment, branch = np.full(length, -1), np.full(length, -1), np.zeros(length, int)
    at = 0
    for prompt, *responses in texts:
        first = at
        for number, count in enumerate((prompt, *responses)):
            here = slice(at, at + count)
            position[here] = np.arange(count) + (prompt if number else 0)
            segment[here], branch[here] = first, number
            at += count
    return Places(*(jnp.asarray(array[None], jnp.int32) for array in (position, segment, branch)))


TEXTS = [(50, 90, 30), (5, 200, 100), (64, 64, 64), (3, 2, 1), (100, 1, 60)]


def whole_square(q, k, v, places, *, window, scale, softcap):
    """Every query against every key: the plain form, masked."""
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)
    return attend(q, keys, values, visible(places, places, window), scale=scale, softcap=softcap)


@pytest.mark.parametrize(("window", "softcap"), [(NO_WINDOW, None), (37, None), (NO_WINDOW, 2.0)])
def test_values_and_gradients_are_those_of_the_whole_square(window, softcap):
    """To 3e-6 of the largest: float32 rounding of sums in another order. Two key heads for six of queries."""
    length = 900  # no multiple of a block, with padding at its end
    places = laid_out(TEXTS, length)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (1, length, n, 16)) for key, n in zip(keys, (6, 2, 2, 6), strict=True))
    real = (places.position >= 0)[..., None, None]

    def run(attention):
        def mixed(q, k, v):
            out = attention(q, k, v, places, window=window, scale=0.25, softcap=softcap)
            return jnp.where(real, out, 0.0)

        out, back = jax.vjp(mixed, q, k, v)
        return out, *back(g)

    for found, expected in zip(jax.jit(lambda: run(blockwise_attention))(), run(whole_square), strict=True):
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, expected, atol=3e-6 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("seed", range(5))
def test_every_key_that_is_seen_is_in_a_block_that_is_read(seed):
    rng = np.random.default_rng(seed)
    texts = [tuple(rng.integers(1, 150, rng.integers(2, 5)).tolist()) for _ in range(8)]
    length = sum(map(sum, texts)) + int(rng.integers(1, 100))
    places = laid_out(texts, length + -length % BLOCK)
    seen = np.asarray(visible(places, places)[0]).reshape(-1, BLOCK, places.position.shape[1] // BLOCK, BLOCK)
    needed, read = seen.any(axis=(1, 3)), np.asarray(visible_blocks(places, block=BLOCK))
    assert not (needed & ~read).any()
    assert read.sum() < 1.5 * needed.sum()  # and hardly any that is dark


def test_other_texts_and_other_branches_are_left_out():
    places = laid_out([(BLOCK, BLOCK, BLOCK), (BLOCK, BLOCK, BLOCK)], 7 * BLOCK)
    one = [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    expected = np.zeros((7, 7), bool)
    expected[:3, :3] = expected[3:6, 3:6] = one
    np.testing.assert_array_equal(visible_blocks(places, block=BLOCK), expected)
