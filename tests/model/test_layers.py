from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.model.attention import attend, visible
from dno_jax.model.config import ModelConfig, RopeConfig
from dno_jax.model.layers import layer_norm, rms_norm, scaled
from dno_jax.model.rope import frequencies, rope_angles, rotate


def qkv(B=2, T=5, S=7, N=6, K=2, H=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k = jax.random.normal(keys[1], (B, S, K, H))
    v = jax.random.normal(keys[2], (B, S, K, H))
    return q, k, v


def test_attention_equals_jax():
    """jax.nn.dot_product_attention is an independent implementation of grouped attention.

    1e-6: outputs are means of values of order one, summed over 7 keys in another order.
    """
    q, k, v = qkv()
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, 5, 7)).at[:, :, 0].set(True)
    ours = attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, scale=q.shape[-1] ** -0.5)
    theirs = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("length", [64, 65, 200, 700])
def test_blocks_of_queries_change_nothing(length):
    """Whole sequences are cut into blocks that skip keys after them; rows are padded left, right and in the middle.

    1e-6 as above; gradients of early keys are sums over all later queries, so they are compared relative to their size.
    """
    q, k, v = qkv(B=4, T=length, S=length)
    kept = np.ones((4, length), bool)
    kept[1, : length // 3] = kept[2, length // 2 :] = kept[3, 10:20] = False
    position = jnp.asarray(np.where(kept, np.cumsum(kept, axis=1) - 1, -1), jnp.int32)
    mask = visible(position, position)
    weight = jnp.asarray(kept, jnp.float32)[:, :, None, None]

    def ours(q, k, v):
        return attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, scale=q.shape[-1] ** -0.5) * weight

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]) * weight

    np.testing.assert_allclose(ours(q, k, v), theirs(q, k, v), atol=1e-6)
    for a, b in zip(
        jax.grad(lambda *x: jnp.sum(jnp.sin(ours(*x))), (0, 1, 2))(q, k, v),
        jax.grad(lambda *x: jnp.sum(jnp.sin(theirs(*x))), (0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=3e-6)


def test_a_query_that_sees_nothing_is_finite_also_in_the_gradient():
    q, k, v = qkv()
    mask = jnp.zeros((2, 5, 7), bool).at[0].set(True)

    def total(q, k, v):
        out = attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, scale=q.shape[-1] ** -0.5)
        return jnp.sum(out[0])  # the blind row is masked away by the caller

    out = attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, scale=q.shape[-1] ** -0.5)
    assert np.isfinite(out).all()
    for gradient in jax.grad(total, argnums=(0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient[1]) == 0).all()


def test_visibility_is_decided_by_positions_alone():
    query = jnp.array([[-1, 0, 2]])
    key = jnp.array([[2, -1, 0, 1, 3]])
    expected = [[[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 1, 1, 0]]]
    np.testing.assert_array_equal(visible(query, key), np.array(expected, bool))


def test_rope_pairs_halves_and_depends_on_differences_only():
    H, theta = 6, 100.0
    config = ModelConfig(8, 6, 8, 1, 1, 1, H, rope_theta=theta)
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, H))
    y = jax.random.normal(jax.random.key(1), (1, 1, 1, H))

    def at(z, position):
        cos, sin = rope_angles(config, jnp.array([[position]]))
        return np.asarray(rotate(z, cos[0], sin[0]), np.float64)[0, 0, 0]

    np.testing.assert_array_equal(at(x, 0), np.asarray(x)[0, 0, 0])
    # By hand: dimension i turns with i + H/2 at theta ** (-2 i / H).
    angle = 7 * theta ** (-2 * np.arange(3) / H)
    turned = np.asarray(x, np.float64)[0, 0, 0].reshape(2, 3)
    by_hand = np.concatenate(
        [turned[0] * np.cos(angle) - turned[1] * np.sin(angle), turned[1] * np.cos(angle) + turned[0] * np.sin(angle)]
    )
    # 3e-6: an angle of 7 radians in float32 is known to 5e-7, times components of order one.
    np.testing.assert_allclose(at(x, 7), by_hand, atol=3e-6)
    np.testing.assert_allclose(at(x, 3) @ at(y, 9), at(x, 20) @ at(y, 26), atol=2e-5)  # angles up to 26 radians


