"""Every algorithm as one exact step from policy t to policy t+1, and the registry that names them.

A step works on log-probabilities, per prompt, with expectations instead of samples and minimisers instead of gradient
steps (but for `online_ipo` and `online_dpo`, which are gradient descent by definition). Adding an algorithm is one
function and one line of ALGORITHMS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from dno_jax.games.equilibria import log_normalise, rewards_against
from dno_jax.games.regression import fit_prompts, soft_policy_iteration


@dataclass(frozen=True)
class State:
    """What passes from step to step, [*X, C] each.

    Attributes:
        policy: log pi_t, the policy played.
        reference: log pi_ref; the proximal algorithms move it.
        before: r_{t-1} of the optimistic one, 0 at the start: log-probabilities but for this.
    """

    policy: Float[np.ndarray, "*X C"]
    reference: Float[np.ndarray, "*X C"]
    before: Float[np.ndarray, "*X C"]


@dataclass(frozen=True)
class Knobs:
    """The numbers of one step: t = 0, 1, ..., eta (KL coefficient, DPO's beta), tau, and what only some steps read.

    Attributes:
        meet: policy [*X, C] -> the frequencies of the opponents that a reward is the mean over; the policy itself in an
            exact game.
    """

    iteration: int
    eta: float
    tau: float
    refresh: int
    step_size: float
    meet: Callable[[np.ndarray], np.ndarray] = lambda policy: policy


Step = Callable[[np.ndarray, State, Knobs], State]


def nash_md_schedule(tau: float) -> Callable[[int], float]:
    """Return eta_t = tau (t + 2) / 2, t = 0, 1, ... (Munos et al., arXiv 2312.00886; the inverse of their eta_t)."""
    return lambda t: tau * (t + 2) / 2.0


def _constant(tau: float) -> Callable[[int], float]:
    return lambda t: 1.0


@dataclass(frozen=True)
class Algorithm:
    """An entry of the registry.

    Attributes:
        step: one exact update.
        takes_tau: regularised with strength tau; the others refuse a tau.
        mixes: plays or starts from pi_t^{1 - tau/eta} pi_ref^{tau/eta}, so that tau <= eta is needed.
        needs_tau: makes no sense at tau = 0.
        draws_verdicts: learns from verdicts of pairs, not from win rates: P has to hold probabilities.
        default_eta: tau -> schedule of eta; constant 1 unless said otherwise.
    """

    step: Step
    takes_tau: bool = False
    mixes: bool = False
    needs_tau: bool = False
    draws_verdicts: bool = False
    default_eta: Callable[[float], Callable[[int], float]] = _constant


def _rewards(P: np.ndarray, log_policy: np.ndarray, knobs: Knobs) -> np.ndarray:
    """Return r = E_{y' ~ policy} P(y > y'), or the mean over the opponents that are met."""
    return rewards_against(P, knobs.meet(np.exp(log_policy)))


def _mixture(state: State, knobs: Knobs) -> np.ndarray:
    """Return log pi_t^tau, pi_t^tau ∝ pi_t^{1 - tau/eta} pi_ref^{tau/eta} (Eq. 7 and Algorithm 3)."""
    share = knobs.tau / knobs.eta
    return log_normalise((1.0 - share) * state.policy + share * state.reference)


def _dno(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """DNO, Algorithm 1, whose Eq. 8 has the SPI target (Eq. 4) as minimiser: pi_{t+1} ∝ pi_t exp(P(y > pi_t) / eta).

    The exact SPO of Swamy et al. (arXiv 2401.04056) is the same step: multiplicative weights against oneself.
    """
    return replace(state, policy=soft_policy_iteration(state.policy, _rewards(P, state.policy, knobs), eta=knobs.eta))


def _option_1(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """Algorithm 3 Option I: pi_{t+1} ∝ pi_t^tau exp(P(y > pi_t) / eta).

    INPO's squared loss (arXiv 2407.00617) has the same minimiser (its proposition 6).
    """
    start = _mixture(state, knobs)
    return replace(state, policy=soft_policy_iteration(start, _rewards(P, state.policy, knobs), eta=knobs.eta))


def _option_2(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """Algorithm 3 Option II: pi_{t+1} ∝ pi_t^tau exp(P(y > pi_t^tau) / eta); with its schedule, Nash-MD (Eq. 7)."""
    start = _mixture(state, knobs)
    return replace(state, policy=soft_policy_iteration(start, _rewards(P, start, knobs), eta=knobs.eta))


def _sppo(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """SPPO (arXiv 2405.00675): minimise E_{y ~ pi_t} (log pi/pi_t - (P(y > pi_t) - 1/2) / eta)^2 over policies.

    SPPO sets log Z = 1 / (2 eta) where DNO keeps the true one, so over normalised policies the regression has no zero:
    with c = (P(y > pi_t) - 1/2) / eta its minimiser u = log pi/pi_t solves u + k e^u = c, with the one k at which pi
    sums to 1. Its fixed points with full support are Nash; for large eta it is the DNO step.
    """
    from scipy.special import wrightomega

    target = (_rewards(P, state.policy, knobs) - 0.5) / knobs.eta
    weight = np.exp(state.policy)

    def ratio(k: np.ndarray) -> np.ndarray:
        # w = k e^u is the Wright omega function of c + log k: w + log w = c + log k.
        with np.errstate(divide="ignore"):
            return target - wrightomega(target + np.log(k))

    # The mass sum pi_t e^u falls in k from E e^c >= 1 at k = 0 to at most 1 at k = max c: bisect.
    high = np.maximum(target.max(-1, keepdims=True), 0.0)
    low = np.zeros_like(high)
    for _ in range(100):
        middle = 0.5 * (low + high)
        heavy = (weight * np.exp(ratio(middle))).sum(-1, keepdims=True) > 1.0
        low, high = np.where(heavy, middle, low), np.where(heavy, high, middle)
    return replace(state, policy=log_normalise(state.policy + ratio(high)))


def _iterative_dpo(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """Iterated DPO with moving reference: Eq. 13 in the population, with every sampled pair kept, none filtered.

    pi_{t+1} minimises -E_{y, y' ~ pi_t} E_{verdict ~ P} log sigma(beta log pi/pi_t(winner) - beta log pi/pi_t(loser)),
    beta = eta. To first order in the preferences this is DNO with eta = beta / 4.
    """
    return replace(state, policy=log_normalise(state.policy + fit_prompts(P, np.exp(state.policy)) / knobs.eta))


def _iterative_dpo_fixed(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """Iterated DPO with fixed reference: pairs ~ pi_t, sampled labels, pi_ref in the log-ratios, beta = eta."""
    return replace(state, policy=log_normalise(state.reference + fit_prompts(P, np.exp(state.policy)) / knobs.eta))


def _log_ratio_gaps(state: State) -> np.ndarray:
    """Return h(y, y') = log pi/pi_ref(y) - log pi/pi_ref(y'), [*X, C, C]."""
    ratio = state.policy - state.reference
    return ratio[..., :, None] - ratio[..., None, :]


def _online_ipo(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """Online IPO (arXiv 2403.08635): one expected-gradient step of size `step_size` on the logits.

    Loss: E_{y, y' ~ sg[pi], verdict ~ P} (h(winner, loser) - 1 / (2 tau))^2. Its gradient by the logit of y is
    4 pi(y) E_{y' ~ pi} [h(y, y') - (P(y > y') - 1/2) / tau], zero exactly at the regularised Nash policy.
    """
    policy = np.exp(state.policy)
    miss = rewards_against(_log_ratio_gaps(state) - (P - 0.5) / knobs.tau, policy)
    return replace(state, policy=log_normalise(state.policy - knobs.step_size * 4.0 * policy * miss))


def _online_dpo(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """Online DPO with fixed reference: one expected-gradient step of size `step_size` on the logits, beta = eta.

    Loss: -E_{y, y' ~ sg[pi], verdict ~ P} log sigma(beta h(winner, loser)). Its gradient by the logit of y is
    -2 beta pi(y) E_{y' ~ pi} [P(y > y') - sigma(beta h(y, y'))], not zero at the regularised Nash policy
    (arXiv 2403.08635, theorem F.6).
    """
    policy = np.exp(state.policy)
    chance = 0.5 + 0.5 * np.tanh(0.5 * knobs.eta * _log_ratio_gaps(state))
    miss = rewards_against(P - chance, policy)
    return replace(state, policy=log_normalise(state.policy + knobs.step_size * 2.0 * knobs.eta * policy * miss))


def _onpo(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """ONPO, optimistic mirror descent, by one regression: pi_{t+1} ∝ pi_t exp((2 r_t - r_{t-1}) / eta), r_{-1} = 0.

    Published (arXiv 2502.16852) it keeps a second policy, pi'_{t+1} ∝ pi'_t exp(r_t / eta) and
    pi_{t+1} ∝ pi'_{t+1} exp(r_t / eta): the same iterates. Last iterates converge to the Nash policy of the game itself
    (proved for eta >= 8 where it is unique; docs/theory.md says what is known elsewhere).
    """
    rewards = _rewards(P, state.policy, knobs)
    guess = 2.0 * rewards - state.before
    return replace(state, before=rewards, policy=soft_policy_iteration(state.policy, guess, eta=knobs.eta))


def _mirror_prox(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """Nash mirror prox (arXiv 2505.19731): `egpo` with eta + tau for eta, and tau for the paper's beta.

    With s = eta / (eta + tau): pi_{k+1/2} ∝ pi_k^s pi_ref^{1-s} exp(r(pi_k) / (eta + tau)), and pi_{k+1} the same with
    r(pi_{k+1/2}). At eta = 1/2, KL(pi*_tau || pi_k) <= (1 + 2 tau)^-k KL(pi*_tau || pi_0).
    """
    return _egpo(P, state, replace(knobs, eta=knobs.eta + knobs.tau))


def _egpo(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """EGPO, extragradient (COLM 2025): a half step to pi_{t+1/2}, then the step from pi_t with P(y > pi_{t+1/2}).

    Both start from the mixture pi_t^tau; converges to the regularised Nash policy, at tau = 0 to the Nash policy.
    """
    start = _mixture(state, knobs)
    half = soft_policy_iteration(start, _rewards(P, state.policy, knobs), eta=knobs.eta)
    return replace(state, policy=soft_policy_iteration(start, _rewards(P, half, knobs), eta=knobs.eta))


def _refreshed(state: State, knobs: Knobs) -> State:
    """Move the reference to the current policy after every `refresh` steps."""
    return replace(state, reference=state.policy) if knobs.iteration and not knobs.iteration % knobs.refresh else state


def _comal(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """COMAL, a proximal method: Option I towards a reference that moves to the policy after every `refresh` steps.

    With the inner game solved, KL(pi* || pi) does not rise for any tau, and the last iterate reaches the Nash policy of
    the game itself.
    """
    return _option_1(P, _refreshed(state, knobs), knobs)


def _mpo(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """MPO, magnetic mirror descent (ICLR 2025), its magnet refreshed every `refresh` steps.

    pi_{t+1} ∝ [pi_t magnet^{tau/eta} exp(P(y > pi_t) / eta)]^{1 / (1 + tau/eta)}: Option I with eta + tau for eta.
    """
    return _option_1(P, _refreshed(state, knobs), replace(knobs, eta=knobs.eta + knobs.tau))


def _reward_maximisation(P: np.ndarray, state: State, knobs: Knobs) -> State:
    """RLHF: fit Bradley-Terry rewards to pairs from pi_ref (Eq. 1), then follow them: pi_{t+1} ∝ pi_t exp(r / eta).

    From pi_1 = pi_ref, policy t solves Eq. 2 with beta = eta / t, so the iterates run through every KL strength.
    """
    return replace(state, policy=log_normalise(state.policy + fit_prompts(P, np.exp(state.reference)) / knobs.eta))


ALGORITHMS: dict[str, Algorithm] = {
    "dno": Algorithm(_dno),
    "spo": Algorithm(_dno),
    "dno_option_1": Algorithm(_option_1, takes_tau=True, mixes=True),
    "dno_option_2": Algorithm(_option_2, takes_tau=True, mixes=True),
    "nash_md": Algorithm(_option_2, takes_tau=True, mixes=True, needs_tau=True, default_eta=nash_md_schedule),
    "inpo": Algorithm(_option_1, takes_tau=True, mixes=True, needs_tau=True, default_eta=nash_md_schedule),
    "sppo": Algorithm(_sppo),
    "online_ipo": Algorithm(_online_ipo, takes_tau=True, needs_tau=True, draws_verdicts=True),
    "online_dpo": Algorithm(_online_dpo, draws_verdicts=True),
    "iterative_dpo": Algorithm(_iterative_dpo, draws_verdicts=True),
    "iterative_dpo_fixed": Algorithm(_iterative_dpo_fixed, draws_verdicts=True),
    "onpo": Algorithm(_onpo),
    "egpo": Algorithm(_egpo, takes_tau=True, mixes=True),
    "nash_mirror_prox": Algorithm(_mirror_prox, takes_tau=True, default_eta=lambda tau: lambda t: 0.5),
    "comal": Algorithm(_comal, takes_tau=True, mixes=True, needs_tau=True),
    "mpo": Algorithm(_mpo, takes_tau=True, needs_tau=True),
    "reward_maximisation": Algorithm(_reward_maximisation, draws_verdicts=True),
}
