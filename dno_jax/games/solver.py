"""Run an algorithm on a game, exactly, and keep what it played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from dno_jax.games.algorithms import ALGORITHMS, Algorithm, Knobs, State
from dno_jax.games.equilibria import check_game, check_policy, check_prompt_weights, gaps_of
from dno_jax.preferences import transformed


@dataclass(frozen=True)
class Solution:
    """What an algorithm played in T updates.

    Attributes:
        algorithm: its name.
        policies: pi_1 .. pi_{T+1}, [T + 1, *X, C]; the first is the start.
        gaps: duality gap of each of them, [T + 1].
        average_gaps: entry t is the gap of unif(pi_1 .. pi_{t+1}), [T].
    """

    algorithm: str
    policies: Float[np.ndarray, "T1 *X C"]
    gaps: Float[np.ndarray, " T1"]
    average_gaps: Float[np.ndarray, " T"]

    @property
    def last(self) -> Float[np.ndarray, "*X C"]:
        """The last iterate pi_{T+1}."""
        return self.policies[-1]

    @property
    def average(self) -> Float[np.ndarray, "*X C"]:
        """The uniform mixture of pi_1 .. pi_T, which Algorithm 1 returns."""
        return self.policies[:-1].mean(axis=0)


def solve(
    P: ArrayLike,
    *,
    algorithm: str = "dno",
    iterations: int = 100,
    eta: float | int | Callable[[int], float] | None = None,
    tau: float | int = 0.0,
    initial: ArrayLike | None = None,
    reference: ArrayLike | None = None,
    refresh: int = 50,
    step_size: float | int = 0.05,
    transform: str = "identity",
    num_opponents: int | None = None,
    seed: int = 0,
    prompt_weights: ArrayLike | None = None,
) -> Solution:
    """Play `iterations` exact updates of one algorithm in a preference game.

    Args:
        P: the game, P[y, y'] = P(y > y'), [C, C] or [X, C, C].
        algorithm: a name in `ALGORITHMS`.
        iterations: T, the number of updates, at least 1.
        eta: KL coefficient, above 0: the paper's eta (DPO's beta; 1/eta in SPPO, Nash-MD and ONPO), or a schedule t ->
            eta_t with t = 0, 1, .... None is the algorithm's own: tau (t + 2) / 2 for nash_md and inpo, 1/2 for
            nash_mirror_prox, else 1.
        tau: strength of the pull to the reference, for the regularised algorithms; never above eta where they mix.
        initial: pi_1 with full support, [C] or [X, C]; uniform by default, as in Algorithm 1.
        reference: pi_ref with full support; pi_1 by default. The first one of comal and mpo.
        refresh: comal and mpo move their reference after this many steps.
        step_size: of online_ipo's and online_dpo's gradient step.
        transform: Psi; payoffs, and so gaps, are then those of Psi(P) (`preferences.transformed`).
        num_opponents: K; every reward is then the mean over K opponents sampled from the policy that is met, the same K
            for all responses. None: the expectation.
        seed: of those samples.
        prompt_weights: rho, [X], which the gaps are averaged with; uniform by default.

    Raises:
        ValueError: an unknown algorithm, or input that is no game, no policy of it, or no number it can use.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    chosen = ALGORITHMS[algorithm]
    for name, value, default in (("transform", transform, "identity"), ("num_opponents", num_opponents, None)):
        if value != default and chosen.draws_verdicts:
            raise ValueError(
                f"{algorithm} learns from verdicts of pairs, which {name}={value} says nothing of; leave it out"
            )
    wins = transformed(check_game(P), transform)
    weights = check_prompt_weights(prompt_weights, wins)
    if initial is None:
        initial = np.full(wins.shape[:-1], 1.0 / wins.shape[-1])
    start = np.log(check_policy(initial, wins, name="initial", full_support=True))
    log_reference = start
    if reference is not None:
        log_reference = np.log(check_policy(reference, wins, name="reference", full_support=True))
    counts = {"iterations": iterations, "refresh": refresh, "num_opponents": num_opponents}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not (np.isfinite(step_size) and step_size > 0.0):
        raise ValueError(f"step_size must be a positive number, got {step_size}")
    _check_tau(algorithm, chosen, tau)
    schedule = chosen.default_eta(float(tau)) if eta is None else eta if callable(eta) else lambda t: eta

    meet = _sampler(num_opponents, seed)
    state = State(policy=start, reference=log_reference, before=np.zeros_like(start))
    logs = np.empty((iterations + 1, *start.shape))
    logs[0] = start
    for t in range(iterations):
        knobs = Knobs(t, _check_eta(schedule(t), t, chosen, tau), float(tau), refresh, float(step_size), meet)
        state = chosen.step(wins, state, knobs)
        logs[t + 1] = state.policy
    policies = np.exp(logs)
    steps = np.arange(1, iterations + 1).reshape(-1, *[1] * start.ndim)
    averages = np.cumsum(policies[:-1], axis=0) / steps
    return Solution(
        algorithm=algorithm,
        policies=policies,
        gaps=np.asarray(gaps_of(wins, policies, weights)),
        average_gaps=np.asarray(gaps_of(wins, averages, weights)),
    )


def _sampler(num_opponents: int | None, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return what makes a policy the frequencies of K responses drawn from it, for every prompt anew."""
    if num_opponents is None:
        return lambda policy: policy
    rng, count = np.random.default_rng(seed), num_opponents
    return lambda policy: rng.multinomial(count, policy / policy.sum(-1, keepdims=True)) / count


def _check_tau(name: str, algorithm: Algorithm, tau: float | int) -> None:
    if not (np.isfinite(tau) and tau >= 0.0):
        raise ValueError(f"tau must be a number >= 0, got {tau}")
    if tau and not algorithm.takes_tau:
        regularised = ", ".join(other for other, entry in ALGORITHMS.items() if entry.takes_tau)
        raise ValueError(f"{name} has no tau, got tau={tau}; the regularised algorithms are {regularised}")
    if algorithm.needs_tau and not tau:
        raise ValueError(f"{name} needs tau > 0")


def _check_eta(eta: float | int, t: int, algorithm: Algorithm, tau: float | int) -> float:
    if not (np.isfinite(eta) and eta > 0.0):
        raise ValueError(f"eta must be a positive number, got {eta} at t={t}")
    if algorithm.mixes and tau > eta:
        raise ValueError(
            f"tau must be at most eta (the mixture's weight is tau/eta), got tau={tau}, eta={eta} at t={t}"
        )
    return float(eta)
