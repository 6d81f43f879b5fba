from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.model.config import ModelConfig
from dno_jax.model.layers import rms_norm, rope, rope_angles


def test_rope_pairs_halves_and_depends_on_differences_only():
    H, theta = 6, 100.0
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, H))
    y = jax.random.normal(jax.random.key(1), (1, 1, 1, H))

    def at(z, position):
        return np.asarray(rope(z, *rope_angles(jnp.array([[position]]), head_dim=H, theta=theta)), np.float64)[0, 0, 0]

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
    ],
)
def test_config_refuses_contradictions(config, change, words):
    import dataclasses

    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config, **change)
    assert hash(config) == hash(dataclasses.replace(config))
    assert isinstance(config, ModelConfig)
