"""How a drawn data set moves the policy: a regression solved, or one step of gradient descent."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dno_jax.games.sampled.draws import Pairs, Settings, State, pair_logprobs
from dno_jax.losses import dno_loss, ipo_loss, reference_mixture


def regress(
    loss: Callable[[Array], Array], *, reference: Float[Array, " C"], eta: float, settings: Settings
) -> Float[Array, " C"]:
    """Return the log-policy that minimises the mean of loss(log_policy), by L-BFGS from the reference.

    It is searched in u = eta * (log-ratio to the reference), in which the losses' curvature is of order 1 whatever eta
    is, so that unit steps need no line search (which float32 losses could not guide to the minimum). Responses that no
    pair contains keep u = 0. A pull of u to 0 with the weight of one pair keeps separable data, as hard labels on a
    response seen once are, from having an infinite minimiser.
    """

    def objective(u: Array) -> Array:
        values = loss(jax.nn.log_softmax(reference + u / eta))
        return jnp.mean(values) + 0.5 * jnp.sum(u**2) / settings.num_pairs

    solver = optax.lbfgs(learning_rate=1.0, linesearch=None)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        u, memory, best, least = carry
        gradient = jax.grad(objective)(u)
        size = jnp.sum(gradient**2)
        best, least = jnp.where(size < least, u, best), jnp.minimum(size, least)
        updates, memory = solver.update(gradient, memory, u)
        return (optax.apply_updates(u, updates), memory, best, least), None

    # At the minimum the gradient is rounding noise, whose secants may throw u anywhere: the flattest point is kept.
    start = jnp.zeros_like(reference)
    carry = (start, solver.init(start), start, jnp.asarray(jnp.inf))
    (_, _, best, _), _ = jax.lax.scan(step, carry, length=settings.num_inner_steps)
    return jax.nn.log_softmax(reference + best / eta)


def descend(loss: Callable[[Array], Array], *, policy: Float[Array, " C"], settings: Settings) -> Float[Array, " C"]:
    """Return the log-policy after one step of gradient descent on the logits."""
    gradient = jax.grad(lambda logits: jnp.mean(loss(jax.nn.log_softmax(logits))))(policy)
    solver = optax.sgd(settings.step_size)
    updates, _ = solver.update(gradient, solver.init(policy), policy)
    return jax.nn.log_softmax(jnp.asarray(optax.apply_updates(policy, updates)))


def regress_dno(pairs: Pairs, *, reference: Array, settings: Settings, eta: float | None = None) -> Array:
    """Eq. 8, and Eq. 13 where the targets are 1, with beta = eta."""
    beta = settings.eta if eta is None else eta
    fixed = {**pair_logprobs(pairs, reference, prefix="reference_"), "target": pairs.target, "beta": beta}
    return regress(
        lambda policy: dno_loss(**pair_logprobs(pairs, policy), **fixed),
        reference=reference,
        eta=beta,
        settings=settings,
    )


def regress_ipo(pairs: Pairs, *, reference: Array, settings: Settings) -> Array:
    """(h - 1/(2 eta))^2 on judged pairs: with pairs from pi its minimiser is reference * exp(P(y > pi) / eta)."""
    fixed = {**pair_logprobs(pairs, reference, prefix="reference_"), "target": pairs.target, "beta": settings.eta}
    return regress(
        lambda policy: settings.eta**2 * ipo_loss(**pair_logprobs(pairs, policy), **fixed),
        reference=reference,
        eta=settings.eta,
        settings=settings,
    )


def geometric_mixture(state: State, *, tau: float, eta: float) -> Array:
    """pi_t^{1 - tau/eta} pi_ref^{tau/eta}, not normalised (Algorithm 3)."""
    return reference_mixture(state.policy, state.reference, tau=tau, eta=eta)
