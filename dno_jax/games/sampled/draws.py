"""What an iteration draws: pairs of responses, verdicts on them, and win rates.

Responses are one-hot rows, so that picking a log-probability is a product, whose gradient is one too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class State(NamedTuple):
    """What passes from iteration to iteration, [C] of one prompt: log pi_t, log pi_ref, and log pi_{t-1}."""

    policy: Array
    reference: Array
    before: Array


@dataclass(frozen=True)
class Settings:
    """The static numbers of a run, one compilation each; the arguments of `solve_sampled`."""

    eta: float
    tau: float
    num_pairs: int
    num_samples: int
    refresh: int
    step_size: float
    clip_range: float
    num_inner_steps: int


class Pairs(NamedTuple):
    """Pairs of responses, one-hot [N, C], and the target [N] that P(chosen preferred) is regressed on."""

    chosen: Array
    rejected: Array
    target: Array


def draw(key: Array, log_policy: Float[Array, " C"], shape: tuple[int, ...]) -> Array:
    """Return the indices of responses drawn from a policy, normalised or not."""
    return jax.random.choice(key, log_policy.size, shape, p=jax.nn.softmax(log_policy))


def one_hot(responses: Array, P: Float[Array, "C C"]) -> Array:
    return jax.nn.one_hot(responses, len(P))


def draw_verdicts(key: Array, P: Float[Array, "C C"], first: Array, second: Array) -> Array:
    """Return whether `first` won: one Bernoulli draw of P for each two responses; shapes broadcast."""
    chance = P[first, second]
    return jax.random.uniform(key, chance.shape) < chance


def draw_win_rates(key: Array, P: Float[Array, "C C"], responses: Array, opponent: Array, settings: Settings) -> Array:
    """Return P(y > opponent) of responses [R, N], each the mean verdict against K fresh responses of `opponent`.

    The K opponents of a row are shared, as the K responses of a prompt are. They do not contain the rated responses:
    leaving out oneself only, r(y1) - r(y2) would hold the verdict of the pair twice and be K / (K - 1) too large.
    """
    draws, verdicts = jax.random.split(key)
    opponents = draw(draws, opponent, (settings.num_samples, 1, responses.shape[-1]))
    return draw_verdicts(verdicts, P, responses[None], opponents).mean(axis=0)


def draw_judged_pairs(key: Array, P: Float[Array, "C C"], policy: Array, settings: Settings) -> Pairs:
    """Draw pairs from the policy, the winner of one drawn verdict chosen: a target of 1 (Eq. 13 without filter)."""
    draws, verdicts = jax.random.split(key)
    first, second = draw(draws, policy, (2, settings.num_pairs))
    won = draw_verdicts(verdicts, P, first, second)
    return Pairs(
        chosen=one_hot(jnp.where(won, first, second), P),
        rejected=one_hot(jnp.where(won, second, first), P),
        target=jnp.ones(settings.num_pairs),
    )


def draw_rated_pairs(
    key: Array, P: Float[Array, "C C"], policy: Array, settings: Settings, *, against: Array | None = None
) -> tuple[Pairs, Array]:
    """Draw pairs from the policy and rate both against it: targets sigma(r(y1) - r(y2)) (Eq. 8), and r1 - r2.

    The noise of K verdicts flattens the mean of the sigmoid: the step is that of an eta larger by about 1/(8 K).

    Args:
        against: rate them against this one instead.
    """
    draws, rates = jax.random.split(key)
    responses = draw(draws, policy, (2, settings.num_pairs))
    first, second = draw_win_rates(rates, P, responses, policy if against is None else against, settings)
    chosen, rejected = one_hot(responses, P)
    return Pairs(chosen, rejected, target=jax.nn.sigmoid(first - second)), first - second


def draw_optimistic_pairs(
    key: Array, P: Float[Array, "C C"], state: State, settings: Settings, *, iteration: Array
) -> Pairs:
    """Draw pairs from pi_t, rated against pi_t and against pi_{t-1}: targets sigma(2 dr_t - dr_{t-1}), r_{-1} = 0."""
    draws, rates, older = jax.random.split(key, 3)
    responses = draw(draws, state.policy, (2, settings.num_pairs))
    now, before = (
        draw_win_rates(of, P, responses, opponent, settings)
        for of, opponent in ((rates, state.policy), (older, state.before))
    )
    first, second = 2.0 * now - jnp.where(iteration > 0, before, 0.0)
    chosen, rejected = one_hot(responses, P)
    return Pairs(chosen, rejected, target=jax.nn.sigmoid(first - second))


def pick_logprobs(responses: Float[Array, "N C"], log_policy: Float[Array, " C"]) -> Float[Array, " N"]:
    return jnp.matmul(responses, log_policy, precision="highest")  # accelerators would round the log-probabilities


def pair_logprobs(pairs: Pairs, log_policy: Array, *, prefix: str = "") -> dict[str, Array]:
    """Return a policy's log-probabilities of the pairs, under the argument names that the losses have for them."""
    return {
        f"{prefix}chosen_logprob": pick_logprobs(pairs.chosen, log_policy),
        f"{prefix}rejected_logprob": pick_logprobs(pairs.rejected, log_policy),
    }
