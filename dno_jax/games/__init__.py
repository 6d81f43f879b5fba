"""Exact tabular preference games: equilibria, duality gaps, and every algorithm without sampling or networks.

A game is an array P with P[y, y'] = P(y > y'), shape [C, C] for one prompt or [X, C, C] for X prompts; a policy is an
array of probabilities, [C] or [X, C]. Everything is numpy in float64. `eta` is always the KL coefficient of the paper
(it divides the reward, like DPO's beta); SPPO, Nash-MD and ONPO write 1/eta for it.

    P = games.cyclic_game()
    games.nash(P)                                             # (4/11, 3/11, 4/11)
    games.solve(P, algorithm="comal", eta=0.5, tau=0.1, iterations=1000).gaps[-1]
"""

from dno_jax.games.algorithms import ALGORITHMS, Algorithm, nash_md_schedule
from dno_jax.games.equilibria import (
    check_game,
    check_policy,
    duality_gap,
    kl,
    nash,
    preference,
    regularised_nash,
    stable_eta,
    win_rates,
)
from dno_jax.games.examples import bradley_terry, contextual, cyclic_game, random_game, rock_paper_scissors
from dno_jax.games.regression import bradley_terry_rewards, dno_regression, dno_regression_loss, soft_policy_iteration
from dno_jax.games.solver import Solution, solve

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Solution",
    "bradley_terry",
    "bradley_terry_rewards",
    "check_game",
    "check_policy",
    "contextual",
    "cyclic_game",
    "dno_regression",
    "dno_regression_loss",
    "duality_gap",
    "kl",
    "nash",
    "nash_md_schedule",
    "preference",
    "random_game",
    "regularised_nash",
    "rock_paper_scissors",
    "soft_policy_iteration",
    "solve",
    "stable_eta",
    "win_rates",
]
