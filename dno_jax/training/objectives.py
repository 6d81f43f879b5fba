"""From a configuration to a loss of whole batches: the function that `losses.registry` names, and what is around it.

What every loss may be combined with, references, smoothed labels, length options, the likelihood term, is applied here
once, around whichever it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax.numpy as jnp
from jaxtyping import Array

from dno_jax import losses
from dno_jax.config import LossSection, ReferenceSection
from dno_jax.training.batches import PairBatch

# (log-probability [P, C], response tokens [P, C], batch) -> (loss [P], per-row metrics {name: [P]})
RowLoss = Callable[[Array, Array, PairBatch], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True)
class Terms:
    """What a loss may read of P pairs (column 0 chosen, column 1 rejected), inside one trace.

    Attributes:
        policy, previous, initial: [P, 2] log pi, log pi_t, log pi_0, nats, after the length options.
        reference: [P, 2] what log-ratios are taken against: previous, initial or their mixture.
        reward: [P, 2] points or win rates.
        target: [P] P(chosen preferred), smoothed.
        num_tokens: [P, 2] response tokens.
    """

    policy: Array
    previous: Array
    initial: Array
    reference: Array
    reward: Array
    target: Array
    num_tokens: Array
    loss: LossSection
    tau: float

    def named(self) -> dict[str, Array | float]:
        """Everything by the names of `losses.registry`."""
        columns = {"": self.policy, "reference_": self.reference, "previous_": self.previous, "initial_": self.initial}
        reward, num_tokens = self.reward, self.num_tokens
        numbers = {
            "target": self.target,
            "beta": self.loss.beta,
            "eta": self.loss.beta,
            "tau": self.tau,
            "clip_range": self.loss.clip_range,
            "max_reward": self.loss.max_reward,
        }
        if self.loss.kind.per == "pair":
            sides = {"chosen_": 0, "rejected_": 1}
            return numbers | {
                **{f"{of}{side}logprob": column[:, at] for of, column in columns.items() for side, at in sides.items()},
                **{f"{side}num_tokens": num_tokens[:, at] for side, at in sides.items()},
                "reward_difference": reward[:, 0] - reward[:, 1],
            }
        if self.loss.kind.per == "chosen":
            columns = {of: column[:, 0] for of, column in columns.items()}
            reward, num_tokens = reward[:, 0], num_tokens[:, 0]
        logprobs = {f"{of}logprob": column for of, column in columns.items()}
        return numbers | logprobs | {"num_tokens": num_tokens, "win_rate": reward}


def _value(function: Callable[..., Array], terms: Terms) -> Array:
    """Call a loss with those of the terms that its signature asks for; [P]."""
    named, asked = terms.named(), inspect.signature(function).parameters
    if unknown := asked.keys() - named.keys():
        raise TypeError(
            f"loss {terms.loss.name!r}: {terms.loss.kind.function} takes {', '.join(sorted(unknown))}; a loss per "
            f"{terms.loss.kind.per} may take {', '.join(named)}"
        )
    value = function(**{name: named[name] for name in asked})
    return jnp.mean(value, axis=1) if terms.loss.kind.per == "response" else value


_PREVIOUS = ReferenceSection()
# Of the policy's own samples: how many a pair has, and the sum of (log pi/pi_t)^2 (health.py makes an estimate of it).
OWN, OWN_SQUARES = "own_samples", "own_squared_shift"


@lru_cache  # one function per configuration: it is part of the compiled step's identity
def preference_loss(section: LossSection, reference: ReferenceSection = _PREVIOUS) -> RowLoss:
    """Return the loss of a configuration, with the metrics that show what it does to each side of a pair.

    Raises:
        ValueError: an unknown name.
    """
    function = section.kind.load()

    def loss(logprob: Array, num_tokens: Array, batch: PairBatch) -> tuple[Array, dict[str, Array]]:
        terms = _terms(logprob, num_tokens, batch, section=section, reference=reference)
        value = _value(function, terms)
        if section.nll_weight:
            value = losses.with_nll(
                value, chosen_logprob=logprob[:, 0], num_tokens=num_tokens[:, 0], weight=section.nll_weight
            )
        if section.forward_kl_weight:
            value = value + section.forward_kl_weight * _forward_kl(logprob, batch, reference)
        reward = losses.implicit_reward(logprob=terms.policy, reference_logprob=terms.reference, beta=section.beta)
        shift = logprob - batch.previous_logprob
        own = jnp.ones_like(shift) if batch.own is None else batch.own
        same = (logprob[:, 0] == logprob[:, 1]) & (batch.previous_logprob[:, 0] == batch.previous_logprob[:, 1])
        return value, {
            "accuracy": (reward[:, 0] > reward[:, 1]).astype(jnp.float32),
            "margin": reward[:, 0] - reward[:, 1],
            "chosen_reward": reward[:, 0],
            "rejected_reward": reward[:, 1],
            "chosen_logprob": logprob[:, 0],
            "rejected_logprob": logprob[:, 1],
            "chosen_shift": shift[:, 0] / jnp.maximum(num_tokens[:, 0], 1),
            "tied": (same | (batch.target == 0.5)).astype(jnp.float32),
            OWN: jnp.sum(own, axis=1),
            OWN_SQUARES: jnp.sum(own * shift**2, axis=1),
        }

    return loss


def _forward_kl(logprob: Array, batch: PairBatch, reference: ReferenceSection) -> Array:
    """Return the mean over a pair's samples of pi_ref (of pi_t, where that is the reference); 0 where it has none."""
    column = batch.previous_logprob if reference.kind == "previous" else batch.initial_logprob
    drawn = jnp.ones_like(logprob) if batch.anchor is None else batch.anchor
    value = losses.forward_kl_loss(logprob=logprob, reference_logprob=column)
    return jnp.sum(drawn * value, axis=1) / jnp.maximum(jnp.sum(drawn, axis=1), 1.0)


