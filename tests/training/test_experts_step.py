"""A mixture of experts through the ordinary training step, on meshes with an expert axis."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.config import LossSection, MeshSection, OptimizerSection
from dno_jax.errors import DnoError
from dno_jax.model.block import LOAD
from dno_jax.model.decoder import Decoder
from dno_jax.model.moe import busiest_share, load_balance_loss, ragged_experts
from dno_jax.model.params import init_params
from dno_jax.parallel.experts import ShardedExperts, sharded_experts
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import DECODE, TRAIN, Constrain, row_sharding
from dno_jax.training.batches import make_batch
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.state import TrainState, init_state, param_shardings, state_shardings
from dno_jax.training.step import StepConfig, batch_logprobs, train_step

# Adam's first step is g / (|g| + eps): with an eps above the rounding of gradients it does not magnify that.
OPTIMIZER = OptimizerSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, eps=1e-3)
LOSS = preference_loss(LossSection(beta=0.1))


@pytest.fixture(scope="module")
def mixture(config):
    return dataclasses.replace(config, num_experts=4, num_experts_per_tok=2, intermediate_size=40)


@pytest.fixture(scope="module")
def mixture_params(mixture):
    """Wide enough that routers choose: at their initial deviation of 0.02 all experts are nearly as likely."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) * 4, init_params(mixture, jax.random.key(0)))


@pytest.fixture(scope="module")
def batch(rows):
    return make_batch(rows[:6], batch_size=8, max_length=48)  # two rows of filler, and padding


