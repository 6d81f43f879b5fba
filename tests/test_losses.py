import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dno_jax.losses import dno_loss, implicit_reward, nll_loss, reward_margin


def numpy_loss(chosen, rejected, reference_chosen, reference_rejected, target, beta):
    """Eq. 8 in float64, by log1p of exponentials of the safe sign."""
    delta = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))

    def log_sigmoid(x):
        return np.where(x > 0, -np.log1p(np.exp(-np.abs(x))), x - np.log1p(np.exp(-np.abs(x))))

    return -(target * log_sigmoid(delta) + (1 - target) * log_sigmoid(-delta))


def random_inputs(rng, count=200, scale=30.0):
    names = ("chosen_logprob", "rejected_logprob", "reference_chosen_logprob", "reference_rejected_logprob")
    return {name: (-rng.random(count) * scale).astype(np.float32) for name in names}


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("target", [1.0, 0.731, 0.5, 0.0])
def test_matches_float64(beta, target):
    inputs = random_inputs(np.random.default_rng(0))
    expected = numpy_loss(*(value.astype(np.float64) for value in inputs.values()), target, beta)
    found = dno_loss(**inputs, target=target, beta=beta)
    # float32 inputs of size 30: a rounding of 2e-6 nats in the margin.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_hand_computed_numbers():
    # beta (log-ratio difference) = 0.1 * ((-10 + 12) - (-20 + 15)) = 0.7; -log sigmoid(0.7) = 0.403186
    loss = dno_loss(
        chosen_logprob=-10.0, rejected_logprob=-20.0, reference_chosen_logprob=-12.0, reference_rejected_logprob=-15.0,
        target=1.0, beta=0.1,
    )  # fmt: skip
    assert float(loss) == pytest.approx(0.4031860, abs=1e-6)
    assert float(reward_margin(
        chosen_logprob=-10.0, rejected_logprob=-20.0, reference_chosen_logprob=-12.0, reference_rejected_logprob=-15.0,
        beta=0.1,
    )) == pytest.approx(0.7, abs=1e-6)  # fmt: skip
    assert float(implicit_reward(logprob=-10.0, reference_logprob=-12.0, beta=0.1)) == pytest.approx(0.2, abs=1e-6)


def test_is_log_two_where_the_policy_is_its_reference():
    same = jnp.full(3, -17.25)
    loss = dno_loss(
        chosen_logprob=same, rejected_logprob=same - 5, reference_chosen_logprob=same,
        reference_rejected_logprob=same - 5, target=1.0, beta=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(loss, math.log(2.0), rtol=1e-7)


def test_gradient_at_the_reference_is_beta_times_half_minus_target():
    # dno.md: gradient of Eq. 8 at pi = pi_t is -eta E[(sigma(D*) - 1/2) grad(log pi(y1) - log pi(y2))] as a loss.
    def loss(chosen):
        return dno_loss(
            chosen_logprob=chosen, rejected_logprob=-3.0, reference_chosen_logprob=-2.0,
            reference_rejected_logprob=-3.0, target=0.7, beta=0.3,
        )  # fmt: skip

    assert float(jax.grad(loss)(-2.0)) == pytest.approx(-0.3 * (0.7 - 0.5), abs=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_huge_margins_with_the_right_slope(dtype):
    chosen = jnp.asarray([1e4, -1e4, 0.0], dtype)
    zeros = jnp.zeros(3, dtype)

    def total(value):
        return dno_loss(
            chosen_logprob=value, rejected_logprob=zeros, reference_chosen_logprob=zeros,
            reference_rejected_logprob=zeros, target=1.0, beta=1.0,
        ).sum()  # fmt: skip

    loss, slope = jax.value_and_grad(total)(chosen)
    assert np.isfinite(float(loss))
    np.testing.assert_allclose(np.asarray(slope, np.float32), [0.0, -1.0, -0.5], atol=1e-6)


def test_agrees_with_torch_log_sigmoid():
    torch = pytest.importorskip("torch")
    inputs = random_inputs(np.random.default_rng(1), scale=8.0)
    tensors = {name: torch.tensor(value, requires_grad=name == "chosen_logprob") for name, value in inputs.items()}
    ratio = tensors["chosen_logprob"] - tensors["rejected_logprob"]
    reference = tensors["reference_chosen_logprob"] - tensors["reference_rejected_logprob"]
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratio - reference))
    expected.sum().backward()

    def total(chosen):
        return dno_loss(**{**inputs, "chosen_logprob": chosen}, target=1.0, beta=0.1).sum()

    np.testing.assert_allclose(
        dno_loss(**inputs, target=1.0, beta=0.1), expected.detach().numpy(), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        jax.grad(total)(inputs["chosen_logprob"]), tensors["chosen_logprob"].grad.numpy(), rtol=1e-5, atol=1e-7
    )


def test_is_the_same_under_jit_vmap_and_every_kind_of_mesh():
    inputs = {name: jnp.asarray(value) for name, value in random_inputs(np.random.default_rng(2), count=16).items()}

    def loss(arrays):
        return dno_loss(**arrays, target=0.8, beta=0.1)

    plain = np.asarray(loss(inputs))
    np.testing.assert_array_equal(jax.vmap(loss)(inputs), plain)
    np.testing.assert_allclose(jax.jit(loss)(inputs), plain, rtol=1e-6)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
        placed = jax.device_put(inputs, sharding)
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(jax.jit(loss)(placed), plain, rtol=1e-6)
            mapped = jax.shard_map(loss, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
            np.testing.assert_allclose(jax.jit(mapped)(placed), plain, rtol=1e-6)


def test_nll_is_a_mean_over_tokens_and_zero_without_any():
    np.testing.assert_allclose(
        nll_loss(logprob=jnp.asarray([-6.0, 0.0]), num_tokens=jnp.asarray([3.0, 0.0])), [2.0, 0.0]
    )


def test_importing_the_losses_imports_jax_alone():
    code = "import dno_jax.losses, sys; print(','.join(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(",")
    assert "jax" in loaded
    assert not {"flax", "optax", "transformers", "openai", "pydantic", "orbax", "torch"} & set(loaded)