def _terms(
    logprob: Array, num_tokens: Array, batch: PairBatch, *, section: LossSection, reference: ReferenceSection
) -> Terms:
    columns = [logprob, batch.previous_logprob, batch.initial_logprob]
    if section.length_normalised:
        columns = [losses.length_normalised(logprob=column, num_tokens=num_tokens) for column in columns]
    policy, previous, initial = columns
    if section.length_penalty:
        previous, initial = (
            losses.length_penalised_reference(
                reference_logprob=column, num_tokens=num_tokens, alpha=section.length_penalty, beta=section.beta
            )
            for column in (previous, initial)
        )
    if reference.kind == "mixture":
        against = losses.reference_mixture(previous, initial, tau=reference.tau, eta=section.beta)
    else:
        against = initial if reference.kind == "initial" else previous
    target = batch.target
    if section.label_smoothing:
        smooth = losses.robust_target if section.smoothing == "robust" else losses.smoothed_target
        target = smooth(target=target, label_smoothing=section.label_smoothing)
    return Terms(
        policy=policy,
        previous=previous,
        initial=initial,
        reference=against,
        reward=batch.reward,
        target=target,
        num_tokens=num_tokens,
        loss=section,
        tau=reference.tau,
    )


def supervised_loss(logprob: Array, num_tokens: Array, batch: PairBatch) -> tuple[Array, dict[str, Array]]:
    """The mean negative log-likelihood per response token (rows weigh as many tokens as they have)."""
    del batch
    return losses.nll_loss(logprob=logprob[:, 0], num_tokens=num_tokens[:, 0]), {}


def reward_loss(reward: Array, num_tokens: Array, batch: PairBatch) -> tuple[Array, dict[str, Array]]:
    """The negative log-likelihood of the preferences under Bradley-Terry, -log sigma(r_w - r_l) where they are certain.

    Args:
        reward: [P, 2], in the place of log-probabilities.
    """
    del num_tokens
    margin = reward[:, 0] - reward[:, 1]
    told = jnp.sign(batch.target - 0.5)
    return losses.cross_entropy(margin=margin, target=batch.target), {
        "accuracy": jnp.where(told == 0.0, 0.5, (told * margin > 0.0).astype(jnp.float32)),
        "margin": told * margin,
        "chosen_reward": reward[:, 0],
        "rejected_reward": reward[:, 1],
        "tied": (told == 0.0).astype(jnp.float32),
    }
