"""The regressions behind the updates, solved to the last digit on tabular policies."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from dno_jax.games.equilibria import check_game, check_policy, log_normalise


def soft_policy_iteration(
    log_policy: Float[np.ndarray, "*X C"], rewards: Float[np.ndarray, "*X C"], *, eta: float
) -> Float[np.ndarray, "*X C"]:
    """Return log pi* with pi* ∝ pi exp(r / eta), the soft policy iteration target (Eq. 4 and 9)."""
    return log_normalise(log_policy + rewards / eta)


def dno_regression_loss(
    policy: ArrayLike, *, rewards: ArrayLike, reference: ArrayLike, eta: float | int, mu_1: ArrayLike, mu_2: ArrayLike
) -> float:
    """Return the negative of Eq. 8's objective for one prompt.

    -E_{y1 ~ mu_1, y2 ~ mu_2} [ z log sigma(D) + (1 - z) log sigma(-D) ] with z = sigma(r(y1) - r(y2)) and
    D = eta (log pi/pi_t(y1) - log pi/pi_t(y2)).

    Args:
        policy: pi, [C].
        rewards: r_t, [C].
        reference: pi_t (in Algorithm 3 its mixture with pi_ref, normalised or not), [C].
        eta: the KL coefficient.
        mu_1, mu_2: where y1 and y2 are drawn from, [C].
    """
    reward = np.asarray(rewards, np.float64)
    ratio = eta * (np.log(np.asarray(policy, np.float64)) - np.log(np.asarray(reference, np.float64)))
    label = _sigmoid(reward[:, None] - reward)
    logit = ratio[:, None] - ratio
    loss = label * np.logaddexp(0.0, -logit) + (1.0 - label) * np.logaddexp(0.0, logit)
    return float(np.asarray(mu_1, np.float64) @ loss @ np.asarray(mu_2, np.float64))


def dno_regression(
    rewards: ArrayLike, *, reference: ArrayLike, eta: float | int, mu_1: ArrayLike, mu_2: ArrayLike
) -> Float[np.ndarray, " C"]:
    """Return the policy that minimises `dno_regression_loss` for one prompt, by Newton's method on the loss itself.

    With mu_1 and mu_2 of full support it is the soft policy iteration target, whatever mu_1 and mu_2 are: sampling only
    matters when the data are finite (Theorem 1).
    """
    reward = np.asarray(rewards, np.float64)
    first, second = np.asarray(mu_1, np.float64), np.asarray(mu_2, np.float64)
    joint = np.outer(first, second)
    joint = joint + joint.T
    scores = pairwise_logistic_scores(
        _sigmoid(reward[:, None] - reward), partners=joint / joint.sum(axis=1, keepdims=True)
    )
    return np.exp(log_normalise(np.log(np.asarray(reference, np.float64)) + scores / eta))


def bradley_terry_rewards(P: ArrayLike, *, sampling: ArrayLike) -> Float[np.ndarray, "*X C"]:
    """Return the Bradley-Terry rewards that fit the game best (Eq. 1 with endless data), centred under `sampling`.

    They minimise -E_{y, y' ~ sampling, verdict ~ P} log sigma(r(winner) - r(loser)).

    Raises:
        ValueError: bad input, or deterministic preferences that no finite rewards fit best.
    """
    wins = check_game(P)
    mu = check_policy(sampling, wins, name="sampling", full_support=True)
    return fit_prompts(wins, mu)


def fit_prompts(P: Float[np.ndarray, "*X C C"], mu: Float[np.ndarray, "*X C"]) -> Float[np.ndarray, "*X C"]:
    """Return `pairwise_logistic_scores` of P per prompt with both responses from mu, centred under mu."""
    scores = np.empty(mu.shape)
    for prompt in np.ndindex(mu.shape[:-1]):
        scores[prompt] = pairwise_logistic_scores(P[prompt], partners=np.broadcast_to(mu[prompt], P[prompt].shape))
    return scores - (mu * scores).sum(-1, keepdims=True)


def pairwise_logistic_scores(
    labels: Float[np.ndarray, "C C"], *, partners: Float[np.ndarray, "C C"]
) -> Float[np.ndarray, " C"]:
    """Return scores h that minimise the expected cross-entropy of sigma(h(y) - h(y')) against soft labels.

    One convex problem behind three updates: Eq. 8 (labels sigma(r - r'), h = eta log pi/pi_t), DPO with sampled labels
    (labels P, h = beta log pi/pi_ref) and the Bradley-Terry fit (labels P, h = reward).

    Args:
        labels: z(y, y') in [0, 1], z + z^T = 1.
        partners: row y is the distribution of y' among the pairs that contain y. Rows, not joint weights, so that
            responses of vanishing probability still get their score and nothing underflows.

    Raises:
        ValueError: some responses always beat the rest, so that the best scores are infinite.
    """
    if not _connected(labels > 0.0):
        raise ValueError(
            "some responses always win against the others, so no finite scores fit; keep those probabilities below 1"
        )
    size = len(labels)
    anchor = int(np.argmax(partners.sum(axis=0)))  # only differences count: its score stays 0, its equation is implied
    rest = np.arange(size) != anchor

    def residual(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chance = _sigmoid(scores[:, None] - scores)
        return chance, (partners * (labels - chance)).sum(axis=1)[rest]

    scores = np.zeros(size)
    chance, miss = residual(scores)
    for _ in range(200):
        if np.abs(miss).max() <= 1e-15:
            break
        slope = partners * chance * (1.0 - chance)
        np.fill_diagonal(slope, 0.0)
        jacobian = np.diag(slope.sum(axis=1)) - slope
        step = np.zeros(size)
        step[rest] = np.linalg.solve(jacobian[np.ix_(rest, rest)], miss)
        length = 1.0
        while length > 1e-10:
            new_chance, new_miss = residual(scores + length * step)
            if np.linalg.norm(new_miss) < np.linalg.norm(miss):
                break
            length *= 0.5
        else:
            break  # rounding stops all progress
        scores, chance, miss = scores + length * step, new_chance, new_miss
    if np.abs(miss).max() > 1e-10:
        raise RuntimeError(f"the pairwise fit left a residual of {np.abs(miss).max():.3g}")
    return scores


def _connected(beats: np.ndarray) -> bool:
    """Whether a path of possible wins leads from every response to every other one."""
    if beats.all():
        return True
    reach = beats | np.eye(len(beats), dtype=bool)
    for _ in range(int(np.ceil(np.log2(len(beats))))):
        reach = reach @ reach
    return bool(reach.all())


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * values)
