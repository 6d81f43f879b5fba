"""Losses of Direct Nash Optimization (arXiv 2404.03715), on plain arrays of any JAX code.

Every function takes summed log-probabilities (nats) of any matching shape and returns unreduced values in float32. Nothing
but jax is imported; all of it works under jit, vmap, shard_map, and Auto or Explicit meshes.

    from dno_jax.losses import dno_loss
    loss = dno_loss(
        chosen_logprob=c, rejected_logprob=r, reference_chosen_logprob=rc, reference_rejected_logprob=rr, target=1.0, beta=0.1
    ).mean()
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

Logprob = Float[ArrayLike, "*#P"]  # of any shapes that broadcast against each other


def implicit_reward(*, logprob: Logprob, reference_logprob: Logprob, beta: float) -> Float[Array, "*#P"]:
    """Return beta * log(pi(y|x) / pi_t(y|x)), the reward a policy implies against its reference (Eq. 10, without Z).

    Args:
        logprob: log pi(y|x), nats.
        reference_logprob: log pi_t(y|x) under the frozen reference, nats.
        beta: KL coefficient > 0, the paper's eta (Eq. 8) or eta-tilde (Eq. 13).
    """
    return beta * (jnp.asarray(logprob, jnp.float32) - jnp.asarray(reference_logprob, jnp.float32))


def reward_margin(
    *,
    chosen_logprob: Logprob,
    rejected_logprob: Logprob,
    reference_chosen_logprob: Logprob,
    reference_rejected_logprob: Logprob,
    beta: float,
) -> Float[Array, "*#P"]:
    """Return the implicit reward of the chosen response minus that of the rejected one (Delta of section 3.1)."""
    chosen = implicit_reward(logprob=chosen_logprob, reference_logprob=reference_chosen_logprob, beta=beta)
    rejected = implicit_reward(logprob=rejected_logprob, reference_logprob=reference_rejected_logprob, beta=beta)
    return chosen - rejected


def dno_loss(
    *,
    chosen_logprob: Logprob,
    rejected_logprob: Logprob,
    reference_chosen_logprob: Logprob,
    reference_rejected_logprob: Logprob,
    target: Logprob,
    beta: float,
) -> Float[Array, "*#P"]:
    """Return the DNO regression loss of each pair, Eq. 8 (Eq. 13 where the target is 1).

    With Delta = beta log pi/pi_t (chosen) - beta log pi/pi_t (rejected) and target z, the loss is the binary cross-entropy
    -z log sigmoid(Delta) - (1 - z) log sigmoid(-Delta), written as softplus(-Delta) + (1 - z) Delta: finite for any finite
    Delta. Its gradient in Delta is sigmoid(Delta) - z.

    Args:
        chosen_logprob, rejected_logprob: log pi(y|x) of the two responses, nats; any matching shape.
        reference_chosen_logprob, reference_rejected_logprob: the same under the frozen reference pi_t.
        target: P(chosen preferred) in [0, 1] that is regressed on; sigmoid(r_t(y1) - r_t(y2)) in Algorithm 1, and 1 in
            DNO-Prct, where the loss is DPO's with reference pi_t.
        beta: KL coefficient > 0, the paper's eta (or eta-tilde).

    Returns:
        Loss a pair, float32, >= 0; log 2 where policy and reference agree.
    """
    delta = reward_margin(
        chosen_logprob=chosen_logprob,
        rejected_logprob=rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
        beta=beta,
    )
    return jax.nn.softplus(-delta) + (1.0 - jnp.asarray(target, jnp.float32)) * delta


def nll_loss(*, logprob: Logprob, num_tokens: Num[ArrayLike, "*#P"]) -> Float[Array, "*#P"]:
    """Return the mean negative log-likelihood a token of each response (supervised fine-tuning).

    Args:
        logprob: log pi(y|x) summed over the response's tokens, nats.
        num_tokens: tokens of the response; 0 gives a loss of 0.
    """
    return -jnp.asarray(logprob, jnp.float32) / jnp.maximum(jnp.asarray(num_tokens, jnp.float32), 1.0)
