"""The losses by the names that a configuration gives them: one function and one line each.

A loss here reads whole batches (`Terms`); the mathematics is in `dno_jax.losses`. What every loss may be combined with,
references, smoothed labels, length options, the likelihood term, is applied here once, around whichever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array

from dno_jax import losses
from dno_jax.config import LossName, LossSection, ReferenceSection
from dno_jax.training.batches import PairBatch

# (log-probability [P, C], response tokens [P, C], batch) -> (loss [P], per-row metrics {name: [P]})
RowLoss = Callable[[Array, Array, PairBatch], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True)
class Terms:
    """What a loss may read of P pairs (column 0 chosen, column 1 rejected), inside one trace.

    Attributes:
        policy, previous, initial: [P, 2] log pi, log pi_t, log pi_ref, nats, after the length options.
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

    @property
    def pair(self) -> dict[str, Array]:
        """The four log-probabilities that every pair loss takes."""
        return _sides(self.policy) | _sides(self.reference, "reference_")


def _sides(logprob: Array, prefix: str = "") -> dict[str, Array]:
    return {f"{prefix}chosen_logprob": logprob[:, 0], f"{prefix}rejected_logprob": logprob[:, 1]}


Objective = Callable[[Terms], Array]


def _dno(terms: Terms) -> Array:
    return losses.dno_loss(**terms.pair, target=terms.target, beta=terms.loss.beta)


def _spin(terms: Terms) -> Array:
    return losses.spin_loss(**terms.pair, beta=terms.loss.beta)


def _chi_po(terms: Terms) -> Array:
    beta, largest = terms.loss.beta, terms.loss.max_reward
    return losses.chi_po_loss(**terms.pair, target=terms.target, beta=beta, max_reward=largest)


def _ipo(terms: Terms) -> Array:
    return losses.ipo_loss(**terms.pair, target=terms.target, beta=terms.loss.beta)


def _inpo(terms: Terms) -> Array:
    logprobs = _sides(terms.policy) | _sides(terms.previous, "previous_") | _sides(terms.initial, "initial_")
    return losses.inpo_loss(**logprobs, target=terms.target, tau=terms.tau, eta=terms.loss.beta)


def _rebel(terms: Terms) -> Array:
    difference = terms.reward[:, 0] - terms.reward[:, 1]
    return losses.rebel_loss(**terms.pair, reward_difference=difference, beta=terms.loss.beta)


def _sppo_hard(terms: Terms) -> Array:
    return losses.sppo_hard_loss(**terms.pair, beta=terms.loss.beta)


# Losses a response: the mean over the two of a row.


def _sppo(terms: Terms) -> Array:
    beta = terms.loss.beta
    value = losses.sppo_loss(logprob=terms.policy, reference_logprob=terms.reference, win_rate=terms.reward, beta=beta)
    return jnp.mean(value, axis=1)


def _spo(terms: Terms) -> Array:
    value = losses.spo_loss(
        logprob=terms.policy,
        previous_logprob=terms.previous,
        win_rate=terms.reward,
        clip_range=terms.loss.clip_range,
    )
    return jnp.mean(value, axis=1)


def _nash_md_pg(terms: Terms) -> Array:
    value = losses.nash_md_pg_loss(
        logprob=terms.policy,
        previous_logprob=terms.previous,
        initial_logprob=terms.initial,
        win_rate=terms.reward,
        tau=terms.tau,
        clip_range=terms.loss.clip_range,
    )
    return jnp.mean(value, axis=1)


def _sft(terms: Terms) -> Array:
    return losses.nll_loss(logprob=terms.policy[:, 0], num_tokens=terms.num_tokens[:, 0])


OBJECTIVES: Mapping[LossName, Objective] = MappingProxyType(
    {
        "dno": _dno,
        "spin": _spin,
        "chi_po": _chi_po,
        "ipo": _ipo,
        "inpo": _inpo,
        "rebel": _rebel,
        "sppo_hard": _sppo_hard,
        "sppo": _sppo,
        "spo": _spo,
        "nash_md_pg": _nash_md_pg,
        "sft": _sft,
    }
)


_PREVIOUS = ReferenceSection()


@lru_cache  # one function a configuration: it is part of the compiled step's identity
def preference_loss(section: LossSection, reference: ReferenceSection = _PREVIOUS) -> RowLoss:
    """Return the loss of a configuration, with the metrics that show what it does to each side of a pair.

    Raises:
        ValueError: an unknown name.
    """
    if section.name not in OBJECTIVES:
        raise ValueError(f"unknown loss {section.name!r}; there are {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[section.name]

    def loss(logprob: Array, num_tokens: Array, batch: PairBatch) -> tuple[Array, dict[str, Array]]:
        terms = _terms(logprob, num_tokens, batch, section=section, reference=reference)
        value = objective(terms)
        if section.nll_weight:
            value = losses.with_nll(
                value, chosen_logprob=logprob[:, 0], num_tokens=num_tokens[:, 0], weight=section.nll_weight
            )
        reward = losses.implicit_reward(logprob=terms.policy, reference_logprob=terms.reference, beta=section.beta)
        return value, {
            "accuracy": (reward[:, 0] > reward[:, 1]).astype(jnp.float32),
            "margin": reward[:, 0] - reward[:, 1],
            "chosen_reward": reward[:, 0],
            "rejected_reward": reward[:, 1],
            "chosen_logprob": logprob[:, 0],
            "rejected_logprob": logprob[:, 1],
        }

    return loss


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
    """The mean negative log-likelihood a response token (rows weigh as many tokens as they have)."""
    del batch
    return losses.nll_loss(logprob=logprob[:, 0], num_tokens=num_tokens[:, 0]), {}
