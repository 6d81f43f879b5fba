"""Policy gradients against a preference: SPO and Nash-MD-PG. Responses must come from the policy, or one nearby."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dno_jax.losses.terms import MAX_LOG_RATIO, Logprob, float32


def self_play_win_rates(*, preference: Float[ArrayLike, "*P K K"]) -> Float[Array, "*P K"]:
    """Return mean_(j != i) P(y_i > y_j) of K responses of one policy: the reward of SPO (arXiv 2401.04056, Alg. 1).

    Args:
        preference: P(y_i > y_j) in [0, 1]; the diagonal is not read.
    """
    (preference,) = float32(preference=preference)
    if preference.ndim < 2 or preference.shape[-1] != preference.shape[-2] or preference.shape[-1] < 2:
        raise ValueError(f"preference must be [..., K, K] with K >= 2, got {list(preference.shape)}")
    count = preference.shape[-1]
    own = jnp.expand_dims(jnp.eye(count, dtype=bool), tuple(range(preference.ndim - 2)))
    return jnp.sum(jnp.where(own, 0.0, preference), axis=-1) / (count - 1)


def _clipped_surrogate(*, logprob: Array, previous_logprob: Array, advantage: Array, clip_range: float) -> Array:
    """PPO's -min(rho A, clip(rho) A) with one importance ratio rho = pi/pi_t per sequence."""
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range must be in (0, 1), got {clip_range}")
    ratio = jnp.exp(jnp.minimum(logprob - previous_logprob, MAX_LOG_RATIO))
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range) * advantage)


def spo_loss(
    *, logprob: Logprob, previous_logprob: Logprob, win_rate: Logprob, clip_range: float
) -> Float[Array, "*#P"]:
    """Return the policy-gradient loss of each response in SPO (arXiv 2401.04056): a PPO step on its win rate.

    The advantage is win_rate - 1/2, for P(pi_t > pi_t) = 1/2. Where the policy is pi_t the gradient is
    -(win_rate - 1/2) grad log pi(y|x).

    Args:
        logprob, previous_logprob: log pi(y|x) and log pi_t(y|x), nats, of a response sampled from pi_t.
        win_rate: P(y > pi_t), from `self_play_win_rates`.
        clip_range: the ratio pi/pi_t of a sequence is clipped to 1 +- clip_range, as in PPO.
    """
    logprob, previous, win_rate = float32(logprob=logprob, previous_logprob=previous_logprob, win_rate=win_rate)
    return _clipped_surrogate(
        logprob=logprob, previous_logprob=previous, advantage=win_rate - 0.5, clip_range=clip_range
    )


def nash_md_pg_loss(
    *,
    logprob: Logprob,
    previous_logprob: Logprob,
    initial_logprob: Logprob,
    win_rate: Logprob,
    tau: float,
    clip_range: float,
) -> Float[Array, "*#P"]:
    """Return the policy-gradient loss of each response in Nash-MD-PG (arXiv 2312.00886).

    Where the policy is pi_t, its gradient is -(P(y > y') - 1/2 - tau log pi/pi_ref) grad log pi(y|x). That y' comes
    from the mixture pi^(1-b) pi_ref^b (token by token) is a rule for data: with y' from pi it is self-play.

    Args:
        logprob, previous_logprob, initial_logprob: log pi, log pi_t, log pi_ref of a response sampled from pi_t, nats.
        win_rate: P(y > y'), in practice the mean over responses y' of the mixture.
        tau: KL coefficient to pi_ref, >= 0.
        clip_range: as in `spo_loss`.
    """
    if tau < 0:
        raise ValueError(f"tau must be >= 0, got {tau}")
    logprob, previous, initial, win_rate = float32(
        logprob=logprob, previous_logprob=previous_logprob, initial_logprob=initial_logprob, win_rate=win_rate
    )
    advantage = win_rate - 0.5 - tau * jax.lax.stop_gradient(logprob - initial)
    return _clipped_surrogate(logprob=logprob, previous_logprob=previous, advantage=advantage, clip_range=clip_range)
