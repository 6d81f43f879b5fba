"""The optimiser state that an iteration leaves to the next one, beside the policy it was trained with."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.parallel.cluster import barrier, is_primary
from dno_jax.training.checkpoint import fingerprint, policy_remedy, undamaged

_MOMENTS, _DIGEST = "moments", "MOMENTS"


def save_moments(policy: epath.Path, opt_state: Any) -> None:
    """Write an optimiser state beside a policy that is to be written next; every process calls this."""
    digest = fingerprint(opt_state)
    with closing(ocp.StandardCheckpointer()) as checkpointer:
        checkpointer.save(policy / _MOMENTS, opt_state, force=True)
        checkpointer.wait_until_finished()
    if is_primary():
        write_atomically(policy / _DIGEST, digest + "\n")
    barrier(f"moments {policy}")


def load_moments(policy: epath.Path, like: Any, shardings: Any) -> Any:
    """Read the optimiser state that lies beside a policy; `like` itself where the policy was trained by no iteration.

    Args:
        like: the state that the optimiser starts with.

    Raises:
        DnoError: a policy that was trained has none, or it is not the one that was written.
    """
    if not (policy / _DIGEST).exists():
        if policy.name == "000":
            return like
        raise DnoError(
            f"{policy}: no optimiser state lies beside it, from which optimizer.carry starts; {policy_remedy(policy)}"
        )
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like, shardings
    )

    def read() -> Any:
        with closing(ocp.StandardCheckpointer()) as checkpointer:
            return checkpointer.restore(policy / _MOMENTS, target)

    found = undamaged(policy, read)
    if fingerprint(found) != (policy / _DIGEST).read_text().strip():
        raise DnoError(f"{policy / _MOMENTS}: not the optimiser state that was written; {policy_remedy(policy)}")
    return found
