"""A token a row, written in place, against the scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.model.cache import KVCache, write_layer
from dno_jax.model.cache_columns import write_columns, writes_columns

B, K, H = 5, 2, 8


@pytest.mark.parametrize("slots", [96, 300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_columns_are_written_as_the_scatter_writes_them(dtype, slots):
    rng = np.random.default_rng(slots)

    def drawn(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.integers(-90, 90, shape), dtype)

    scale = (B, K, slots) if dtype == "int8" else None
    before = KVCache(
        drawn(B, K, H, slots, dtype=dtype),
        drawn(B, K, H, slots, dtype=dtype),
        None if scale is None else drawn(*scale),
        None if scale is None else drawn(*scale),
    )
    k, v = (jnp.asarray(rng.normal(size=(B, 1, K, H)), jnp.float32) for _ in range(2))
    position = jnp.asarray([[0], [-1], [slots - 1], [17], [slots // 2]], jnp.int32)
    wanted = write_layer(before, k_BTKH=k, v_BTKH=v, position_BT=position)
    found = write_columns(before, k_BTKH=k, v_BTKH=v, position_BT=position, interpret=True)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert not np.array_equal(np.asarray(found.key), np.asarray(before.key))


def test_what_the_kernel_does_not_take_is_scattered():
    cache = KVCache(*(jnp.zeros((1, 1, 8, 16), "float8_e4m3fn") for _ in range(2)))
    assert not writes_columns(cache, length=1)
    wide = KVCache(*(jnp.zeros((1, 1, 8, 16)) for _ in range(2)))
    assert writes_columns(wide, length=1)
    assert not writes_columns(wide, length=2)
