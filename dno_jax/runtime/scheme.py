"""Which policies an iteration's training starts from, is held to, and becomes: the outer schemes."""

from __future__ import annotations

from dataclasses import dataclass

from etils import epath

from dno_jax.config import RunConfig
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import is_lookahead


@dataclass(frozen=True)
class Update:
    """The training of an iteration.

    Attributes:
        previous: where training starts, and pi_t of its loss.
        initial: pi_ref of its loss; None where the loss does not read it, or where it is `previous`.
        result: what training writes.
    """

    previous: epath.Path
    initial: epath.Path | None
    result: epath.Path


def update_of(config: RunConfig, run_dir: RunDir, iteration: int) -> Update:
    """The training of iteration t.

    The second half of an extragradient step starts, as its first half did, from pi_k, whose samples it is trained on:
    only their opponents are pi_{k+1/2}'s.
    """
    start = 0 if is_lookahead(config, iteration) else iteration - config.is_second_half(iteration)
    previous, pi_ref = run_dir.policy(start), initial_policy(config, run_dir, iteration)
    initial = pi_ref if config.uses_initial and pi_ref != previous else None
    return Update(previous, initial, run_dir.policy(iteration + 1))


def initial_policy(config: RunConfig, run_dir: RunDir, iteration: int) -> epath.Path:
    """pi_ref of iteration t: policy 0, or under the proximal scheme the policy of its last move."""
    every = config.outer.every
    return run_dir.policy(iteration - iteration % every if every else 0)


def mixture_weight(config: RunConfig, iteration: int) -> float:
    """The initial policy's weight in the mixture sampled from: tau / eta_t unless the configuration names one."""
    given = config.sampling.mixture_weight
    return config.reference.tau / config.loss_at(iteration).beta if given is None else given
