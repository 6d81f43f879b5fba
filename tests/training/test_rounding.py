"""What is held in bfloat16 arrives where float32 does: rounded at random, right on average, restarted bit for bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.config import OptimizerSection
from dno_jax.errors import DnoError
from dno_jax.model.decoder import Decoder
from dno_jax.model.params import computing_params
from dno_jax.training import step
from dno_jax.training.batches import make_batch
from dno_jax.training.checkpoint import StateCheckpoints, load_policy, save_policy
from dno_jax.training.rounding import stochastically_rounded, stored, widened
from dno_jax.training.step import score_step, train_step
from tests.training.trained import begin

BITS = ml_dtypes.finfo(jnp.bfloat16)
SMALLEST = float(BITS.smallest_subnormal)


def test_the_mean_over_keys_is_the_number_itself():
    """Signs, subnormals, the step to the next exponent: within 4 sigma of 10^4 draws, and only the two neighbours."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=200), 1e-38 * rng.normal(size=50), SMALLEST * rng.normal(size=20)])
    x = np.concatenate([x, [1.9999, -1.9999, 0.4 * SMALLEST, 1e30, -3.3e38, 2.0**-126 * 0.9999]]).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 10**4)
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape, jnp.uint16))(keys)
    drawn = jax.jit(jax.vmap(stochastically_rounded, in_axes=(None, 0)))(x, bits)
    drawn = np.asarray(drawn).astype(np.float64)
    down = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    up = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32).astype(np.float64)
    assert np.all((drawn == down) | (drawn == up))
    share = (x - down) / (up - down)  # of the draws that go up
    sigma = np.abs(up - down) * np.sqrt(share * (1 - share) / len(keys))
    assert np.all(np.abs(drawn.mean(0) - x) <= 4.2 * sigma + 1e-9 * np.abs(x))  # 4 sigma of one, of 276


def test_what_has_no_neighbours_stays():
    exact = np.asarray([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, SMALLEST, -SMALLEST, float(BITS.max)], np.float32)
    for bits in (0, 1, 0x7FFF, 0xFFFF):
        found = np.asarray(stochastically_rounded(jnp.asarray(exact), jnp.full(exact.shape, bits, jnp.uint16)))
        np.testing.assert_array_equal(found.view(np.uint16), (exact.view(np.uint32) >> 16).astype(np.uint16))
    nans = np.asarray([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000], np.uint32).view(np.float32)
    largest = np.asarray([np.finfo(np.float32).max, np.finfo(np.float32).min], np.float32)
    for bits in (0, 0xFFFF):
        assert np.all(
            np.isnan(stochastically_rounded(jnp.asarray(nans), jnp.full(5, bits, jnp.uint16)).astype(np.float32))
        )
        kept = np.asarray(stochastically_rounded(jnp.asarray(largest), jnp.full(2, bits, jnp.uint16)), np.float32)
        np.testing.assert_array_equal(kept, np.asarray([BITS.max, BITS.min], np.float32))


def test_a_draw_is_of_the_key_the_step_and_the_array_alone():
    tree = {"a": jnp.full((64, 8), 1.001), "b": jnp.full((64, 8), 1.001), "n": jnp.int32(3)}
    like = {"a": jnp.zeros((64, 8), jnp.bfloat16), "b": jnp.zeros((64, 8), jnp.bfloat16), "n": jnp.int32(0)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))

    def draw(key, step, tree=tree):
        return jax.jit(lambda tree: stored(tree, like=like, key=np.uint32(key), step=step))(tree)

    first = draw([1, 2], 5)
    others = [draw([1, 3], 5)["a"], draw([1, 2], 6)["a"], first["b"]]
    assert all(np.any(first["a"] != other) for other in others)
    placed = tree | {name: jax.device_put(tree[name], split) for name in ("a", "b")}
    jax.tree.map(np.testing.assert_array_equal, first, draw([1, 2], 5, placed))
    with pytest.raises(ValueError, match="no key to round it by"):
        stored(tree, like=like, key=None, step=0)


@pytest.fixture(scope="module")
def batch(config, params, rows):
    made = make_batch(rows[:4], batch_size=4, max_length=48)
    return made.replace(previous_logprob=np.asarray(score_step(params, made, model=Decoder(config), chunk=64))[None])


def to_the_nearest(tree, *, like, key, step):
    return jax.tree.map(lambda leaf, before: leaf.astype(before.dtype), tree, like)


