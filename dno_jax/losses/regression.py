"""Losses that regress log-ratios on preferences: DNO and its neighbours. The data may come from any policy."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from dno_jax.losses.terms import (
    Logprob,
    chi_po_link,
    cross_entropy,
    float32,
    implicit_reward,
    reference_mixture,
    reward_margin,
)


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

    With Delta = beta log pi/pi_t (chosen) - beta log pi/pi_t (rejected) and target z, the loss is the binary
    cross-entropy -z log sigmoid(Delta) - (1 - z) log sigmoid(-Delta), written as softplus(-Delta) + (1 - z) Delta:
    finite for any finite Delta. Its gradient in Delta is sigmoid(Delta) - z.

    Args:
        chosen_logprob, rejected_logprob: log pi(y|x) of the two responses, nats; any matching shape.
        reference_chosen_logprob, reference_rejected_logprob: the same under the frozen reference pi_t.
        target: P(chosen preferred) in [0, 1] that is regressed on; sigmoid(r_t(y1) - r_t(y2)) in Algorithm 1, and 1 in
            DNO-Prct, where the loss is DPO's with reference pi_t.
        beta: KL coefficient > 0, the paper's eta (or eta-tilde).

    Returns:
        Loss per pair, float32, >= 0 for a target in [0, 1]; log 2 where policy and reference agree.
    """
    delta = reward_margin(
        chosen_logprob=chosen_logprob,
        rejected_logprob=rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
        beta=beta,
    )
    return cross_entropy(margin=delta, target=target)


def spin_loss(
    *,
    chosen_logprob: Logprob,
    rejected_logprob: Logprob,
    reference_chosen_logprob: Logprob,
    reference_rejected_logprob: Logprob,
    beta: float,
) -> Float[Array, "*#P"]:
    """Return SPIN's loss of each pair (arXiv 2401.01335): `dno_loss` with a target of 1.

    SPIN is a rule for data more than a loss: the chosen response is always the gold one of the supervised data, the
    rejected one is always sampled from pi_t, the reference is pi_t, and nobody is asked for a preference.
    """
    return dno_loss(
        chosen_logprob=chosen_logprob,
        rejected_logprob=rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
        target=1.0,
        beta=beta,
    )


def chi_po_loss(
    *,
    chosen_logprob: Logprob,
    rejected_logprob: Logprob,
    reference_chosen_logprob: Logprob,
    reference_rejected_logprob: Logprob,
    target: Logprob,
    beta: float,
    max_reward: float,
) -> Float[Array, "*#P"]:
    """Return the chi-PO loss of each pair (arXiv 2407.13399, Alg. 1): `dno_loss` with another link, and clipped.

    Args:
        max_reward: R_max > 0; the margin, beta times the difference of `chi_po_link`, is clipped to +- 2 R_max, and a
            pair beyond that has no gradient, whichever way it errs.

    The other arguments are those of `dno_loss`.
    """
    if not max_reward > 0:
        raise ValueError(f"max_reward must be > 0, got {max_reward}")
    chosen = chi_po_link(logprob=chosen_logprob, reference_logprob=reference_chosen_logprob)
    rejected = chi_po_link(logprob=rejected_logprob, reference_logprob=reference_rejected_logprob)
    chosen, rejected = float32(chosen_link=chosen, rejected_link=rejected)
    margin = jnp.clip(beta * (chosen - rejected), -2.0 * max_reward, 2.0 * max_reward)
    return cross_entropy(margin=margin, target=target)


def ipo_loss(
    *,
    chosen_logprob: Logprob,
    rejected_logprob: Logprob,
    reference_chosen_logprob: Logprob,
    reference_rejected_logprob: Logprob,
    target: Logprob,
    beta: float,
) -> Float[Array, "*#P"]:
    """Return the IPO loss of each pair (arXiv 2310.12036, Eq. 17): (h - 1/(2 beta))^2 where the target is 1.

    h is the difference of log pi/pi_ref (`reward_margin` with beta = 1). A target z gives the expected loss over a
    label drawn with that probability, z (h - 1/(2 beta))^2 + (1 - z) (h + 1/(2 beta))^2, least at (2 z - 1)/(2 beta).
    With pairs sampled from the policy itself and a fixed reference it is Online IPO (arXiv 2403.08635).

    Args:
        target: P(chosen preferred) in [0, 1]; 1 for a hard label.
        beta: KL coefficient > 0, IPO's tau.

    The other arguments are those of `dno_loss`.
    """
    h = reward_margin(
        chosen_logprob=chosen_logprob,
        rejected_logprob=rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
        beta=1.0,
    )
    h, target = float32(margin=h, target=target)
    return (h - (2.0 * target - 1.0) / (2.0 * beta)) ** 2 + target * (1.0 - target) / beta**2


