"""The algorithms of `dno_jax.games` from samples: finite pairs, drawn verdicts, and the losses that train models.

Where `games.solve` takes expectations and minimisers, an iteration here draws `num_pairs` pairs of responses and their
verdicts, and trains the logits of a softmax policy with optax on a function of `dno_jax.losses`. What comes out is
judged exactly: the gaps in the returned `games.Solution` are those of the policies that sampling produced.

    P = games.cyclic_game()
    solution = sampled_games.solve_sampled(P, algorithm="comal", eta=0.5, tau=0.1, iterations=500, seed=0)
    solution.gaps[-1]

Accuracy: N pairs leave an error of about 1 / (eta sqrt(N)) in each step's log-ratios, however exact the arithmetic
(float32 here), and an algorithm that contracts by tau/eta a step keeps that times sqrt(eta / (2 tau)). With 4,096 pairs
gaps below about .03 are noise. A response too rare to be drawn keeps its log-ratio to the reference: where a policy has
all but lost a response that it needs, samples do not bring it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from dno_jax import games
from dno_jax.games.equilibria import check_prompt_weights, gaps_of
from dno_jax.losses import (
    dno_loss,
    inpo_loss,
    ipo_loss,
    nash_md_pg_loss,
    rebel_loss,
    reference_mixture,
    self_play_win_rates,
    spo_loss,
    sppo_hard_loss,
    sppo_loss,
)


class State(NamedTuple):
    """What passes from iteration to iteration: log-probabilities [C] of one prompt, as in `games.algorithms.State`."""

    policy: Array
    reference: Array
    auxiliary: Array


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


Step = Callable[[Array, Array, State, Array, Settings], State]  # (key, P, state, iteration, settings)


@dataclass(frozen=True)
class Algorithm:
    """An entry of the registry.

    Attributes:
        step: one iteration from samples.
        exact: the name in `games.ALGORITHMS` of what it does with endless data.
        step_size: default of those that take one gradient step an iteration, where the others solve a regression.
    """

    step: Step
    exact: str
    step_size: float = 0.05


# --- data: responses are one-hot rows, so that picking a log-probability is a product, whose gradient is one too


class Pairs(NamedTuple):
    """Pairs of responses, one-hot [N, C], and the target [N] that P(chosen preferred) is regressed on."""

    chosen: Array
    rejected: Array
    target: Array


def _draw(key: Array, log_policy: Float[Array, " C"], shape: tuple[int, ...]) -> Array:
    """Return the indices of responses drawn from a policy, normalised or not."""
    return jax.random.choice(key, log_policy.size, shape, p=jax.nn.softmax(log_policy))


def _one_hot(responses: Array, P: Float[Array, "C C"]) -> Array:
    return jax.nn.one_hot(responses, len(P))


def _verdicts(key: Array, P: Float[Array, "C C"], first: Array, second: Array) -> Array:
    """Return whether `first` won: one Bernoulli draw of P for each two responses; shapes broadcast."""
    chance = P[first, second]
    return jax.random.uniform(key, chance.shape) < chance


def _win_rates(key: Array, P: Float[Array, "C C"], responses: Array, opponent: Array, settings: Settings) -> Array:
    """Return P(y > opponent) of responses [R, N], each the mean verdict against K fresh responses of `opponent`.

    The K opponents of a row are shared, as the K responses of a prompt are. They do not contain the rated responses:
    leaving out oneself only, r(y1) - r(y2) would hold the verdict of the pair twice and be K / (K - 1) too large.
    """
    draws, verdicts = jax.random.split(key)
    opponents = _draw(draws, opponent, (settings.num_samples, 1, responses.shape[-1]))
    return _verdicts(verdicts, P, responses[None], opponents).mean(axis=0)


def _judged_pairs(key: Array, P: Float[Array, "C C"], policy: Array, settings: Settings) -> Pairs:
    """Draw pairs from the policy, the winner of one drawn verdict chosen: a target of 1 (Eq. 13 without filter)."""
    draws, verdicts = jax.random.split(key)
    first, second = _draw(draws, policy, (2, settings.num_pairs))
    won = _verdicts(verdicts, P, first, second)
    return Pairs(
        chosen=_one_hot(jnp.where(won, first, second), P),
        rejected=_one_hot(jnp.where(won, second, first), P),
        target=jnp.ones(settings.num_pairs),
    )


def _rated_pairs(key: Array, P: Float[Array, "C C"], policy: Array, settings: Settings) -> tuple[Pairs, Array]:
    """Draw pairs from the policy and rate both against it: targets sigma(r(y1) - r(y2)) (Eq. 8), and r1 - r2.

    The noise of K verdicts flattens the mean of the sigmoid: the step is that of an eta larger by about 1/(8 K).
    """
    draws, rates = jax.random.split(key)
    responses = _draw(draws, policy, (2, settings.num_pairs))
    first, second = _win_rates(rates, P, responses, policy, settings)
    chosen, rejected = _one_hot(responses, P)
    return Pairs(chosen, rejected, target=jax.nn.sigmoid(first - second)), first - second


def _pick(responses: Float[Array, "N C"], log_policy: Float[Array, " C"]) -> Float[Array, " N"]:
    return jnp.matmul(responses, log_policy, precision="highest")  # accelerators would round the log-probabilities


def _logprobs(pairs: Pairs, log_policy: Array, *, prefix: str = "") -> dict[str, Array]:
    """Return a policy's log-probabilities of the pairs, under the argument names that the losses have for them."""
    return {
        f"{prefix}chosen_logprob": _pick(pairs.chosen, log_policy),
        f"{prefix}rejected_logprob": _pick(pairs.rejected, log_policy),
    }


