"""Games to play: cycles, random ones, Bradley-Terry, and stacks of them over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from dno_jax.games.equilibria import check_game


def rock_paper_scissors(strength: float | int = 1.0) -> Float[np.ndarray, "3 3"]:
    """Return the cycle in which each response beats the next one with probability (1 + strength) / 2; Nash is uniform.

    Args:
        strength: 1 is the deterministic game, 0 no preference at all; in [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    cycle = np.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
    return 0.5 + 0.5 * strength * cycle


def cyclic_game() -> Float[np.ndarray, "3 3"]:
    """Return COMAL's toy game P(b > a) = P(c > b) = .9, P(a > c) = .8, whose one Nash policy is (4/11, 3/11, 4/11)."""
    return np.array([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]])


def random_game(num_responses: int, *, seed: int, scale: float | int = 1.0) -> Float[np.ndarray, "C C"]:
    """Return P = 1/2 + A with A skew-symmetric, its upper entries independent and uniform on scale * [-1/2, 1/2].

    Args:
        num_responses: C, at least 2.
        seed: of numpy's default generator.
        scale: strength of the preferences, in [0, 1].
    """
    if num_responses < 2:
        raise ValueError(f"a game needs at least two responses, got num_responses={num_responses}")
    if not 0.0 <= scale <= 1.0:
        raise ValueError(f"scale must be in [0, 1], got {scale}")
    upper = np.triu(np.random.default_rng(seed).uniform(-0.5, 0.5, (num_responses, num_responses)), k=1)
    return 0.5 + scale * (upper - upper.T)


def bradley_terry(rewards: ArrayLike) -> Float[np.ndarray, "*X C C"]:
    """Return P(y > y') = sigma(r(y) - r(y')) (Eq. 1): the transitive games, whose Nash policy is the best response.

    Args:
        rewards: [C] or [X, C], in log-odds.
    """
    values = np.asarray(rewards, np.float64)
    if values.ndim < 1 or values.shape[-1] < 2 or not np.all(np.isfinite(values)):
        raise ValueError(f"rewards are finite numbers, at least two, along the last axis; got shape {values.shape}")
    # tanh is odd to the last bit, so that P + P^T = 1 holds exactly.
    return 0.5 + 0.5 * np.tanh(0.5 * (values[..., :, None] - values[..., None, :]))


def contextual(games: Sequence[Float[np.ndarray, "C C"]]) -> Float[np.ndarray, "X C C"]:
    """Stack one game per prompt, all with the same number of responses, into a game over prompts.

    Raises:
        ValueError: no game at all, or games of different sizes.
    """
    shapes = {np.shape(game) for game in games}
    if len(shapes) != 1:
        raise ValueError(f"a contextual game stacks games of one size, got shapes {sorted(shapes)}")
    return check_game(np.stack(games))
