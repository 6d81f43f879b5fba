"""The algorithms of `dno_jax.games` from samples: finite pairs, drawn verdicts, and the losses that train models.

Where `games.solve` takes expectations and minimisers, an iteration here draws `num_pairs` pairs of responses and their
verdicts, and trains the logits of a softmax policy with optax on a function of `dno_jax.losses`. What comes out is
judged exactly: the gaps in the returned `games.Solution` are those of the policies that sampling produced.

    P = games.cyclic_game()
    solution = sampled_games.solve_sampled(P, algorithm="comal", eta=0.5, tau=0.1, iterations=500, seed=0)
    solution.gaps[-1]

Accuracy: N pairs leave an error of about 1 / (eta sqrt(N)) in each step's log-ratios, however exact the arithmetic
(float32 here), and an algorithm that contracts by tau/eta per step keeps that times sqrt(eta / (2 tau)). With 4,096
pairs gaps below about .03 are noise. A response too rare to be drawn keeps its log-ratio to the reference: where a
policy has all but lost a response that it needs, samples do not bring it back.
"""

from dno_jax.games.sampled.algorithms import ALGORITHMS, Algorithm
from dno_jax.games.sampled.draws import Settings, State
from dno_jax.games.sampled.solver import solve_sampled

__all__ = ["ALGORITHMS", "Algorithm", "Settings", "State", "solve_sampled"]
