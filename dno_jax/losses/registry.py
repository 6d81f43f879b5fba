"""Every loss by the name that a configuration gives it: the function that computes it, and what a run must give it.

A new loss is one function in this package and one entry here. Only data, so that a configuration is checked without
importing jax: `training/objectives.py` calls the functions. They take by name what is known of a row, as their
signatures ask for it:

    per "pair"      chosen_logprob, rejected_logprob, and the same with reference_, previous_ or initial_ before it,
                    chosen_num_tokens, rejected_num_tokens, reward_difference (points, or win rates)
    per "response"  logprob, reference_logprob, previous_logprob, initial_logprob, num_tokens, win_rate, of both
                    responses of a row; its loss is the mean of theirs
    per "chosen"    the same of the chosen response alone
    all             target, and the numbers beta, eta (the same one), tau, clip_range, max_reward
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Loss:
    """What a run must know of a loss without computing it.

    Attributes:
        function: where it is, "module:name".
        per: what one value of the function is of.
        soft_target: it regresses on a target in [0, 1], which may be soft or smoothed.
        own_win_rates: it reads each response's own win rate, against samples of the policy or of the mixture.
        on_policy: a policy gradient: responses must be samples of policy t.
        regularised: it pulls to the initial policy by itself, and needs the mixture's tau.
        has_reference: there is a reference that a length penalty can lower.
        pairing_rule: the only rule for pairs that makes it this loss; None takes any.
        reads: fields of the configuration that are its own.
    """

    function: str
    per: Literal["pair", "response", "chosen"] = "pair"
    soft_target: bool = False
    own_win_rates: bool = False
    on_policy: bool = False
    regularised: bool = False
    has_reference: bool = True
    pairing_rule: str | None = None
    reads: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


_REGRESSION = "dno_jax.losses.regression"
_GRADIENT = "dno_jax.losses.policy_gradient"

LOSSES: dict[str, Loss] = {
    "dno": Loss(f"{_REGRESSION}:dno_loss", soft_target=True),
    "spin": Loss(f"{_REGRESSION}:spin_loss", pairing_rule="spin"),
    "chi_po": Loss(f"{_REGRESSION}:chi_po_loss", soft_target=True, reads=("max_reward",)),
    "ipo": Loss(f"{_REGRESSION}:ipo_loss", soft_target=True),
    "inpo": Loss(f"{_REGRESSION}:inpo_loss", soft_target=True, regularised=True),
    "rebel": Loss(f"{_REGRESSION}:rebel_loss"),
    "sppo_hard": Loss(f"{_REGRESSION}:sppo_hard_loss"),
    "sppo": Loss(f"{_REGRESSION}:sppo_loss", per="response", own_win_rates=True),
    "spo": Loss(
        f"{_GRADIENT}:spo_loss",
        per="response",
        own_win_rates=True,
        on_policy=True,
        has_reference=False,
        reads=("clip_range",),
    ),
    "nash_md_pg": Loss(
        f"{_GRADIENT}:nash_md_pg_loss",
        per="response",
        own_win_rates=True,
        on_policy=True,
        regularised=True,
        has_reference=False,
        reads=("clip_range",),
    ),
    "sft": Loss("dno_jax.losses.terms:nll_loss", per="chosen", has_reference=False),
}


def find_loss(name: str) -> Loss:
    """Return the entry of a name.

    Raises:
        ValueError: an unknown one; it lists those that there are.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; there are {', '.join(LOSSES)}")
    return LOSSES[name]


def soft_losses() -> str:
    """The names of those that take a soft target, for messages."""
    return ", ".join(name for name, loss in LOSSES.items() if loss.soft_target)
