"""Old policies: which of them nothing needs any more, and what is returned where the best was one of them."""

from __future__ import annotations

import numpy as np
from etils import epath

from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.run_dir import RunDir
from dno_jax.runtime.scheme import initial_policy, update_of
from dno_jax.training.checkpoint import is_pruned, policy_fingerprint, prune_policy


def prune(config: RunConfig, run_dir: RunDir, iteration: int) -> None:
    """Remove the weights of the policies that neither a later stage nor `training.keep_policies` asks for.

    Where a later iteration is done, that one decides.
    """
    if run_dir.stage("evaluate", iteration + 1).manifest_path.exists():
        return
    needed = needed_after(config, run_dir, iteration) | {run_dir.base_path}  # beside which adapters stand
    folder = run_dir.path / "policies"
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and path not in needed):
        if policy_fingerprint(path) and not is_pruned(path) and int(path.name[:3]) <= iteration:
            prune_policy(path)
            say(f"{path}: its weights are removed (training.keep_policies={config.training.keep_policies})")


def needed_after(config: RunConfig, run_dir: RunDir, iteration: int) -> set[epath.Path]:
    """The policies that are kept when an iteration is done.

    Policy 0, the newest ones, the best so far, and whatever a later iteration samples from, is held to or starts from.
    Held-out responses of all others are on disk: later evaluations ask no policy again.
    """
    newest, keep = iteration + 1, config.training.keep_policies
    count = newest + 1 if keep == "all" or config.outer.scheme == "average" else int(keep)
    recent = range(max(newest + 1 - count, 0), newest + 1)
    needed = {run_dir.policy(policy) for policy in (0, *recent)}
    best = run_dir.stage("evaluate", iteration).require().details["best"]
    needed.add(run_dir.policy(int(best)))
    for later in range(newest, max(config.iterations, newest + 1)):  # there may be more one day
        needed.add(initial_policy(config, run_dir, later))
        needed.add(update_of(config, run_dir, later).previous)
    return needed


def best_kept(run_dir: RunDir, iteration: int) -> int:
    """The best policy by an evaluation, of those whose weights are there."""
    details = run_dir.stage("evaluate", iteration).require().details
    best = int(details["best"])
    if not is_pruned(run_dir.policy(best)):
        return best
    wins = np.asarray(details["matrix"])
    rates = (wins.sum(axis=1) - np.diagonal(wins)) / (len(wins) - 1)
    kept = [policy for policy in range(len(wins)) if not is_pruned(run_dir.policy(policy))]
    chosen = max(kept, key=lambda policy: (rates[policy], policy))
    say(
        f"warning: policy {best} is best on held-out prompts by the last evaluation ({rates[best]:.3f}), and was "
        "pruned when it was not (training.keep_policies); of those that are kept policy "
        f"{chosen} is ({rates[chosen]:.3f})"
    )
    return chosen
