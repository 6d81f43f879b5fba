"""Losses of Direct Nash Optimization (arXiv 2404.03715) and its neighbours, on plain arrays of any JAX code.

Every function takes summed log-probabilities (nats), in shapes that match, and returns unreduced values in float32.
Only jax is imported; all of it works under jit, vmap, shard_map, and Auto or Explicit meshes.

    from dno_jax.losses import dno_loss
    loss = dno_loss(
        chosen_logprob=c, rejected_logprob=r, reference_chosen_logprob=rc, reference_rejected_logprob=rr,
        target=1.0, beta=0.1,
    ).mean()

Parts that any of the losses takes: targets (smoothed_target, robust_target), references (reference_mixture,
length_penalised_reference), length_normalised log-probabilities, added terms (with_nll, forward_kl_loss). Throughout,
beta, tau and eta are KL coefficients, as in the paper: they divide the reward. SPPO and REBEL print their inverse.

They are imported when they are asked for: `losses.registry`, which says what each needs, takes no jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dno_jax.losses.policy_gradient import (
        nash_md_pg_loss,
        self_play_win_rates,
        spo_loss,
    )
    from dno_jax.losses.regression import (
        chi_po_loss,
        dno_loss,
        inpo_loss,
        ipo_loss,
        rebel_loss,
        spin_loss,
        sppo_hard_loss,
        sppo_loss,
    )
    from dno_jax.losses.terms import (
        chi_po_link,
        cross_entropy,
        forward_kl_loss,
        implicit_reward,
        length_normalised,
        length_penalised_reference,
        nll_loss,
        reference_mixture,
        reward_margin,
        robust_target,
        smoothed_target,
        with_nll,
    )

__all__ = [
    "chi_po_link",
    "chi_po_loss",
    "cross_entropy",
    "dno_loss",
    "forward_kl_loss",
    "implicit_reward",
    "inpo_loss",
    "ipo_loss",
    "length_normalised",
    "length_penalised_reference",
    "nash_md_pg_loss",
    "nll_loss",
    "rebel_loss",
    "reference_mixture",
    "reward_margin",
    "robust_target",
    "self_play_win_rates",
    "smoothed_target",
    "spin_loss",
    "spo_loss",
    "sppo_hard_loss",
    "sppo_loss",
    "with_nll",
]

_MODULES = ("regression", "policy_gradient", "terms")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
