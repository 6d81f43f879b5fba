"""Which policies an iteration's trainings start from, are held to, and become: the outer schemes."""

from __future__ import annotations

from dataclasses import dataclass

from etils import epath

from dno_jax.config import RunConfig
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import is_lookahead


@dataclass(frozen=True)
class Update:
    """One training of an iteration.

    Attributes:
        score, train: names of its two stages.
        previous: where training starts, and pi_t of its loss.
        initial: pi_ref of its loss; None where the loss does not read it, or where it is `previous`.
        result: what training writes.
    """

    score: str
    train: str
    previous: epath.Path
    initial: epath.Path | None
    result: epath.Path


def updates(config: RunConfig, run_dir: RunDir, iteration: int) -> tuple[Update, ...]:
    """The trainings of iteration t, in order.

    The optimistic scheme has two: pi'_t -> pi'_{t+1}, and on the same pairs pi'_{t+1} -> pi_{t+1}, which guesses that
    the next rewards will be like these (ONPO). All others have one.
    """
    target, pi_ref = run_dir.policy(iteration + 1), initial_policy(config, run_dir, iteration)

    def update(previous: epath.Path, result: epath.Path, suffix: str = "") -> Update:
        initial = pi_ref if config.uses_initial and pi_ref != previous else None
        return Update("score" + suffix, "train" + suffix, previous, initial, result)

    if config.outer.scheme == "optimistic":
        moved = run_dir.auxiliary(iteration + 1)
        return update(run_dir.auxiliary(iteration), moved, "_auxiliary"), update(moved, target)
    return (update(run_dir.policy(0 if is_lookahead(config, iteration) else iteration), target),)


def update_of(config: RunConfig, run_dir: RunDir, iteration: int, *, stage: str) -> Update:
    """The training that a score or train stage belongs to."""
    return next(found for found in updates(config, run_dir, iteration) if stage in (found.score, found.train))


def initial_policy(config: RunConfig, run_dir: RunDir, iteration: int) -> epath.Path:
    """pi_ref of iteration t: policy 0, or under the proximal scheme the policy of its last move."""
    every = config.outer.every
    return run_dir.policy(iteration - iteration % every if every else 0)


def mixture_weight(config: RunConfig, iteration: int) -> float:
    """The initial policy's weight in the mixture sampled from: tau / eta_t unless the configuration names one."""
    given = config.sampling.mixture_weight
    return config.reference.tau / config.loss_at(iteration).beta if given is None else given
