"""What losses are made of: log-ratios, targets, references, links, and the likelihood term."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

Logprob = Float[ArrayLike, "*#P"]  # scalars, or shapes of one rank that broadcast
NumTokens = Num[ArrayLike, "*#P"]

MAX_LOG_RATIO = 20.0  # nats; log-ratios are capped there before they are exponentiated, so that no loss overflows


def float32(**values: ArrayLike) -> list[Array]:
    """Return the values as float32 arrays, by the names that their caller gave them.

    Raises:
        ValueError: they are not scalars or shapes of one rank that broadcast: [P] against [Q], or [P] against [P, 1].
    """
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    shapes = [array.shape for array in arrays.values() if array.ndim]
    one_rank = len({len(shape) for shape in shapes}) <= 1
    if not (one_rank and all(len(set(sizes) - {1}) <= 1 for sizes in zip(*shapes, strict=True))):
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ValueError(f"shapes do not match: {found}; give every array the same shape, or a scalar")
    return list(arrays.values())


def implicit_reward(*, logprob: Logprob, reference_logprob: Logprob, beta: float) -> Float[Array, "*#P"]:
    """Return beta * log(pi(y|x) / pi_t(y|x)), the reward a policy implies against its reference (Eq. 10, without Z).

    Args:
        logprob: log pi(y|x), nats.
        reference_logprob: log pi_t(y|x) under the frozen reference, nats.
        beta: KL coefficient > 0, the paper's eta (Eq. 8) or eta-tilde (Eq. 13).
    """
    logprob, reference_logprob = float32(logprob=logprob, reference_logprob=reference_logprob)
    return beta * (logprob - reference_logprob)


def reward_margin(
    *,
    chosen_logprob: Logprob,
    rejected_logprob: Logprob,
    reference_chosen_logprob: Logprob,
    reference_rejected_logprob: Logprob,
    beta: float,
) -> Float[Array, "*#P"]:
    """Return the implicit reward of the chosen response minus that of the rejected one (Delta of section 3.1)."""
    chosen, rejected, reference_chosen, reference_rejected = float32(
        chosen_logprob=chosen_logprob,
        rejected_logprob=rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
    )
    return implicit_reward(logprob=chosen, reference_logprob=reference_chosen, beta=beta) - implicit_reward(
        logprob=rejected, reference_logprob=reference_rejected, beta=beta
    )


def cross_entropy(*, margin: Logprob, target: Logprob) -> Float[Array, "*#P"]:
    """Return -z log sigmoid(margin) - (1 - z) log sigmoid(-margin) for a target z (Eqs. 11-12); finite where margin is.

    It is linear in the target, also outside [0, 1] (`robust_target`). Its slope in the margin is sigmoid(margin) - z.
    """
    margin, target = float32(margin=margin, target=target)
    return jax.nn.softplus(-margin) + (1.0 - target) * margin


def chi_po_link(*, logprob: Logprob, reference_logprob: Logprob) -> Float[Array, "*#P"]:
    """Return z + log z of z = pi/pi_t, the link of chi-squared preference optimization (arXiv 2407.13399, Alg. 1).

    The z term regularises by the chi-squared divergence where DPO's log z alone regularises by KL. log z is capped at
    MAX_LOG_RATIO inside the exponential.
    """
    log_ratio = implicit_reward(logprob=logprob, reference_logprob=reference_logprob, beta=1.0)
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)) + log_ratio


def smoothed_target(*, target: Logprob, label_smoothing: float) -> Float[Array, "*#P"]:
    """Return (1 - e) z + e (1 - z), the target if labels flip with probability e (conservative DPO, Mitchell 2023).

    Raises:
        ValueError: label_smoothing outside [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    (target,) = float32(target=target)
    return label_smoothing + (1.0 - 2.0 * label_smoothing) * target


def robust_target(*, target: Logprob, label_smoothing: float) -> Float[Array, "*#P"]:
    """Return (z - e)/(1 - 2 e), which makes the loss unbiased for labels flipped with probability e (arXiv 2403.00409).

    It undoes `smoothed_target`: `dno_loss` with it is ((1 - e) loss(z) - e loss(1 - z))/(1 - 2 e), robust DPO. A hard
    label becomes a target outside [0, 1], and then the loss has no lower bound as the margin grows.

    Raises:
        ValueError: label_smoothing outside [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    (target,) = float32(target=target)
    return (target - label_smoothing) / (1.0 - 2.0 * label_smoothing)


def reference_mixture(
    previous_logprob: Logprob, initial_logprob: Logprob, *, tau: float, eta: float
) -> Float[Array, "*#P"]:
    """Return (1 - tau/eta) log pi_t + (tau/eta) log pi_ref, the reference of the regularised Algorithms 3 and 4.

    It is not normalised: the constant cancels between the two responses of a pair, and only there.

    Args:
        previous_logprob: log pi_t(y|x), nats.
        initial_logprob: log pi_ref(y|x), nats.
        tau: KL coefficient to pi_ref; 0 gives pi_t, eta gives pi_ref.
        eta: KL coefficient > 0 of the step, the beta of the loss.

    Raises:
        ValueError: not 0 <= tau <= eta, or eta = 0.
    """
    if not 0 <= tau <= eta or eta == 0:
        raise ValueError(f"the reference mixture needs 0 <= tau <= eta and eta > 0, got tau {tau} and eta {eta}")
    previous, initial = float32(previous_logprob=previous_logprob, initial_logprob=initial_logprob)
    return (1.0 - tau / eta) * previous + (tau / eta) * initial


def length_penalised_reference(
    *, reference_logprob: Logprob, num_tokens: NumTokens, alpha: float, beta: float
) -> Float[Array, "*#P"]:
    """Return log pi_t - (alpha/beta) |y|, which makes any pair loss penalise length (R-DPO, arXiv 2403.19159).

    Taking alpha |y| off the reward is a step from this reference: the margin gains alpha (|y+| - |y-|), so that less of
    it is left to learn where the chosen response is the longer one.

    Args:
        num_tokens: |y|, tokens of the response.
        alpha: reward subtracted per token, >= 0.
        beta: KL coefficient > 0 of the loss that takes this reference.
    """
    if alpha < 0:
        raise ValueError(f"the length penalty alpha must be >= 0, got {alpha}")
    reference, num_tokens = float32(reference_logprob=reference_logprob, num_tokens=num_tokens)
    return reference - (alpha / beta) * num_tokens


def length_normalised(*, logprob: Logprob, num_tokens: NumTokens) -> Float[Array, "*#P"]:
    """Return the mean log-probability per token: applied to policy and reference, it makes a loss of mean log-ratios.

    TRL's IPO does so. Such margins are smaller by the response's length, and need a larger beta. 0 tokens give 0.
    """
    logprob, num_tokens = float32(logprob=logprob, num_tokens=num_tokens)
    return logprob / jnp.maximum(num_tokens, 1.0)


def nll_loss(*, logprob: Logprob, num_tokens: NumTokens) -> Float[Array, "*#P"]:
    """Return the mean negative log-likelihood per token of each response (supervised fine-tuning).

    Args:
        logprob: log pi(y|x) summed over the response's tokens, nats.
        num_tokens: tokens of the response; 0 gives a loss of 0.
    """
    return -length_normalised(logprob=logprob, num_tokens=num_tokens)


def with_nll(loss: Logprob, *, chosen_logprob: Logprob, num_tokens: NumTokens, weight: float) -> Float[Array, "*#P"]:
    """Return loss + weight * nll_loss(chosen): keeps the chosen response likely while the margin grows.

    Perhaps the alpha = 0.005 that the paper lists and never defines (section 4); TRL's rpo_alpha.

    Args:
        loss: of each pair.
        num_tokens: tokens of the chosen response.
        weight: >= 0.
    """
    if weight < 0:
        raise ValueError(f"the weight of the NLL term must be >= 0, got {weight}")
    loss, logprob, num_tokens = float32(loss=loss, chosen_logprob=chosen_logprob, num_tokens=num_tokens)
    return loss + weight * nll_loss(logprob=logprob, num_tokens=num_tokens)


def forward_kl_loss(*, logprob: Logprob, reference_logprob: Logprob) -> Float[Array, "*#P"]:
    """Return log pi_ref(y|x) - log pi(y|x) of a response drawn from pi_ref: an unbiased estimate of KL(pi_ref || pi).

    Its slope is that of -log pi(y|x): the likelihood of the reference's own samples, in nats per response. Added to a
    loss (RSPO, arXiv 2503.00030) it keeps the policy wherever the reference is, its lengths with it.

    Args:
        logprob, reference_logprob: log pi(y|x) and log pi_ref(y|x), nats.
    """
    logprob, reference = float32(logprob=logprob, reference_logprob=reference_logprob)
    return reference - logprob
