"""The algorithms, one iteration each; `games.algorithms` says what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dno_jax.games.sampled.draws import (
    Settings,
    State,
    draw,
    draw_judged_pairs,
    draw_optimistic_pairs,
    draw_rated_pairs,
    draw_verdicts,
    draw_win_rates,
    one_hot,
    pair_logprobs,
    pick_logprobs,
)
from dno_jax.games.sampled.training import descend, geometric_mixture, regress, regress_dno, regress_ipo
from dno_jax.losses import (
    dno_loss,
    inpo_loss,
    ipo_loss,
    nash_md_pg_loss,
    rebel_loss,
    self_play_win_rates,
    spo_loss,
    sppo_hard_loss,
    sppo_loss,
)

Step = Callable[[Array, Array, State, Array, Settings], State]  # (key, P, state, iteration, settings)


@dataclass(frozen=True)
class Algorithm:
    """An entry of the registry.

    Attributes:
        step: one iteration from samples.
        exact: the name in `games.ALGORITHMS` of what it does with endless data.
        step_size: default of those that take one gradient step per iteration, where the others solve a regression.
    """

    step: Step
    exact: str
    step_size: float = 0.05


def _dno(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Algorithm 1: Eq. 8 on pairs from pi_t, win rates against pi_t, soft labels."""
    pairs, _ = draw_rated_pairs(key, P, state.policy, settings)
    return state._replace(policy=regress_dno(pairs, reference=state.policy, settings=settings))


