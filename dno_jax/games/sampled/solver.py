"""Playing an algorithm from samples, and judging exactly what it played."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from dno_jax import games
from dno_jax.games.equilibria import check_prompt_weights, gaps_of
from dno_jax.games.sampled.algorithms import ALGORITHMS, Step
from dno_jax.games.sampled.draws import Settings, State


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
        clip_range: of spo's and nash_md's ratio; idle at one step per iteration, where the ratio is 1.
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
    reference_policy = start if reference is None else np.asarray(reference, np.float64)
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
        jnp.asarray(np.log(reference_policy).reshape(-1, size), jnp.float32),
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
    reference: Float[Array, "X C"],
    key: Array,
    *,
    step: Step,
    iterations: int,
    settings: Settings,
) -> Float[Array, "X T C"]:
    """Return log pi_2 .. log pi_{T+1} of every prompt; all iterations are one program, prompts are independent."""

    def prompt(P: Array, start: Array, reference: Array, key: Array) -> Array:
        def update(state: State, iteration: Array) -> tuple[State, Array]:
            state = step(jax.random.fold_in(key, iteration), P, state, iteration, settings)
            return state, state.policy

        first = State(policy=start, reference=reference, before=start)
        return jax.lax.scan(update, first, jnp.arange(iterations))[1]

    return jax.vmap(prompt)(P, start, reference, jax.random.split(key, len(P)))
