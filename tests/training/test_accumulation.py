"""Micro-batches on a mesh: groups of devices along data go through their own, and gradients cross data once."""

import jax
import numpy as np
import pytest

from dno_jax.config import OptimizerSection
from dno_jax.plan.hlo import calls
from dno_jax.training.batches import make_batch
from dno_jax.training.packing import Packing
from tests.training.trained import begin

# Adam's first step is g / (|g| + eps): with an eps above the rounding of gradients it does not magnify that.
OPTIMIZER = OptimizerSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, eps=1e-3)


def one_step(config, params, batch, **options):
    state, take = begin(config, params, OPTIMIZER, **options)
    program = take.lowered(state, batch).compile()
    state, metrics = take(state, batch)
    return state.params, jax.tree.map(float, metrics), program


@pytest.fixture(scope="module")
def whole(config, params, rows):
    """Of five pairs in eight places: a mean by micro-batch, or by group, would weigh the others differently."""
    return one_step(config, params, make_batch(rows[:5], batch_size=8, max_length=48))


@pytest.mark.parametrize(
    ("axes", "parts", "packed"),
    [
        ((8, 1, 1), 2, False),  # a row a device: the texts of a pair are in two groups
        ((2, 2, 2), 8, True),
    ],
    ids=str,
)
def test_gradients_cross_data_once_after_the_micro_batches(config, params, rows, whole, axes, parts, packed):
    packing = Packing(packed=packed, share_prompt=packed, row_shards=axes[0] * axes[1], granule=16)
    batch = make_batch(rows[:5], batch_size=8, max_length=48, parts=parts, packing=packing)
    assert batch.token.shape[0] > 1
    found, metrics, program = one_step(config, params, batch, axes=axes)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6, err_msg=jax.tree_util.keystr(path))
    assert metrics.keys() == whole[1].keys()
    for name, value in whole[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=3e-6, err_msg=name)

    over = [one for one in calls(program.as_text()) if one.crosses(axes, 0)]
    of_pairs = batch.num_tokens[0].size
    assert [one for one in over if one.looped]  # a pair's log-probabilities, which its loss needs together
    assert all(size <= of_pairs for one in over if one.looped for size in one.sizes)
    # All gradients once, of each device's own part, which is no more than the parameters that it holds.
    held = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.size, found)
    moved = sum(size for one in over if not one.looped for size in one.sizes if size > of_pairs)
    assert moved == sum(size for size in jax.tree.leaves(held) if size > of_pairs)