def _rebel(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """DNO's regression by squared error on the difference of win rates."""
    pairs, difference = draw_rated_pairs(key, P, state.policy, settings)
    fixed = pair_logprobs(pairs, state.policy, prefix="reference_")

    def loss(policy: Array) -> Array:
        return rebel_loss(**pair_logprobs(pairs, policy), **fixed, reward_difference=difference, beta=settings.eta)

    return state._replace(policy=regress(loss, reference=state.policy, eta=settings.eta, settings=settings))


def _option_1(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Algorithm 3 Option I: pairs from pi_t, win rates against pi_t, the mixture as reference."""
    return _option_1_step(key, P, state, eta=settings.eta, settings=settings)


def _option_1_step(key: Array, P: Array, state: State, *, eta: float, settings: Settings) -> State:
    pairs, _ = draw_rated_pairs(key, P, state.policy, settings)
    mixture = geometric_mixture(state, tau=settings.tau, eta=eta)
    return state._replace(policy=regress_dno(pairs, reference=mixture, settings=settings, eta=eta))


def _option_2(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Algorithm 3 Option II: pairs and opponents both from the mixture, which is the reference too."""
    mixture = geometric_mixture(state, tau=settings.tau, eta=settings.eta)
    pairs, _ = draw_rated_pairs(key, P, mixture, settings)
    return state._replace(policy=regress_dno(pairs, reference=mixture, settings=settings))


def _inpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """INPO: Option I by squared error on one verdict per pair."""
    pairs = draw_judged_pairs(key, P, state.policy, settings)
    fixed = {
        **pair_logprobs(pairs, state.policy, prefix="previous_"),
        **pair_logprobs(pairs, state.reference, prefix="initial_"),
        "target": pairs.target,
        "tau": settings.tau,
        "eta": settings.eta,
    }
    policy = regress(
        lambda policy: settings.eta**2 * inpo_loss(**pair_logprobs(pairs, policy), **fixed),
        reference=geometric_mixture(state, tau=settings.tau, eta=settings.eta),
        eta=settings.eta,
        settings=settings,
    )
    return state._replace(policy=policy)


def _sppo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """SPPO: each response's log-ratio to its win rate; every response of the pairs counts."""
    draws, rates = jax.random.split(key)
    responses = draw(draws, state.policy, (2, settings.num_pairs))
    win_rate = draw_win_rates(rates, P, responses, state.policy, settings).reshape(-1)
    chosen = one_hot(responses.reshape(-1), P)
    previous = pick_logprobs(chosen, state.policy)

    def loss(policy: Array) -> Array:
        values = sppo_loss(
            logprob=pick_logprobs(chosen, policy), reference_logprob=previous, win_rate=win_rate, beta=settings.eta
        )
        return settings.eta**2 * values

    return state._replace(policy=regress(loss, reference=state.policy, eta=settings.eta, settings=settings))


def _sppo_hard(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """SPPO on winners and losers; the mean of its hard targets over opponents from pi_t is the win rate's."""
    pairs = draw_judged_pairs(key, P, state.policy, settings)
    fixed = {**pair_logprobs(pairs, state.policy, prefix="reference_"), "beta": settings.eta}
    policy = regress(
        lambda policy: settings.eta**2 * sppo_hard_loss(**pair_logprobs(pairs, policy), **fixed),
        reference=state.policy,
        eta=settings.eta,
        settings=settings,
    )
    return state._replace(policy=policy)


def _iterative_dpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Iterated DPO: one verdict per pair from pi_t, all pairs kept, reference pi_t."""
    pairs = draw_judged_pairs(key, P, state.policy, settings)
    return state._replace(policy=regress_dno(pairs, reference=state.policy, settings=settings))


def _iterative_dpo_fixed(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """The same with reference pi_ref."""
    pairs = draw_judged_pairs(key, P, state.policy, settings)
    return state._replace(policy=regress_dno(pairs, reference=state.reference, settings=settings))


def _reward_maximisation(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """RLHF: pairs always from pi_ref. DPO with reference pi_t on them adds the Bradley-Terry rewards over eta."""
    pairs = draw_judged_pairs(key, P, state.reference, settings)
    return state._replace(policy=regress_dno(pairs, reference=state.policy, settings=settings))


def _online_ipo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Online IPO: one gradient step on fresh pairs, beta = tau, reference pi_ref."""
    return _online(ipo_loss, key, P, state, beta=settings.tau, settings=settings)


def _online_dpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Online DPO: one gradient step on fresh pairs, beta = eta, reference pi_ref."""
    return _online(dno_loss, key, P, state, beta=settings.eta, settings=settings)


def _online(
    loss: Callable[..., Array], key: Array, P: Array, state: State, *, beta: float, settings: Settings
) -> State:
    pairs = draw_judged_pairs(key, P, state.policy, settings)
    fixed = {**pair_logprobs(pairs, state.reference, prefix="reference_"), "target": pairs.target, "beta": beta}
    policy = descend(
        lambda policy: loss(**pair_logprobs(pairs, policy), **fixed), policy=state.policy, settings=settings
    )
    return state._replace(policy=policy)


def _spo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """SPO: one policy-gradient step; K responses of pi_t rate each other, as many responses as other algorithms draw.

    Gradient ascent on logits moves each by pi_t(y) (r(y) - 1/2) where the exact `spo` moves it by r(y) / eta: the same
    fixed points with full support, cycles around them of another shape and speed. eta is not read.
    """
    draws, verdicts = jax.random.split(key)
    count = settings.num_samples
    responses = draw(draws, state.policy, (max(2 * settings.num_pairs // count, 1), count))
    won = draw_verdicts(verdicts, P, responses[:, :, None], responses[:, None, :])
    upper = jnp.triu(jnp.ones((count, count), bool), k=1)[None]  # one verdict for each two, read from both sides
    preference = jnp.where(upper, won, ~won.swapaxes(1, 2)).astype(jnp.float32)
    win_rate = self_play_win_rates(preference=preference).reshape(-1)
    chosen = one_hot(responses.reshape(-1), P)
    previous = pick_logprobs(chosen, state.policy)

    def loss(policy: Array) -> Array:
        return spo_loss(
            logprob=pick_logprobs(chosen, policy),
            previous_logprob=previous,
            win_rate=win_rate,
            clip_range=settings.clip_range,
        )

    return state._replace(policy=descend(loss, policy=state.policy, settings=settings))


def _nash_md(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Nash-MD-PG: one policy-gradient step on responses of pi_t, rated against K responses of the mixture.

    The share of pi_ref in the mixture is tau/eta throughout, where the exact `nash_md` by default lets it fall to 0; so
    this settles where `dno_option_2` does.
    """
    draws, rates = jax.random.split(key)
    responses = draw(draws, state.policy, (2, settings.num_pairs))
    mixture = geometric_mixture(state, tau=settings.tau, eta=settings.eta)
    win_rate = draw_win_rates(rates, P, responses, mixture, settings).reshape(-1)
    chosen = one_hot(responses.reshape(-1), P)
    previous, initial = pick_logprobs(chosen, state.policy), pick_logprobs(chosen, state.reference)

    def loss(policy: Array) -> Array:
        return nash_md_pg_loss(
            logprob=pick_logprobs(chosen, policy),
            previous_logprob=previous,
            initial_logprob=initial,
            win_rate=win_rate,
            tau=settings.tau,
            clip_range=settings.clip_range,
        )

    return state._replace(policy=descend(loss, policy=state.policy, settings=settings))


def _onpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """ONPO by one regression: pairs of pi_t, rated against pi_t and pi_{t-1}."""
    pairs = draw_optimistic_pairs(key, P, state, settings, iteration=iteration)
    return state._replace(policy=regress_dno(pairs, reference=state.policy, settings=settings), before=state.policy)


def _mirror_prox(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Nash mirror prox by Eq. 8: a trial step, then the same step with pi_{k+1/2} for the opponents of pi_k's pairs."""
    first, second = jax.random.split(key)
    eta = settings.eta + settings.tau
    mixture = geometric_mixture(state, tau=settings.tau, eta=eta)
    pairs, _ = draw_rated_pairs(first, P, state.policy, settings)
    trial = regress_dno(pairs, reference=mixture, settings=settings, eta=eta)
    pairs, _ = draw_rated_pairs(second, P, state.policy, settings, against=trial)
    return state._replace(policy=regress_dno(pairs, reference=mixture, settings=settings, eta=eta))


def _egpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """EGPO: a trial step, then the step from the same mixture on pairs of the trial policy."""
    first, second = jax.random.split(key)
    mixture = geometric_mixture(state, tau=settings.tau, eta=settings.eta)
    trial = regress_ipo(draw_judged_pairs(first, P, state.policy, settings), reference=mixture, settings=settings)
    pairs = draw_judged_pairs(second, P, trial, settings)
    return state._replace(policy=regress_ipo(pairs, reference=mixture, settings=settings))


def _refreshed(state: State, iteration: Array, settings: Settings) -> State:
    """Move the reference to the current policy after every `refresh` iterations."""
    due = (iteration > 0) & (iteration % settings.refresh == 0)
    return state._replace(reference=jnp.where(due, state.policy, state.reference))


def _comal(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """COMAL: INPO towards a reference that follows the policy."""
    return _inpo(key, P, _refreshed(state, iteration, settings), iteration, settings)


def _mpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """MPO: Option I with eta + tau for eta, towards a magnet that follows the policy."""
    refreshed = _refreshed(state, iteration, settings)
    return _option_1_step(key, P, refreshed, eta=settings.eta + settings.tau, settings=settings)


ALGORITHMS: dict[str, Algorithm] = {
    "dno": Algorithm(_dno, exact="dno"),
    "rebel": Algorithm(_rebel, exact="dno"),
    "spo": Algorithm(_spo, exact="spo", step_size=1.0),
    "dno_option_1": Algorithm(_option_1, exact="dno_option_1"),
    "dno_option_2": Algorithm(_option_2, exact="dno_option_2"),
    "nash_md": Algorithm(_nash_md, exact="nash_md", step_size=1.0),
    "inpo": Algorithm(_inpo, exact="inpo"),
    "sppo": Algorithm(_sppo, exact="sppo"),
    "sppo_hard": Algorithm(_sppo_hard, exact="sppo"),
    "online_ipo": Algorithm(_online_ipo, exact="online_ipo"),
    "online_dpo": Algorithm(_online_dpo, exact="online_dpo"),
    "iterative_dpo": Algorithm(_iterative_dpo, exact="iterative_dpo"),
    "iterative_dpo_fixed": Algorithm(_iterative_dpo_fixed, exact="iterative_dpo_fixed"),
    "onpo": Algorithm(_onpo, exact="onpo"),
    "egpo": Algorithm(_egpo, exact="egpo"),
    "nash_mirror_prox": Algorithm(_mirror_prox, exact="nash_mirror_prox"),
    "comal": Algorithm(_comal, exact="comal"),
    "mpo": Algorithm(_mpo, exact="mpo"),
    "reward_maximisation": Algorithm(_reward_maximisation, exact="reward_maximisation"),
}