def mesh_of(axes):
    data, fsdp, expert, tensor = axes
    section = MeshSection(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
    return make_mesh(section, jax.devices()[: math.prod(axes)])


def prepare(mixture, params, batch, axes, *, remat="full", local=None):
    mesh = mesh_of(axes)
    experts = sharded_experts(mesh) if local is None else ShardedExperts(mesh, local)
    model = Decoder(mixture, remat=remat, constrain=Constrain(mesh, TRAIN), experts=experts)
    places = param_shardings(mixture, mesh, TRAIN)
    return model, jax.device_put(params, places), batch.place(mesh), places


def step(mixture, params, batch, axes=(1, 1, 1, 1), *, remat="none", local=None, **kwargs):
    model, params, batch, places = prepare(mixture, params, batch, axes, remat=remat, local=local)
    optimizer = make_optimizer(OPTIMIZER)
    state = init_state(params, optimizer, state_shardings(optimizer, places, params))
    config = StepConfig(**{"model": model, "optimizer": optimizer, "row_loss": LOSS, "chunk": 64} | kwargs)
    compiled = train_step.lower(state, batch, jnp.float32(1e-3), config=config).compile()
    state, metrics = compiled(state, batch, jnp.float32(1e-3))
    return state, jax.tree.map(float, metrics), compiled


@pytest.fixture(scope="module")
def plain(mixture, mixture_params, batch):
    return step(mixture, mixture_params, batch)


def assert_same(found, expected):
    """Equal up to float32 rounding of sums in another order."""
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(found[0].params), jax.tree.leaves_with_path(expected[0].params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6, err_msg=jax.tree_util.keystr(path))
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("axes", [pytest.param((1, 2, 2, 2), marks=pytest.mark.soak), (2, 1, 4, 1)], ids=str)
def test_meshes_agree_with_one_device(mixture, mixture_params, batch, plain, axes):
    assert_same(step(mixture, mixture_params, batch, axes, remat="full"), plain)


def test_gradients_on_a_mesh_equal_one_devices(mixture, mixture_params, batch):
    """Loss and gradients themselves, without Adam between them and the comparison."""

    def gradients(axes, **kwargs):
        model, params, placed, _ = prepare(mixture, mixture_params, batch, axes, **kwargs)

        def loss(p):
            part = placed.part(0)
            value, _ = LOSS(batch_logprobs(model, p, part, chunk=64), jnp.zeros((8, 2)), part)
            return jnp.sum(value * part.weight)

        return jax.jit(jax.value_and_grad(loss))(params)

    value, expected = gradients((1, 1, 1, 1), remat="none")
    for axes, local in [((1, 2, 2, 2), None), ((2, 1, 4, 1), ragged_experts)]:
        found = gradients(axes, local=local)
        assert float(found[0]) == pytest.approx(float(value), rel=1e-6)
        for (path, a), (_, b) in zip(
            jax.tree.leaves_with_path(found[1]), jax.tree.leaves_with_path(expected), strict=True
        ):
            scale = float(jnp.max(jnp.abs(b)))
            assert scale > 0.0
            np.testing.assert_allclose(a, b, atol=3e-6 * scale, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def test_the_load_is_of_the_tokens_that_are_no_padding(mixture, mixture_params, batch, plain):
    token, places = jnp.asarray(batch.token[0]), jax.tree.map(jnp.asarray, batch.part(0).places)
    _, left = Decoder(mixture).apply({"params": mixture_params}, token, places, mutable=["intermediates"])
    load = left["intermediates"]["layers"][LOAD][0]
    assert float(load.num_tokens[0]) == (batch.places.position >= 0).sum() < batch.places.position.size
    assert plain[1]["load_balance"] == pytest.approx(float(load_balance_loss(load)), rel=1e-5)
    assert plain[1]["busiest_expert"] == pytest.approx(float(busiest_share(load)), rel=1e-5)
    assert 2.0 < plain[1]["load_balance"] < 4.0  # k when even, E at worst


def test_micro_batches_report_the_whole_batchs_load(mixture, mixture_params, rows, plain):
    assert_same(step(mixture, mixture_params, make_batch(rows[:6], batch_size=8, max_length=48, parts=4)), plain)


@pytest.mark.parametrize("axes", [(1, 1, 1, 1), (2, 1, 2, 1)], ids=str)
@pytest.mark.soak
def test_micro_batches_weigh_in_by_their_tokens(mixture, mixture_params, rows, axes):
    """Two micro-batches of the same rows: the mean of their losses is the loss of both."""
    rows = [row for row in rows[:4] for _ in range(2)]
    whole, parted = (make_batch(rows, batch_size=8, max_length=48, parts=parts) for parts in (1, 2))
    # The longest is dealt out first, so that of two equal ones each micro-batch gets one.
    assert (parted.num_tokens[0].sum(0) == parted.num_tokens[1].sum(0)).all()
    expected = step(mixture, mixture_params, whole, load_balance_weight=30.0)
    assert_same(step(mixture, mixture_params, parted, axes, load_balance_weight=30.0), expected)


def test_the_weight_evens_the_load_and_zero_leaves_it(mixture, mixture_params, batch, plain):
    # `loss` is without it: what is reported of this step stays.
    state, metrics, _ = step(mixture, mixture_params, batch, load_balance_weight=1.0)
    for name in plain[1].keys() - {"grad_norm"}:
        assert metrics[name] == pytest.approx(plain[1][name], rel=1e-5)

    def spread(params):
        token, places = jnp.asarray(batch.token[0]), jax.tree.map(jnp.asarray, batch.part(0).places)
        _, left = Decoder(mixture).apply({"params": params}, token, places, mutable=["intermediates"])
        return float(load_balance_loss(left["intermediates"]["layers"][LOAD][0]))

    assert spread(state.params) < spread(plain[0].params)


def test_dense_models_report_no_load(config, params, batch):
    optimizer = make_optimizer(OPTIMIZER)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
    run = partial(train_step, config=StepConfig(Decoder(config), optimizer, LOSS, chunk=64))
    _, metrics = jax.eval_shape(run, state, batch, jnp.float32(1e-3))
    assert "loss" in metrics
    assert not {"load_balance", "busiest_expert"} & metrics.keys()


def test_each_device_holds_its_own_experts_alone(mixture, mixture_params, batch, plain):
    axes = (1, 1, 4, 1)
    state, _, compiled = step(mixture, mixture_params, batch, axes)
    for tree in (state.params, state.opt_state[1][0].mu):
        for name in ("gate", "up", "down"):
            leaf = tree["layers"][name]
            assert {shard.data.shape[1] for shard in leaf.addressable_shards} == {1}
            assert len({str(shard.index) for shard in leaf.addressable_shards}) == 4
    # No array of the program is all experts' weights, of one layer or stacked, in any layout; one device's program has
    # them, so that this search is known to find them.
    D, F = mixture.hidden_size, mixture.intermediate_size
    every = {tuple(sorted(shape)) for shape in [(4, D, F), (1, 4, D, F), (2, 4, D, F)]}

    def holds(program):
        shapes = re.findall(r"f32\[([0-9,]+)\]", program.as_text())
        return bool(every & {tuple(sorted(map(int, shape.split(",")))) for shape in shapes})

    assert holds(plain[2])
    assert not holds(compiled)
    sizes = [program.memory_analysis().argument_size_in_bytes for program in (plain[2], compiled)]
    experts = 3 * sum(mixture_params["layers"][name].nbytes for name in ("gate", "up", "down"))  # and Adam's moments
    assert sizes[0] - sizes[1] >= 3 / 4 * experts


def test_an_expert_axis_that_does_not_divide_is_refused(mixture):
    with pytest.raises(DnoError, match=r"layers/down of shape \(2, 4, 40, 32\): size 4 cannot be split over expert=8"):
        param_shardings(mixture, mesh_of((1, 1, 8, 1)), TRAIN)


def test_only_the_train_layout_gathers_weights(mixture, mixture_params):
    """A token's step in the decode layout moves tokens to the experts, and no expert."""
    mesh = mesh_of((1, 2, 2, 2))
    token = jax.device_put(np.zeros((8, 1), np.int32), row_sharding(mesh, ndim=2))

    def largest_gather(layout):
        model = Decoder(mixture, constrain=Constrain(mesh, layout), experts=sharded_experts(mesh))
        params = jax.device_put(mixture_params, param_shardings(mixture, mesh, layout))
        text = jax.jit(model.apply).lower({"params": params}, token, token).compile().as_text()
        gathered = re.findall(r"= \(?\w+\[([0-9,]*)\]\S* all-gather", text)
        return max(math.prod(map(int, filter(None, shape.split(",")))) for shape in gathered)

    assert largest_gather(DECODE) <= 8 * mixture.hidden_size
    assert largest_gather(TRAIN) >= mixture.hidden_size * mixture.intermediate_size