def inpo_loss(
    *,
    chosen_logprob: Logprob,
    rejected_logprob: Logprob,
    previous_chosen_logprob: Logprob,
    previous_rejected_logprob: Logprob,
    initial_chosen_logprob: Logprob,
    initial_rejected_logprob: Logprob,
    target: Logprob,
    tau: float,
    eta: float,
) -> Float[Array, "*#P"]:
    """Return the INPO loss of each pair (arXiv 2407.00617): (h_t - 1/(2 eta))^2 where the target is 1.

    h_t = log pi(y+)/pi(y-) - (tau/eta) log pi_ref(y+)/pi_ref(y-) - ((eta-tau)/eta) log pi_t(y+)/pi_t(y-): IPO with
    beta = eta against `reference_mixture`. With both responses sampled from pi_t and labels drawn from P, its minimiser
    is that of (h_t - (P(y+ > pi_t) - P(y- > pi_t))/eta)^2 (Prop. 6), the squared twin of Algorithm 3, Option I, of DNO.

    Args:
        previous_chosen_logprob, previous_rejected_logprob: under pi_t, nats.
        initial_chosen_logprob, initial_rejected_logprob: under pi_ref, nats.
        target: P(chosen preferred) in [0, 1]; 1 for a hard label.
        tau, eta: KL coefficients to pi_ref and of the step, 0 <= tau <= eta.
    """
    return ipo_loss(
        chosen_logprob=chosen_logprob,
        rejected_logprob=rejected_logprob,
        reference_chosen_logprob=reference_mixture(previous_chosen_logprob, initial_chosen_logprob, tau=tau, eta=eta),
        reference_rejected_logprob=reference_mixture(
            previous_rejected_logprob, initial_rejected_logprob, tau=tau, eta=eta
        ),
        target=target,
        beta=eta,
    )


def rebel_loss(
    *,
    chosen_logprob: Logprob,
    rejected_logprob: Logprob,
    reference_chosen_logprob: Logprob,
    reference_rejected_logprob: Logprob,
    reward_difference: Logprob,
    beta: float,
) -> Float[Array, "*#P"]:
    """Return the REBEL loss of each pair (arXiv 2404.16767): (Delta - (r(y+) - r(y-)))^2.

    Delta is `reward_margin`: the same regression as DNO's Eq. 8, by squared error on the difference of rewards where
    Eq. 8 takes the cross-entropy of its sigmoid. With win rates as rewards, and over beta^2, it is INPO's regression.

    Args:
        reward_difference: r(chosen) - r(rejected); the logit of DNO's target.
        beta: KL coefficient > 0, the inverse of REBEL's eta.

    The other arguments are those of `dno_loss`.
    """
    delta = reward_margin(
        chosen_logprob=chosen_logprob,
        rejected_logprob=rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
        beta=beta,
    )
    delta, reward_difference = float32(margin=delta, reward_difference=reward_difference)
    return (delta - reward_difference) ** 2


def sppo_loss(*, logprob: Logprob, reference_logprob: Logprob, win_rate: Logprob, beta: float) -> Float[Array, "*#P"]:
    """Return the SPPO loss of each response (arXiv 2405.00675): (log pi/pi_t - (P(y > pi_t) - 1/2)/beta)^2.

    Args:
        win_rate: P(y > pi_t) in [0, 1], in practice the mean over K responses of pi_t.
        beta: KL coefficient > 0, the inverse of SPPO's eta (theirs is 1000).

    The other arguments are those of `implicit_reward`.
    """
    logprob, reference, win_rate = float32(logprob=logprob, reference_logprob=reference_logprob, win_rate=win_rate)
    log_ratio = implicit_reward(logprob=logprob, reference_logprob=reference, beta=1.0)
    return (log_ratio - (win_rate - 0.5) / beta) ** 2


def sppo_hard_loss(
    *,
    chosen_logprob: Logprob,
    rejected_logprob: Logprob,
    reference_chosen_logprob: Logprob,
    reference_rejected_logprob: Logprob,
    beta: float,
) -> Float[Array, "*#P"]:
    """Return the SPPO loss of each pair at win rates of 1 and 0: each log-ratio is drawn to +-1/(2 beta) on its own.

    The arguments are those of `dno_loss`; beta is the inverse of SPPO's eta.
    """
    chosen = sppo_loss(logprob=chosen_logprob, reference_logprob=reference_chosen_logprob, win_rate=1.0, beta=beta)
    rejected = sppo_loss(
        logprob=rejected_logprob, reference_logprob=reference_rejected_logprob, win_rate=0.0, beta=beta
    )
    chosen, rejected = float32(chosen_loss=chosen, rejected_loss=rejected)
    return chosen + rejected
