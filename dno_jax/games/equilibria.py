"""What a policy is worth in a preference game, and the policies that nothing beats."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from dno_jax.preferences import check_preference_matrix, transformed


def check_game(P: ArrayLike) -> Float[np.ndarray, "*X C C"]:
    """Return P as float64 if it is a preference game, [C, C] or [X, C, C].

    Raises:
        ValueError: not square, fewer than two responses, a value outside [0, 1], or P + P^T != 1; names the prompt.
    """
    wins = np.asarray(P, np.float64)
    if wins.ndim not in (2, 3) or wins.shape[-1] != wins.shape[-2] or wins.shape[-1] < 2 or not wins.size:
        raise ValueError(f"a game has shape [C, C] or [X, C, C] with at least two responses C, got {wins.shape}")
    for prompt in np.ndindex(wins.shape[:-2]):
        try:
            check_preference_matrix(wins[prompt])
        except ValueError as error:
            raise ValueError(f"prompt {prompt[0]}: {error}" if prompt else str(error)) from None
    return wins


def check_policy(
    policy: ArrayLike, P: Float[np.ndarray, "*X C C"], *, name: str = "policy", full_support: bool = False
) -> Float[np.ndarray, "*X C"]:
    """Return the policy as float64 if it is one of this game.

    Args:
        policy: probabilities, [C] or [X, C] like the game.
        P: a checked game.
        name: what the message calls it.
        full_support: refuse zeros (a reference, or the start of multiplicative updates).

    Raises:
        ValueError: another shape than the game's, negative entries, a sum other than 1 (to 1e-6), or a forbidden zero.
    """
    values = np.asarray(policy, np.float64)
    if values.shape != P.shape[:-1]:
        raise ValueError(f"{name} must have shape {P.shape[:-1]}, as the game has {P.shape}; got {values.shape}")
    if not np.all(values >= 0.0) or np.abs(values.sum(-1) - 1.0).max() > 1e-6:
        raise ValueError(f"{name} must be probabilities that sum to 1, got {values.tolist()}")
    if full_support and not np.all(values > 0.0):
        raise ValueError(f"{name} must give every response a positive probability, got {values.tolist()}")
    return values


def check_prompt_weights(
    prompt_weights: ArrayLike | None, P: Float[np.ndarray, "*X C C"]
) -> Float[np.ndarray, " *X"] | None:
    """Return the prompt distribution rho, or None for the uniform one."""
    if prompt_weights is None:
        return None
    weights = np.asarray(prompt_weights, np.float64)
    if weights.shape != P.shape[:-2]:
        raise ValueError(
            f"prompt_weights must have shape {P.shape[:-2]}, as the game has {P.shape}; got {weights.shape}"
        )
    if not np.all(weights >= 0.0) or abs(weights.sum() - 1.0) > 1e-6:
        raise ValueError(f"prompt_weights must be probabilities that sum to 1, got {weights.tolist()}")
    return weights


def check_tau(tau: float | int) -> float:
    if not (np.isfinite(tau) and tau > 0.0):
        raise ValueError(f"tau must be a positive number, got {tau}")
    return float(tau)


def over_prompts(values: ArrayLike, weights: np.ndarray | None, axes: int) -> np.ndarray:
    """Return E_{x ~ rho} over the last `axes` (0 or 1) axes."""
    found = np.asarray(values)
    if not axes:
        return found
    return np.asarray(found.mean(-1) if weights is None else found @ weights)


def win_rates(P: ArrayLike, policy: ArrayLike) -> Float[np.ndarray, "*X C"]:
    """Return r(x, y) = E_{y' ~ policy(.|x)} P(y > y' | x), the reward against a policy (section 2)."""
    wins = check_game(P)
    return rewards_against(wins, check_policy(policy, wins))


def rewards_against(P: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """`win_rates` without checks; leading axes broadcast."""
    return (P @ policy[..., None])[..., 0]


def preference(
    P: ArrayLike, policy: ArrayLike, *, opponent: ArrayLike, prompt_weights: ArrayLike | None = None
) -> float:
    """Return P(policy > opponent) = E_{x ~ rho, y ~ policy, y' ~ opponent} P(y > y' | x), in [0, 1]."""
    wins = check_game(P)
    rewards = rewards_against(wins, check_policy(opponent, wins, name="opponent"))
    value = (check_policy(policy, wins) * rewards).sum(-1)
    return float(over_prompts(value, check_prompt_weights(prompt_weights, wins), wins.ndim - 2))


def kl(policy: ArrayLike, other: ArrayLike) -> Float[np.ndarray, " *X"]:
    """Return KL(policy || other) in nats, per prompt; infinite where `other` lacks a response that `policy` gives."""
    p, q = np.asarray(policy, np.float64), np.asarray(other, np.float64)
    if p.shape != q.shape:
        raise ValueError(f"two policies of one shape are wanted, got {p.shape} and {q.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(p > 0.0, p * (np.log(p) - np.log(q)), 0.0).sum(-1))


def duality_gap(P: ArrayLike, policy: ArrayLike, *, prompt_weights: ArrayLike | None = None) -> float:
    """Return how exploitable a policy is: max_pi' P(pi' > policy) - min_pi' P(policy > pi'), in [0, 1].

    By symmetry this is 2 (E_x max_y P(y > policy | x) - 1/2); it is 0 exactly at a minimax winner (Eq. 3).

    Args:
        P: the game, [C, C] or [X, C, C].
        policy: [C] or [X, C].
        prompt_weights: rho, [X]; uniform by default.

    Raises:
        ValueError: no preference game, no policy of it, or no distribution over its prompts.
    """
    wins = check_game(P)
    gaps = gaps_of(wins, check_policy(policy, wins), check_prompt_weights(prompt_weights, wins))
    return float(gaps)


def gaps_of(P: np.ndarray, policies: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """`duality_gap` without checks, of policies with any leading axes."""
    exploit = 2.0 * rewards_against(P, policies).max(-1) - 1.0
    return over_prompts(exploit, weights, P.ndim - 2)


def nash(P: ArrayLike, *, transform: str = "identity") -> Float[np.ndarray, "*X C"]:
    """Return a von Neumann winner (Eq. 3) of each prompt by linear programming.

    It maximises v subject to sum_y pi(y) (P(y > y') - 1/2) >= v for all y' and pi a distribution; v is 0 by symmetry.
    Where the game has several Nash policies this is one vertex of their set.

    Args:
        P: the game, [C, C] or [X, C, C].
        transform: Psi; the winner is then that of the payoffs Psi(P) (`preferences.transformed`).

    Raises:
        ValueError: no preference game, or one that the transform cannot take.
    """
    wins = transformed(check_game(P), transform)
    policy = np.empty(wins.shape[:-1])
    for prompt in np.ndindex(wins.shape[:-2]):
        policy[prompt] = _maximin(wins[prompt] - 0.5)
    return policy


def _maximin(payoff: Float[np.ndarray, "C C"]) -> Float[np.ndarray, " C"]:
    from scipy.optimize import linprog

    size = len(payoff)
    result = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=np.column_stack([-payoff.T, np.ones(size)]),
        b_ub=np.zeros(size),
        A_eq=np.append(np.ones(size), 0.0)[None],
        b_eq=np.ones(1),
        bounds=[(0.0, 1.0)] * size + [(-1.0, 1.0)],
        method="highs-ds",
    )
    if result.status != 0:
        raise RuntimeError(f"the linear program of a {size}-response game failed: {result.message}")
    policy = np.maximum(result.x[:size], 0.0)
    return policy / policy.sum()


def regularised_nash(P: ArrayLike, *, reference: ArrayLike, tau: float | int) -> Float[np.ndarray, "*X C"]:
    """Return the one Nash policy of the KL-regularised preference (Eq. 5): pi ∝ pi_ref exp(P(y > pi) / tau).

    With pi = softmax(theta) and A = P - 1/2 this is the root of theta - log pi_ref - A pi / tau, found by damped
    Newton. Its Jacobian I - A (diag(pi) - pi pi^T) / tau has eigenvalues 1 + i x, never singular, so the search cannot
    get stuck.

    Args:
        P: the game, [C, C] or [X, C, C].
        reference: pi_ref with full support, [C] or [X, C].
        tau: strength of the regularisation, above 0. It keeps the policy off the Nash policy of the game itself.

    Raises:
        ValueError: bad input, see `check_game` and `check_policy`.
    """
    wins = check_game(P)
    log_reference = np.log(check_policy(reference, wins, name="reference", full_support=True))
    tau = check_tau(tau)
    policy = np.empty(wins.shape[:-1])
    for prompt in np.ndindex(wins.shape[:-2]):
        policy[prompt] = _regularised(wins[prompt] - 0.5, log_reference[prompt], tau)
    return policy


def _regularised(payoff: np.ndarray, log_reference: np.ndarray, tau: float) -> np.ndarray:
    def residual(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        policy = softmax(theta)
        return policy, theta - log_reference - payoff @ policy / tau

    theta = log_reference.copy()
    policy, miss = residual(theta)
    tolerance = 1e-13 * (1.0 + 1.0 / tau)
    for _ in range(1000):
        if np.abs(miss).max() <= tolerance:
            return policy
        jacobian = np.eye(len(theta)) - payoff @ (np.diag(policy) - np.outer(policy, policy)) / tau
        step = np.linalg.solve(jacobian, miss)
        length = 1.0
        while length > 1e-12:
            new_policy, new_miss = residual(theta - length * step)
            if np.linalg.norm(new_miss) <= (1.0 - 1e-4 * length) * np.linalg.norm(miss):
                break
            length *= 0.5
        else:
            break  # rounding stops all progress
        theta, policy, miss = theta - length * step, new_policy, new_miss
    if np.abs(miss).max() > 1e3 * tolerance:
        raise RuntimeError(f"Newton's method left a residual of {np.abs(miss).max():.3g} at tau={tau}")
    return policy


def stable_eta(P: ArrayLike, *, reference: ArrayLike, tau: float | int) -> float:
    """Return the eta above which Option I (Algorithm 3) converges to the regularised Nash policy in its last iterate.

    It is (tau^2 + lambda^2) / (2 tau) with lambda the largest |eigenvalue| of (diag(p) - p p^T)(P - 1/2) at that policy
    p; the linearised update is (1 - tau/eta) + i lambda/eta, and below the threshold its modulus passes 1. Not in the
    paper. The largest over prompts, and never below tau, which Algorithm 3 needs.
    """
    wins = check_game(P)
    tau = check_tau(tau)
    points = regularised_nash(wins, reference=reference, tau=tau)
    covariance = points[..., :, None] * (np.eye(wins.shape[-1]) - points[..., None, :])
    spread = np.abs(np.linalg.eigvals(covariance @ (wins - 0.5))).max()
    return max(tau, float((tau**2 + spread**2) / (2.0 * tau)))


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_normalise(values: np.ndarray) -> np.ndarray:
    """Return log softmax(values) over the last axis."""
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