# --- training: a regression solved, or one step of gradient descent


def _regress(
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


def _descend(loss: Callable[[Array], Array], *, policy: Float[Array, " C"], settings: Settings) -> Float[Array, " C"]:
    """Return the log-policy after one step of gradient descent on the logits."""
    gradient = jax.grad(lambda logits: jnp.mean(loss(jax.nn.log_softmax(logits))))(policy)
    solver = optax.sgd(settings.step_size)
    updates, _ = solver.update(gradient, solver.init(policy), policy)
    return jax.nn.log_softmax(jnp.asarray(optax.apply_updates(policy, updates)))


def _regress_dno(pairs: Pairs, *, reference: Array, settings: Settings, eta: float | None = None) -> Array:
    """Eq. 8, and Eq. 13 where the targets are 1, with beta = eta."""
    beta = settings.eta if eta is None else eta
    fixed = {**_logprobs(pairs, reference, prefix="reference_"), "target": pairs.target, "beta": beta}
    return _regress(
        lambda policy: dno_loss(**_logprobs(pairs, policy), **fixed), reference=reference, eta=beta, settings=settings
    )


def _regress_ipo(pairs: Pairs, *, reference: Array, settings: Settings) -> Array:
    """(h - 1/(2 eta))^2 on judged pairs: with pairs from pi its minimiser is reference * exp(P(y > pi) / eta)."""
    fixed = {**_logprobs(pairs, reference, prefix="reference_"), "target": pairs.target, "beta": settings.eta}
    return _regress(
        lambda policy: settings.eta**2 * ipo_loss(**_logprobs(pairs, policy), **fixed),
        reference=reference,
        eta=settings.eta,
        settings=settings,
    )


def _mixture(state: State, *, tau: float, eta: float) -> Array:
    """pi_t^{1 - tau/eta} pi_ref^{tau/eta}, not normalised (Algorithm 3)."""
    return reference_mixture(state.policy, state.reference, tau=tau, eta=eta)


# --- algorithms, one iteration each; `games.algorithms` says what they are


def _dno(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Algorithm 1: Eq. 8 on pairs from pi_t, win rates against pi_t, soft labels."""
    pairs, _ = _rated_pairs(key, P, state.policy, settings)
    return state._replace(policy=_regress_dno(pairs, reference=state.policy, settings=settings))


def _rebel(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """DNO's regression by squared error on the difference of win rates."""
    pairs, difference = _rated_pairs(key, P, state.policy, settings)
    fixed = _logprobs(pairs, state.policy, prefix="reference_")

    def loss(policy: Array) -> Array:
        return rebel_loss(**_logprobs(pairs, policy), **fixed, reward_difference=difference, beta=settings.eta)

    return state._replace(policy=_regress(loss, reference=state.policy, eta=settings.eta, settings=settings))


def _option_1(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Algorithm 3 Option I: pairs from pi_t, win rates against pi_t, the mixture as reference."""
    return _option_1_step(key, P, state, eta=settings.eta, settings=settings)


def _option_1_step(key: Array, P: Array, state: State, *, eta: float, settings: Settings) -> State:
    pairs, _ = _rated_pairs(key, P, state.policy, settings)
    mixture = _mixture(state, tau=settings.tau, eta=eta)
    return state._replace(policy=_regress_dno(pairs, reference=mixture, settings=settings, eta=eta))


def _option_2(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Algorithm 3 Option II: pairs and opponents both from the mixture, which is the reference too."""
    mixture = _mixture(state, tau=settings.tau, eta=settings.eta)
    pairs, _ = _rated_pairs(key, P, mixture, settings)
    return state._replace(policy=_regress_dno(pairs, reference=mixture, settings=settings))


def _inpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """INPO: Option I by squared error on one verdict a pair."""
    pairs = _judged_pairs(key, P, state.policy, settings)
    fixed = {
        **_logprobs(pairs, state.policy, prefix="previous_"),
        **_logprobs(pairs, state.reference, prefix="initial_"),
        "target": pairs.target,
        "tau": settings.tau,
        "eta": settings.eta,
    }
    policy = _regress(
        lambda policy: settings.eta**2 * inpo_loss(**_logprobs(pairs, policy), **fixed),
        reference=_mixture(state, tau=settings.tau, eta=settings.eta),
        eta=settings.eta,
        settings=settings,
    )
    return state._replace(policy=policy)


def _sppo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """SPPO: each response's log-ratio to its win rate; every response of the pairs counts."""
    draws, rates = jax.random.split(key)
    responses = _draw(draws, state.policy, (2, settings.num_pairs))
    win_rate = _win_rates(rates, P, responses, state.policy, settings).reshape(-1)
    chosen = _one_hot(responses.reshape(-1), P)
    previous = _pick(chosen, state.policy)

    def loss(policy: Array) -> Array:
        values = sppo_loss(
            logprob=_pick(chosen, policy), reference_logprob=previous, win_rate=win_rate, beta=settings.eta
        )
        return settings.eta**2 * values

    return state._replace(policy=_regress(loss, reference=state.policy, eta=settings.eta, settings=settings))


def _sppo_hard(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """SPPO on winners and losers; the mean of its hard targets over opponents from pi_t is the win rate's."""
    pairs = _judged_pairs(key, P, state.policy, settings)
    fixed = {**_logprobs(pairs, state.policy, prefix="reference_"), "beta": settings.eta}
    policy = _regress(
        lambda policy: settings.eta**2 * sppo_hard_loss(**_logprobs(pairs, policy), **fixed),
        reference=state.policy,
        eta=settings.eta,
        settings=settings,
    )
    return state._replace(policy=policy)


def _iterative_dpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Iterated DPO: one verdict a pair from pi_t, all pairs kept, reference pi_t."""
    pairs = _judged_pairs(key, P, state.policy, settings)
    return state._replace(policy=_regress_dno(pairs, reference=state.policy, settings=settings))


def _iterative_dpo_fixed(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """The same with reference pi_ref."""
    pairs = _judged_pairs(key, P, state.policy, settings)
    return state._replace(policy=_regress_dno(pairs, reference=state.reference, settings=settings))


def _reward_maximisation(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """RLHF: pairs always from pi_ref. DPO with reference pi_t on them adds the Bradley-Terry rewards over eta."""
    pairs = _judged_pairs(key, P, state.reference, settings)
    return state._replace(policy=_regress_dno(pairs, reference=state.policy, settings=settings))


def _online_ipo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Online IPO: one gradient step on fresh pairs, beta = tau, reference pi_ref."""
    pairs = _judged_pairs(key, P, state.policy, settings)
    fixed = {**_logprobs(pairs, state.reference, prefix="reference_"), "target": pairs.target, "beta": settings.tau}
    policy = _descend(
        lambda policy: ipo_loss(**_logprobs(pairs, policy), **fixed), policy=state.policy, settings=settings
    )
    return state._replace(policy=policy)


def _online_dpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Online DPO: one gradient step on fresh pairs, beta = eta, reference pi_ref."""
    pairs = _judged_pairs(key, P, state.policy, settings)
    fixed = {**_logprobs(pairs, state.reference, prefix="reference_"), "target": pairs.target, "beta": settings.eta}
    policy = _descend(
        lambda policy: dno_loss(**_logprobs(pairs, policy), **fixed), policy=state.policy, settings=settings
    )
    return state._replace(policy=policy)


def _spo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """SPO: one policy-gradient step; K responses of pi_t rate each other, as many responses as other algorithms draw.

    Gradient ascent on logits moves each by pi_t(y) (r(y) - 1/2) where the exact `spo` moves it by r(y) / eta: the same
    fixed points with full support, cycles around them of another shape and speed. eta is not read.
    """
    draws, verdicts = jax.random.split(key)
    count = settings.num_samples
    responses = _draw(draws, state.policy, (max(2 * settings.num_pairs // count, 1), count))
    won = _verdicts(verdicts, P, responses[:, :, None], responses[:, None, :])
    upper = jnp.triu(jnp.ones((count, count), bool), k=1)[None]  # one verdict for each two, read from both sides
    preference = jnp.where(upper, won, ~won.swapaxes(1, 2)).astype(jnp.float32)
    win_rate = self_play_win_rates(preference=preference).reshape(-1)
    chosen = _one_hot(responses.reshape(-1), P)
    previous = _pick(chosen, state.policy)

    def loss(policy: Array) -> Array:
        return spo_loss(
            logprob=_pick(chosen, policy),
            previous_logprob=previous,
            win_rate=win_rate,
            clip_range=settings.clip_range,
        )

    return state._replace(policy=_descend(loss, policy=state.policy, settings=settings))


def _nash_md(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """Nash-MD-PG: one policy-gradient step on responses of pi_t, rated against K responses of the mixture.

    The share of pi_ref in the mixture is tau/eta throughout, where the exact `nash_md` by default lets it fall to 0; so
    this settles where `dno_option_2` does.
    """
    draws, rates = jax.random.split(key)
    responses = _draw(draws, state.policy, (2, settings.num_pairs))
    mixture = _mixture(state, tau=settings.tau, eta=settings.eta)
    win_rate = _win_rates(rates, P, responses, mixture, settings).reshape(-1)
    chosen = _one_hot(responses.reshape(-1), P)
    previous, initial = _pick(chosen, state.policy), _pick(chosen, state.reference)

    def loss(policy: Array) -> Array:
        return nash_md_pg_loss(
            logprob=_pick(chosen, policy),
            previous_logprob=previous,
            initial_logprob=initial,
            win_rate=win_rate,
            tau=settings.tau,
            clip_range=settings.clip_range,
        )

    return state._replace(policy=_descend(loss, policy=state.policy, settings=settings))


def _onpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """ONPO: the pairs of pi_t serve twice, to move pi' and as a guess of the next pairs."""
    pairs = _judged_pairs(key, P, state.policy, settings)
    auxiliary = _regress_ipo(pairs, reference=state.auxiliary, settings=settings)
    return state._replace(auxiliary=auxiliary, policy=_regress_ipo(pairs, reference=auxiliary, settings=settings))


def _egpo(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """EGPO: a trial step, then the step from the same mixture on pairs of the trial policy."""
    first, second = jax.random.split(key)
    mixture = _mixture(state, tau=settings.tau, eta=settings.eta)
    trial = _regress_ipo(_judged_pairs(first, P, state.policy, settings), reference=mixture, settings=settings)
    pairs = _judged_pairs(second, P, trial, settings)
    return state._replace(policy=_regress_ipo(pairs, reference=mixture, settings=settings))


def _refreshed(state: State, iteration: Array, settings: Settings) -> State:
    """Move the centre to the current policy after every `refresh` iterations."""
    due = (iteration > 0) & (iteration % settings.refresh == 0)
    return state._replace(reference=jnp.where(due, state.policy, state.reference))


def _comal(key: Array, P: Array, state: State, iteration: Array, settings: Settings) -> State:
    """COMAL: INPO towards a centre that follows the policy."""
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
    "comal": Algorithm(_comal, exact="comal"),
    "mpo": Algorithm(_mpo, exact="mpo"),
    "reward_maximisation": Algorithm(_reward_maximisation, exact="reward_maximisation"),
}


def solve_sampled(
    P: ArrayLike,
    *,
    algorithm: str = "dno",
    iterations: int = 100,
    eta: float | int = 1.0,
    tau: float | int = 0.0,
    initial: ArrayLike | None = None,
    reference: ArrayLike | None = None,
    refresh: int = 50,
    num_pairs: int = 4096,
    num_samples: int = 8,
    step_size: float | int | None = None,
    clip_range: float | int = 0.2,
    num_inner_steps: int = 20,
    prompt_weights: ArrayLike | None = None,
    seed: int = 0,
) -> games.Solution:
    """Play `iterations` updates of one algorithm in a preference game, each from freshly sampled pairs.

    Args:
        P: the game, [C, C] or [X, C, C]; it is asked for verdicts, and for the gaps of what was played.
        algorithm: a name in `ALGORITHMS`.
        iterations: T, the number of updates, at least 1.
        eta: KL coefficient, a constant: unlike in `games.solve` nash_md and inpo have no schedule of their own.
        tau, initial, reference, refresh, prompt_weights: as in `games.solve`.
        num_pairs: N, pairs of responses drawn for each prompt and iteration.
        num_samples: K, at least 2: the opponents that a win rate is the mean verdict against.
        step_size: of the gradient step of spo, nash_md, online_ipo and online_dpo; each has its own by default.
        clip_range: of spo's and nash_md's ratio; idle at one step an iteration, where the ratio is 1.
        num_inner_steps: of L-BFGS in each regression.
        seed: of every draw.

    Raises:
        ValueError: an unknown algorithm, or input that is no game, no policy of it, or no number it can use.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; sampled are {', '.join(ALGORITHMS)}")
    chosen = ALGORITHMS[algorithm]
    for name, value, least in (
        ("iterations", iterations, 1),
        ("num_pairs", num_pairs, 1),
        ("num_samples", num_samples, 2),
        ("num_inner_steps", num_inner_steps, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    step = chosen.step_size if step_size is None else step_size
    # One exact step refuses whatever neither form can use, and gives the start.
    checked = games.solve(
        P,
        algorithm=chosen.exact,
        iterations=1,
        eta=eta,
        tau=tau,
        initial=initial,
        reference=reference,
        refresh=refresh,
        step_size=step,
        prompt_weights=prompt_weights,
    )
    wins = games.check_game(P)
    start = checked.policies[0]
    center = start if reference is None else np.asarray(reference, np.float64)
    settings = Settings(
        eta=float(eta),
        tau=float(tau),
        num_pairs=num_pairs,
        num_samples=num_samples,
        refresh=refresh,
        step_size=float(step),
        clip_range=float(clip_range),
        num_inner_steps=num_inner_steps,
    )
    size = wins.shape[-1]
    logs = _play(
        jnp.asarray(wins.reshape(-1, size, size), jnp.float32),
        jnp.asarray(np.log(start).reshape(-1, size), jnp.float32),
        jnp.asarray(np.log(center).reshape(-1, size), jnp.float32),
        jax.random.key(seed),
        step=chosen.step,
        iterations=iterations,
        settings=settings,
    )
    played = np.exp(np.asarray(logs, np.float64).swapaxes(0, 1).reshape(iterations, *start.shape))
    policies = np.concatenate([start[None], played / played.sum(-1, keepdims=True)])
    counts = np.arange(1, iterations + 1).reshape(-1, *[1] * start.ndim)
    averages = np.cumsum(policies[:-1], axis=0) / counts
    weights = check_prompt_weights(prompt_weights, wins)
    return games.Solution(
        algorithm=algorithm,
        policies=policies,
        gaps=np.asarray(gaps_of(wins, policies, weights)),
        average_gaps=np.asarray(gaps_of(wins, averages, weights)),
    )


@partial(jax.jit, static_argnames=("step", "iterations", "settings"))
def _play(
    P: Float[Array, "X C C"],
    start: Float[Array, "X C"],
    center: Float[Array, "X C"],
    key: Array,
    *,
    step: Step,
    iterations: int,
    settings: Settings,
) -> Float[Array, "X T C"]:
    """Return log pi_2 .. log pi_{T+1} of every prompt; all iterations are one program, prompts are independent."""

    def prompt(P: Array, start: Array, center: Array, key: Array) -> Array:
        def update(state: State, iteration: Array) -> tuple[State, Array]:
            state = step(jax.random.fold_in(key, iteration), P, state, iteration, settings)
            return state, state.policy

        first = State(policy=start, reference=center, auxiliary=start)
        return jax.lax.scan(update, first, jnp.arange(iterations))[1]

    return jax.vmap(prompt)(P, start, center, jax.random.split(key, len(P)))