def losses(config, params, batch, **dtypes):
    """Of 200 small steps: each moves a weight by less than a fourth of its distance to the next bfloat16."""
    section = OptimizerSection(moment_dtype=dtypes.pop("moment_dtype", "float32"), eps=1e-6, b2=0.999)
    state, take = begin(config, params, section, **dtypes)
    for _ in range(200):
        state, metrics = take(state, batch, 3e-5)
        yield float(metrics["loss"])


@pytest.mark.soak
def test_two_hundred_steps_in_bfloat16_follow_float32_and_to_the_nearest_they_do_not(
    config, params, batch, monkeypatch
):
    wanted = list(losses(config, params, batch))
    assert wanted[-1] < 0.75 * wanted[0]

    def follow():
        found = losses(config, params, batch, param_dtype="bfloat16", moment_dtype="bfloat16")
        return all(abs(loss / aim - 1.0) < 0.02 for loss, aim in zip(found, wanted, strict=True))

    assert follow()
    monkeypatch.setattr(step, "stored", to_the_nearest)
    train_step.clear_cache()
    assert not follow()
    train_step.clear_cache()


def test_a_second_moment_in_bfloat16_is_forgotten_as_fast_as_in_float32(config, params):
    """b2 = .999 takes off less than half of bfloat16's distance: to the nearest, the moment would stay for ever."""
    moment, after = jnp.ones((64, 64)), 0.999**300
    like, key = jnp.zeros((64, 64), jnp.bfloat16), np.uint32([0, 1])
    held = nearest = moment.astype(jnp.bfloat16)
    for index in range(300):
        held = stored(0.999 * widened(held), like=like, key=key, step=index)
        nearest = (0.999 * widened(nearest)).astype(jnp.bfloat16)
    assert float(jnp.mean(widened(held))) == pytest.approx(after, rel=0.01)
    assert float(jnp.mean(widened(nearest))) == 1.0


def test_gradients_of_bfloat16_parameters_are_added_up_in_float32(config, params, rows):
    """8 micro-batches, of which one brings nearly all: in bfloat16 the others would be rounded away."""
    section = OptimizerSection(eps=1e-3)
    weighed = [replace(row, weight=1e-3 if index else 1.0) for index, row in enumerate(rows[:8])]
    norms = {}
    for parts in (1, 8):
        made = make_batch(weighed, batch_size=8, max_length=48, parts=parts)
        state, take = begin(config, params, section, param_dtype="bfloat16")
        lowered = take.lowered(state, made)
        _, metrics = take(state, made)
        norms[parts] = metrics["grad_norm"]
        assert metrics["grad_norm"].dtype == jnp.float32
    assert float(norms[8]) == pytest.approx(float(norms[1]), rel=1e-2)
    # What the loop over micro-batches carries for the queries, [2, 32, 4, 8], are parameters and sums.
    carried = [line for line in lowered.as_text().splitlines() if "stablehlo.while" in line]
    assert any("2x32x4x8xf32" in line for line in carried)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_ten_steps_and_ten_more_after_a_restart_are_twenty(config, params, batch, tmp_path, kind):
    section = OptimizerSection(name=kind, **({"moment_dtype": "bfloat16"} if kind == "adamw" else {"min_factored": 32}))
    state, take = begin(config, params, section, param_dtype="bfloat16")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    kept = StateCheckpoints(epath.Path(tmp_path) / "states")
    for index in range(20):
        if index == 10:
            kept.save(state, step=10)
        state, _ = take(state, batch)
    kept.close()
    again, take = begin(config, params, section, param_dtype="bfloat16")
    kept = StateCheckpoints(epath.Path(tmp_path) / "states")
    again = kept.restore(again, shardings)
    kept.close()
    assert int(again.step) == 10
    for _ in range(10):
        again, _ = take(again, batch)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(again.params)} == {np.dtype(jnp.float32), np.dtype(jnp.bfloat16)}


def test_a_policy_that_would_be_rounded_is_no_start(config, params, tmp_path):
    held = computing_params(config, jnp.bfloat16)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: here, held)
    path = epath.Path(tmp_path) / "policies" / "000"
    save_policy(path, jax.device_put(params, places))
    with pytest.raises(DnoError, match=r"policies/000: .*training\.param_dtype=bfloat16 cannot show .*another run_dir"):
        load_policy(path, shapes=held, shardings=places, exact=True)
    load_policy(path, shapes=held, shardings=places)  # for sampling it may be
    rounded = widened(jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), params, held))
    save_policy(path, jax.device_put(rounded, places))
    found = load_policy(path, shapes=held, shardings=places, exact=True)
    jax.tree.map(np.testing.assert_array_equal, widened(found), rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(jnp.float32), np.dtype(jnp.bfloat16)}
