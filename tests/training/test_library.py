"""The step for other people's models: the gradients of the plain mean, whatever the micro-batches and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dno_jax.losses import dno_loss
from dno_jax.training.library import make_train_step

PAIRS, WIDTH = 16, 5


def apply_logprobs(params, batch):
    return -jnp.square(batch["x"] @ params["w"] + params["b"])


def loss(logprob, batch):
    value = dno_loss(
        chosen_logprob=logprob[:, 0],
        rejected_logprob=logprob[:, 1],
        reference_chosen_logprob=batch["reference"][:, 0],
        reference_rejected_logprob=batch["reference"][:, 1],
        target=1.0,
        beta=0.5,
    )
    return value, {"gap": logprob[:, 0] - logprob[:, 1]}


@pytest.fixture
def made():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=WIDTH), jnp.float32), "b": jnp.float32(0.3)}
    batch = {
        "x": rng.normal(size=(PAIRS, 2, WIDTH)).astype(np.float32),
        "reference": rng.normal(size=(PAIRS, 2)).astype(np.float32),
        "weight": rng.integers(0, 4, PAIRS).astype(np.float32),
    }
    return params, batch


def expected(params, batch, weight):
    """By hand, in one piece: the weighted mean and one step of plain gradient descent."""

    def total(p):
        value, figures = loss(apply_logprobs(p, batch), batch)
        return jnp.sum(value * weight) / jnp.sum(weight), jnp.sum(figures["gap"] * weight) / jnp.sum(weight)

    (value, gap), grads = jax.value_and_grad(total, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), float(value), float(gap), optax.tree.norm(grads)


@pytest.mark.parametrize("weighted", [True, False], ids=["by weight", "plain mean"])
@pytest.mark.parametrize(("parts", "devices"), [(1, None), (4, None), (1, 8), (2, 8)])
def test_a_step_is_that_of_the_whole_mean(made, parts, devices, weighted):
    params, batch = made
    if not weighted:
        batch = {name: column for name, column in batch.items() if name != "weight"}
    after, value, gap, norm = expected(params, batch, made[1]["weight"] if weighted else np.ones(PAIRS, np.float32))
    mesh = None
    if devices:
        mesh = jax.make_mesh((devices,), ("pairs",), axis_types=(AxisType.Auto,))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    tx = optax.sgd(0.1)
    step = make_train_step(apply_logprobs, tx, loss, mesh, parts=parts)
    found, _, figures = step(params, tx.init(params), batch)
    for name, leaf in after.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-6)
    assert figures["loss"] == pytest.approx(value, rel=1e-5)
    assert figures["gap"] == pytest.approx(gap, rel=1e-4, abs=1e-6)
    assert figures["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_micro_batches_that_do_not_divide_the_pairs_are_refused(made):
    params, batch = made
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="3 micro-batches do not divide 16 pairs"):
        make_train_step(apply_logprobs, tx, loss, parts=3)(params, tx.init(params), batch)