def test_a_partial_rotation_leaves_the_rest_of_a_head():
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 10))
    config = ModelConfig(8, 6, 8, 1, 2, 2, 10, rotary_dim=6)
    cos, sin = rope_angles(config, jnp.array([[7]]))
    whole = ModelConfig(8, 6, 8, 1, 2, 2, 6)
    np.testing.assert_array_equal(rotate(x, cos[0], sin[0])[..., 6:], x[..., 6:])
    expected = rotate(x[..., :6], *(angle[0] for angle in rope_angles(whole, jnp.array([[7]]))))
    np.testing.assert_array_equal(rotate(x, cos[0], sin[0])[..., :6], expected)


def test_zero_frequencies_rotate_by_nothing_at_all():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    config = ModelConfig(8, 6, 8, 1, 2, 2, 8, ropes=(RopeConfig("none"),))
    cos, sin = rope_angles(config, jnp.array([[0, 5, 1000]]))
    np.testing.assert_array_equal(rotate(x, cos[0], sin[0]), x)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    """By hand, wavelengths 2 pi 10^i and contexts that split them into kept, blended and divided."""
    rope = RopeConfig("llama3", 10.0**8, 8.0, 4096, low_freq_factor=1.0, high_freq_factor=4.0)
    config = ModelConfig(8, 6, 8, 1, 2, 2, 16, ropes=(rope,))
    plain = 0.1 ** np.arange(8)
    expected = plain / 8
    expected[:3] = plain[:3]  # wavelengths to 628, below 4096 / 4
    # 6283 exceeds 4096 / 1: nothing is blended here. 1e-6: three roundings of float32.
    np.testing.assert_allclose(frequencies(config, rope), expected, rtol=1e-6)
    blended = RopeConfig("llama3", 10.0**8, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    share = (8192 / (2 * np.pi * 1000) - 1) / 3
    assert frequencies(config, blended)[3] == pytest.approx(1e-3 * (share + (1 - share) / 8), rel=1e-6)


def test_norms_of_several_axes_and_of_none():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    scale = jnp.arange(1, 21, dtype=jnp.float32).reshape(4, 5)
    flat = rms_norm(x.reshape(2, 3, 20), scale.reshape(20), eps=1e-5)
    # 1e-6: twenty squares in another order.
    np.testing.assert_allclose(rms_norm(x, scale, eps=1e-5).reshape(2, 3, 20), flat, rtol=1e-6, atol=1e-6)
    wide = np.asarray(x, np.float64)
    expected = 3 * (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer_norm(x, eps=1e-5, scale=3.0), expected, rtol=1e-5, atol=1e-5)


def test_scales_multiply_in_float32():
    x = jnp.asarray([1.0, 3.0], jnp.bfloat16)
    assert scaled(x, 1.0) is x
    # 0.22 rounded to bfloat16 first would be 0.2197, and thrice that another number.
    np.testing.assert_array_equal(scaled(x, 0.22), jnp.asarray([0.22, 0.66], jnp.bfloat16))


def test_rms_norm_works_in_float32_inside():
    x = (jnp.arange(1, 9, dtype=jnp.float32) * 100).astype(jnp.bfloat16)[None]
    scale = jnp.linspace(0.5, 2.0, 8)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean() + 1e-6) * np.asarray(scale, np.float64)
    out = rms_norm(x, scale, eps=1e-6)
    assert out.dtype == jnp.bfloat16
    # One rounding to bfloat16 at the end: half a unit in the last of 8 bits.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rotary_dim": 5}, "rotary_dim is 5"),
        ({"rotary_dim": 10}, "rotary_dim is 10"),
        ({"windows": (4, 4)}, "windows has 2 entries; expected one for each of 3 layers"),
        ({"windows": (4, 0, 4)}, "windows is"),
        ({"layer_ropes": (0, 1, 0)}, "layer_ropes is .* expected 0 to 0"),
        ({"attention_softcap": -1.0}, "attention_softcap is -1"),
        ({"norm": "layer", "qk_norm": "head"}, "qk_norm"),
        ({"ropes": (RopeConfig("longrope", short_factor=(1.0, 2.0)),)}, "have 2 numbers; expected 4"),
    ],
)
def test_config_refuses_contradictions(config, change, words):
    import dataclasses

    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config, **change)
    assert hash(config) == hash(dataclasses.replace(config))
    assert isinstance(config, ModelConfig)
