"""The forward KL term: its minimiser against scipy's, its gradient, and whose samples it is of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from dno_jax import losses
from dno_jax.config import LossSection, ReferenceSection
from dno_jax.training.objectives import preference_loss
from tests.training.test_objectives import pair_batch

REWARD = np.array([0.9, 0.5, 0.1])
REFERENCE = np.array([0.2, 0.5, 0.3])
BETA = 0.3


def objective64(logits, weight):
    """Eq. 8 over all pairs from pi_ref, and weight * E_{y ~ pi_ref} log pi_ref/pi, in float64 and by hand."""
    policy = logits - np.log(np.exp(logits).sum())
    gap = BETA * (policy - np.log(REFERENCE))
    delta, label = gap[:, None] - gap, 1 / (1 + np.exp(REWARD - REWARD[:, None]))
    cross = label * np.logaddexp(0, -delta) + (1 - label) * np.logaddexp(0, delta)
    return REFERENCE @ cross @ REFERENCE + weight * REFERENCE @ (np.log(REFERENCE) - policy)


def objective(logits, weight):
    """The same by the functions that train models."""
    policy, reference = jax.nn.log_softmax(logits), jnp.log(REFERENCE.astype(np.float32))
    first, second = (jnp.asarray(index) for index in np.divmod(np.arange(9), 3))
    rewards = jnp.asarray(REWARD, jnp.float32)
    target = jax.nn.sigmoid(rewards[first] - rewards[second])
    pair = losses.dno_loss(
        chosen_logprob=policy[first], rejected_logprob=policy[second], reference_chosen_logprob=reference[first],
        reference_rejected_logprob=reference[second], target=target, beta=BETA,
    )  # fmt: skip
    drawn = jnp.exp(reference)
    forward = losses.forward_kl_loss(logprob=policy, reference_logprob=reference)
    return jnp.sum(drawn[first] * drawn[second] * pair) + weight * jnp.sum(drawn * forward)


@pytest.mark.parametrize("weight", [0.02, 0.3])
def test_the_minimiser_on_three_responses_is_scipys(weight):
    found = minimize(objective64, np.zeros(3), args=(weight,), tol=1e-14, options={"gtol": 1e-10})
    expected = np.exp(found.x) / np.exp(found.x).sum()
    # Newton's method on the first two logits, as only differences count.
    slope = jax.jit(jax.grad(lambda two: objective(jnp.append(two, 0.0), weight)))
    curvature = jax.jit(jax.jacfwd(slope))
    two = jnp.zeros(2)
    for _ in range(30):
        two = two - jnp.linalg.solve(curvature(two), slope(two))
    np.testing.assert_allclose(jax.nn.softmax(jnp.append(two, 0.0)), expected, rtol=0, atol=1e-6)
    target = REFERENCE * np.exp(REWARD / BETA)
    target /= target.sum()
    distance = [0.5 * np.abs(expected - other).sum() for other in (REFERENCE, target)]
    assert min(distance) > 0.02  # between the reference and the step without the term


def test_the_gradient_by_finite_differences():
    logits, weight, step = np.array([0.4, -0.3, 0.1]), 0.2, 1e-6
    differences = [
        (objective64(logits + step * way, weight) - objective64(logits - step * way, weight)) / (2 * step)
        for way in np.eye(3)
    ]
    found = jax.grad(objective)(jnp.asarray(logits, jnp.float32), weight)
    np.testing.assert_allclose(found, differences, atol=1e-6)


@pytest.mark.parametrize("kind", ["previous", "initial", "mixture"])
def test_the_term_is_the_mean_over_a_pairs_samples_of_the_reference(kind):
    anchor = [[1, 1], [1, 0], [0, 1], [0, 0], [1, 1], [0, 0]]
    batch = pair_batch(anchor=anchor)
    reference = ReferenceSection(kind=kind, tau=0.1 if kind == "mixture" else 0.0)
    logprob = jnp.asarray(np.random.default_rng(0).uniform(-9, -1, (6, 2)), jnp.float32)
    plain, forward = (
        preference_loss(LossSection(beta=BETA, forward_kl_weight=weight), reference)(logprob, batch.num_tokens, batch)[
            0
        ]
        for weight in (0.0, 0.5)
    )
    column = batch.previous_logprob if kind == "previous" else batch.initial_logprob
    shift = np.asarray(column - logprob)
    expected = [shift[0].mean(), shift[1, 0], shift[2, 1], 0.0, shift[4].mean(), 0.0]
    np.testing.assert_allclose(forward - plain, 0.5 * np.asarray(expected), atol=2e-6)


def test_its_slope_is_that_of_the_likelihood():
    slope = jax.grad(lambda logprob: losses.forward_kl_loss(logprob=logprob, reference_logprob=-7.0))
    assert slope(-3.0) == slope(-300.0) == -1.0
