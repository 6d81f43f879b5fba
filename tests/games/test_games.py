"""Exact games against closed forms, the numbers of docs/theory.md, and second ways to compute the same thing."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import minimize

from dno_jax import games

CYCLE = games.cyclic_game()
NASH = np.array([4.0, 3.0, 4.0]) / 11.0
REFERENCE = np.array([0.5, 0.3, 0.2])
REGULARISED = np.array([0.33662, 0.34963, 0.31375])  # tau = .1
RANDOM = [games.random_game(size, seed=size) for size in (3, 10, 50)]
UNREGULARISED = [name for name, entry in games.ALGORITHMS.items() if not entry.needs_tau]


def random_policy(size, seed, floor=0.0):
    policy = np.random.default_rng(seed).dirichlet(np.ones(size)) + floor
    return policy / policy.sum()


def tv(one, other):
    return 0.5 * np.abs(one - other).sum()


def jeffreys(one, other):
    return float(games.kl(one, other) + games.kl(other, one))


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


# --- games, equilibria, gaps


def test_the_nash_policies_of_known_games():
    np.testing.assert_allclose(games.nash(CYCLE), NASH, atol=1e-12)
    np.testing.assert_allclose(games.nash(games.rock_paper_scissors()), [1 / 3] * 3, atol=1e-12)
    np.testing.assert_allclose(games.nash(games.bradley_terry([0.3, 1.2, -2.0, 1.1])), [0, 1, 0, 0], atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 10, 50, 120])
def test_linear_programming_leaves_no_gap_in_random_games(size):
    P = games.random_game(size, seed=size)
    policy = games.nash(P)
    assert policy.sum() == pytest.approx(1.0, abs=1e-12)
    assert games.duality_gap(P, policy) <= 1e-9


def test_the_duality_gap_is_what_its_definition_says():
    P = RANDOM[1]
    policy = random_policy(10, 0)
    pure = np.eye(10)
    best = max(games.preference(P, other, opponent=policy) for other in pure)
    worst = min(games.preference(P, policy, opponent=other) for other in pure)
    assert games.duality_gap(P, policy) == pytest.approx(best - worst, abs=1e-14)
    # Pure a in the cyclic game loses .9 to b: the gap is .9 - .1.
    assert games.duality_gap(CYCLE, [1.0, 0.0, 0.0]) == pytest.approx(0.8, abs=1e-14)
    assert games.preference(P, policy, opponent=policy) == pytest.approx(0.5, abs=1e-14)


def test_the_regularised_nash_policy_is_not_the_nash_policy():
    policy = games.regularised_nash(CYCLE, reference=REFERENCE, tau=0.1)
    np.testing.assert_allclose(policy, REGULARISED, atol=5e-6)
    assert games.duality_gap(CYCLE, policy) == pytest.approx(0.078, abs=5e-4)


@pytest.mark.parametrize("tau", [0.003, 0.03, 0.3, 3.0])
def test_the_regularised_nash_policy_solves_its_equation(tau):
    for P in RANDOM:
        reference = random_policy(len(P), 1, floor=0.01)
        policy = games.regularised_nash(P, reference=reference, tau=tau)
        np.testing.assert_allclose(
            policy, softmax(np.log(reference) + games.win_rates(P, policy) / tau), rtol=0, atol=1e-10
        )


def test_a_contextual_game_is_its_prompts_side_by_side():
    P = games.contextual([CYCLE, games.rock_paper_scissors(0.5), games.bradley_terry([0.0, 1.0, 2.0])])
    start = np.stack([random_policy(3, seed, floor=0.1) for seed in range(3)])
    weights = np.array([0.5, 0.2, 0.3])
    for name, entry in games.ALGORITHMS.items():
        options = {"algorithm": name, "iterations": 20, "tau": 0.1 if entry.needs_tau else 0.0, "refresh": 7}
        together = games.solve(P, initial=start, prompt_weights=weights, **options)
        alone = [games.solve(P[x], initial=start[x], **options) for x in range(3)]
        np.testing.assert_allclose(together.policies, np.stack([one.policies for one in alone], axis=1), atol=1e-12)
        np.testing.assert_allclose(together.gaps, weights @ np.stack([one.gaps for one in alone]), atol=1e-12)
    np.testing.assert_allclose(games.nash(P)[0], NASH, atol=1e-12)
    regularised = games.regularised_nash(P, reference=start, tau=0.1)
    np.testing.assert_allclose(regularised[1], games.regularised_nash(P[1], reference=start[1], tau=0.1), atol=1e-12)
    assert games.duality_gap(P, start) == pytest.approx(np.mean([games.duality_gap(P[x], start[x]) for x in range(3)]))
    half = games.preference(P, start, opponent=start, prompt_weights=weights)
    assert half == pytest.approx(0.5, abs=1e-14)


# --- Eq. 8 and its step


def test_the_step_by_hand():
    policy = games.solve(CYCLE, algorithm="dno", eta=0.3, initial=[0.2, 0.5, 0.3], iterations=1).last
    np.testing.assert_allclose(policy, [0.131432, 0.414933, 0.453634], atol=5e-7)


@pytest.mark.parametrize("size", [3, 10, 50])
@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_the_minimiser_of_equation_8_is_the_soft_policy_iteration_target_for_any_sampling(size, eta):
    P = games.random_game(size, seed=size)
    policy = random_policy(size, 1, floor=1e-3)
    target = games.solve(P, eta=eta, initial=policy, iterations=1).last
    for mu_1, mu_2 in [(policy, policy), (random_policy(size, 2, 1e-3), random_policy(size, 3, 1e-3))]:
        found = games.dno_regression(games.win_rates(P, policy), reference=policy, eta=eta, mu_1=mu_1, mu_2=mu_2)
        assert tv(found, target) <= 1e-8


def test_equation_8_minimised_by_a_library_that_only_sees_the_loss():
    policy, eta = np.array([0.2, 0.5, 0.3]), 0.3
    data = {
        "rewards": games.win_rates(CYCLE, policy),
        "reference": policy,
        "eta": eta,
        "mu_1": policy,
        "mu_2": REFERENCE,
    }

    def loss(logits):
        return games.dno_regression_loss(softmax(np.append(logits, 0.0)), **data)

    # The loss is flat to rounding within 1e-8 of its minimum, so a blind search finds the place only to some 1e-6.
    found = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-12, "fatol": 1e-17, "maxiter": 2000})
    blind = softmax(np.append(found.x, 0.0))
    exact = games.dno_regression(**data)
    assert tv(blind, exact) <= 1e-6
    assert games.dno_regression_loss(exact, **data) <= found.fun + 1e-15


def test_the_gradient_of_equation_8_at_the_old_policy():
    """-eta E[(sigma(Delta*) - 1/2) grad(log pi(y1) - log pi(y2))], by central differences on the logits."""
    P, eta = RANDOM[1], 0.7
    policy, mu_1, mu_2 = (random_policy(10, seed, floor=0.01) for seed in range(3))
    rewards = games.win_rates(P, policy)

    def loss(logits):
        return games.dno_regression_loss(
            softmax(logits), rewards=rewards, reference=policy, eta=eta, mu_1=mu_1, mu_2=mu_2
        )

    surprise = 1.0 / (1.0 + np.exp(rewards - rewards[:, None])) - 0.5
    weighted = np.outer(mu_1, mu_2) * surprise
    expected = -eta * (weighted.sum(axis=1) - weighted.sum(axis=0))
    nudge = 1e-5 * np.eye(10)
    measured = [(loss(np.log(policy) + d) - loss(np.log(policy) - d)) / 2e-5 for d in nudge]
    np.testing.assert_allclose(measured, expected, atol=1e-9)


@pytest.mark.parametrize("P", RANDOM, ids=len)
def test_each_step_improves_on_its_predecessor_by_eta_times_jeffreys(P):
    for eta in (0.05, 0.5, 5.0):
        before = random_policy(len(P), 5, floor=1e-3)
        after = games.solve(P, eta=eta, initial=before, iterations=1).last
        gain = games.preference(P, after, opponent=before) - 0.5
        assert gain == pytest.approx(eta * jeffreys(after, before), abs=1e-12)
        assert gain >= eta * games.kl(after, before)
        # A step that misses by TV loses at most that much, as rewards lie in [0, 1].
        missed = 0.9 * after + 0.1 * random_policy(len(P), 6)
        assert games.preference(P, missed, opponent=before) - 0.5 >= gain - tv(missed, after)


def test_improvement_is_not_transitive():
    solution = games.solve(CYCLE, algorithm="dno", eta=1, initial=REFERENCE, iterations=200)
    policies = solution.policies
    over_predecessor = [games.preference(CYCLE, b, opponent=a) for a, b in pairwise(policies)]
    over_first = [games.preference(CYCLE, policy, opponent=policies[0]) for policy in policies]
    assert min(over_predecessor) >= 0.5037
    assert min(over_first) == pytest.approx(0.442, abs=5e-4)
    assert np.argmin(over_first) == 172
    assert solution.gaps[-1] == pytest.approx(0.65, abs=5e-3)
    assert solution.gaps.max() == pytest.approx(0.76, abs=5e-3)


# --- average and last iterates


@pytest.mark.parametrize("size", [3, 10, 50])
@pytest.mark.parametrize("iterations", [10, 100, 1000])
def test_the_average_iterate_keeps_hedges_bound(size, iterations):
    P = games.random_game(size, seed=100 + size)
    solution = games.solve(P, eta=np.sqrt(iterations / (8.0 * np.log(size))), iterations=iterations)
    assert games.win_rates(P, solution.average).max() - 0.5 <= np.sqrt(np.log(size) / (2.0 * iterations))
    assert solution.average_gaps[-1] == pytest.approx(games.duality_gap(P, solution.average), abs=1e-12)


def test_hedge_on_the_cyclic_game_far_below_its_bound():
    for iterations, measured in [(10, 0.030), (100, 0.0013), (1000, 0.0012)]:
        eta = np.sqrt(iterations / (8.0 * np.log(3)))
        solution = games.solve(CYCLE, eta=eta, iterations=iterations)
        assert solution.average_gaps[-1] / 2.0 == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("eta", "last", "average"), [(5, 0.58, 0.0049), (0.2, 0.80, 0.0093)])
def test_dnos_last_iterate_cycles_while_its_average_converges(eta, last, average):
    solution = games.solve(CYCLE, algorithm="dno", eta=eta, initial=REFERENCE, iterations=2000)
    assert solution.gaps[-2] == pytest.approx(last, abs=5e-3)  # pi_T, the last one of the mixture
    assert min(solution.gaps[-2:]) > 0.5
    assert solution.average_gaps[-1] == pytest.approx(average, abs=5e-5)


@pytest.mark.parametrize("initial", [None, REFERENCE], ids=["uniform", "off"])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("onpo", {"eta": 1}),
        ("egpo", {"eta": 1}),
        ("comal", {"eta": 0.5, "tau": 0.1, "refresh": 50}),
        ("mpo", {"eta": 0.5, "tau": 0.1, "refresh": 50}),
    ],
)
def test_optimistic_and_proximal_variants_reach_nash_in_the_last_iterate(algorithm, options, initial):
    solution = games.solve(CYCLE, algorithm=algorithm, initial=initial, iterations=1000, **options)
    assert solution.gaps[-1] < (1e-9 if algorithm in ("onpo", "egpo") else 2e-8)
    np.testing.assert_allclose(solution.last, NASH, atol=1e-6)


def test_the_figures_of_onpo_and_comal_on_the_cyclic_game():
    assert games.solve(CYCLE, algorithm="onpo", eta=1, initial=REFERENCE, iterations=1000).gaps[-1] < 2e-11
    comal = games.solve(CYCLE, algorithm="comal", eta=0.5, tau=0.1, initial=REFERENCE, iterations=1000)
    assert comal.gaps[200] == pytest.approx(0.0062, abs=5e-5)
    assert comal.gaps[1000] == pytest.approx(7.8e-9, rel=0.02)


def test_the_proximal_steps_by_their_formulas():
    P, start, reference = RANDOM[1], random_policy(10, 8, floor=0.01), random_policy(10, 9, floor=0.01)
    options = {"eta": 0.5, "tau": 0.2, "initial": start, "reference": reference, "refresh": 2, "iterations": 4}
    comal, mpo = (games.solve(P, algorithm=name, **options).policies for name in ("comal", "mpo"))
    for t in range(4):
        # The given reference serves the first two steps, then the policy of that moment the next two.
        for policies, total in ((comal, 0.5), (mpo, 0.5 + 0.2)):
            center = reference if t < 2 else policies[2]
            logits = (total - 0.2) * np.log(policies[t]) + 0.2 * np.log(center) + games.win_rates(P, policies[t])
            np.testing.assert_allclose(policies[t + 1], softmax(logits / total), atol=1e-13)


@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0])
def test_solved_proximal_steps_never_move_away_from_nash(tau):
    for P in RANDOM:
        nash = games.nash(P)
        center = np.full(len(P), 1.0 / len(P))
        distance = games.kl(nash, center)
        for _ in range(10):
            center = games.regularised_nash(P, reference=center, tau=tau)
            assert games.kl(nash, center) <= distance + 1e-10
            distance = games.kl(nash, center)


# --- Algorithm 3 and its relatives


def test_option_1_reaches_the_regularised_nash_policy_in_its_last_iterate():
    solution = games.solve(CYCLE, algorithm="dno_option_1", eta=1, tau=0.1, reference=REFERENCE, iterations=1000)
    exact = games.regularised_nash(CYCLE, reference=REFERENCE, tau=0.1)
    assert games.kl(exact, solution.last) < 1e-10
    np.testing.assert_allclose(solution.last, exact, atol=1e-12)


@pytest.mark.parametrize(
    ("eta", "point", "distance"),
    [(1, [0.32084, 0.35977, 0.31939], 5.8e-4), (0.5, [0.30299, 0.37303, 0.32398], 2.7e-3)],
)
def test_option_2_with_constant_eta_stops_beside_it(eta, point, distance):
    last = games.solve(CYCLE, algorithm="dno_option_2", eta=eta, tau=0.1, reference=REFERENCE, iterations=2000).last
    np.testing.assert_allclose(last, point, atol=6e-6)
    exact = games.regularised_nash(CYCLE, reference=REFERENCE, tau=0.1)
    assert games.kl(exact, last) == pytest.approx(distance, rel=0.02)
    # Its fixed-point equation plays against the mixture: pi ∝ pi_ref exp(P(y > pi^tau) / tau).
    mixture = softmax((1 - 0.1 / eta) * np.log(last) + 0.1 / eta * np.log(REFERENCE))
    np.testing.assert_allclose(
        last, softmax(np.log(REFERENCE) + games.win_rates(CYCLE, mixture) / 0.1), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("algorithm", ["nash_md", "inpo"])
def test_nash_mds_schedule_converges(algorithm):
    solution = games.solve(CYCLE, algorithm=algorithm, tau=0.1, reference=REFERENCE, iterations=5000)
    exact = games.regularised_nash(CYCLE, reference=REFERENCE, tau=0.1)
    assert games.kl(exact, solution.last) <= 2e-8
    for steps in (10, 100, 1000, 5000):  # Munos et al., theorem 1
        assert games.kl(exact, solution.policies[steps]) <= 8.0 / (0.1**2 * (steps + 1))


@pytest.mark.parametrize(("algorithm", "option"), [("nash_md", "dno_option_2"), ("inpo", "dno_option_1")])
def test_nash_mds_schedule_starts_at_the_reference_and_slows_down(algorithm, option):
    schedule = games.nash_md_schedule(0.4)
    assert [schedule(t) for t in range(4)] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    options = {"tau": 0.4, "initial": random_policy(10, 8, 0.01), "reference": random_policy(10, 9, 0.01)}
    named = games.solve(RANDOM[1], algorithm=algorithm, iterations=9, **options)
    spelled_out = games.solve(RANDOM[1], algorithm=option, eta=lambda t: 0.2 * (t + 2), iterations=9, **options)
    np.testing.assert_allclose(named.policies, spelled_out.policies, atol=1e-13)


@pytest.mark.parametrize("tau", [0.1, 0.02])
def test_option_1_is_stable_above_a_threshold_and_not_below(tau):
    exact = games.regularised_nash(CYCLE, reference=REFERENCE, tau=tau)
    threshold = games.stable_eta(CYCLE, reference=REFERENCE, tau=tau)

    def growth(eta, start, iterations):
        """KL to the regularised Nash policy after, as a multiple of that before."""
        options = {"eta": eta, "tau": tau, "initial": start, "reference": REFERENCE, "iterations": iterations}
        last = games.solve(CYCLE, algorithm="dno_option_1", **options).last
        return games.kl(exact, last) / games.kl(exact, start)

    # Near the point one hundredth of eta decides: the modulus squared is 1 -+ .02 tau/eta, over 4000 steps.
    near = softmax(np.log(exact) + np.array([1e-3, -1e-3, 0.0]))
    assert growth(1.01 * threshold, near, 4000) < 0.3
    assert growth(0.99 * threshold, near, 4000) > 3.0
    # And from far away, with a tenth.
    assert growth(1.1 * threshold, REFERENCE, 10000) < 1e-10
    assert growth(0.9 * threshold, REFERENCE, 3000) > 0.1


def test_the_threshold_takes_its_eigenvalue_at_the_regularised_nash_policy():
    """At the Nash policy of the game itself lambda is .209 and the formula gives .268 and 1.10: close, a little low."""
    spread = np.abs(np.linalg.eigvals((np.diag(NASH) - np.outer(NASH, NASH)) @ (CYCLE - 0.5))).max()
    assert spread == pytest.approx(0.209, abs=5e-4)
    for tau, rough, exact in [(0.1, 0.268, 0.2734), (0.02, 1.10, 1.1153)]:
        assert (tau**2 + spread**2) / (2 * tau) == pytest.approx(rough, abs=1e-3)
        assert games.stable_eta(CYCLE, reference=REFERENCE, tau=tau) == pytest.approx(exact, abs=5e-5)
    last = games.solve(CYCLE, algorithm="dno_option_1", eta=0.27, tau=0.1, reference=REFERENCE, iterations=5000).last
    assert games.kl(games.regularised_nash(CYCLE, reference=REFERENCE, tau=0.1), last) > 1e-3


@pytest.mark.parametrize("option", ["dno_option_1", "dno_option_2"])
def test_without_tau_algorithm_3_is_algorithm_1(option):
    for P in RANDOM:
        reference = random_policy(len(P), 7, floor=0.01)
        plain = games.solve(P, algorithm="dno", eta=0.7, iterations=30)
        regularised = games.solve(P, algorithm=option, eta=0.7, tau=0, reference=reference, iterations=30)
        np.testing.assert_allclose(plain.policies, regularised.policies, rtol=0, atol=1e-13)


@pytest.mark.parametrize("option", ["dno_option_1", "dno_option_2"])
def test_with_tau_equal_to_eta_the_reference_is_the_fixed_one(option):
    P, start, reference = RANDOM[1], random_policy(10, 8, floor=0.01), random_policy(10, 9, floor=0.01)
    step = games.solve(P, algorithm=option, eta=0.4, tau=0.4, initial=start, reference=reference, iterations=1).last
    opponent = start if option == "dno_option_1" else reference
    np.testing.assert_allclose(step, softmax(np.log(reference) + games.win_rates(P, opponent) / 0.4), atol=1e-14)


def test_the_squared_loss_of_inpo_has_option_1_as_minimiser():
    """Weighted least squares on (h_t - 1/(2 eta))^2 over all pairs and verdicts (INPO, proposition 6)."""
    P, eta, tau = RANDOM[1], 0.8, 0.3
    policy, reference = random_policy(10, 1, floor=0.01), random_policy(10, 2, floor=0.01)
    rows, targets, weights = [], [], []
    for y in range(10):
        for other in range(10):
            for winner, loser, chance in ((y, other, P[y, other]), (other, y, P[other, y])):
                rows.append(np.eye(10)[winner] - np.eye(10)[loser])
                targets.append(0.5 / eta)
                weights.append(policy[y] * policy[other] * chance)
    root = np.sqrt(weights)
    ratio = np.linalg.lstsq(root[:, None] * np.array(rows), root * np.array(targets), rcond=None)[0]
    found = softmax(ratio + (1 - tau / eta) * np.log(policy) + tau / eta * np.log(reference))
    step = games.solve(P, algorithm="inpo", eta=eta, tau=tau, initial=policy, reference=reference, iterations=1).last
    np.testing.assert_allclose(found, step, atol=1e-10)


def test_sppos_step_minimises_its_regression():
    P, eta = RANDOM[0], 0.3
    policy = random_policy(3, 1, floor=0.05)
    goal = (games.win_rates(P, policy) - 0.5) / eta

    def loss(logits):
        return policy @ (np.log(softmax(np.append(logits, 0.0)) / policy) - goal) ** 2

    step = games.solve(P, algorithm="sppo", eta=eta, initial=policy, iterations=1).last
    found = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-12, "fatol": 1e-17, "maxiter": 2000})
    assert tv(softmax(np.append(found.x, 0.0)), step) < 1e-6
    # Next to DNO's step it differs in the second order of 1/eta only, and it stands still at Nash.
    for eta, error in [(10.0, 1e-3), (100.0, 1e-5)]:
        sppo, dno = (
            games.solve(P, algorithm=name, eta=eta, initial=policy, iterations=1).last for name in ("sppo", "dno")
        )
        assert tv(sppo, dno) < error
    np.testing.assert_allclose(
        games.solve(CYCLE, algorithm="sppo", eta=0.1, initial=NASH, iterations=3).last, NASH, atol=1e-12
    )


@pytest.mark.parametrize("algorithm", ["dno", "spo", "sppo", "iterative_dpo"])
def test_unregularised_self_play_stands_still_at_nash_but_never_gets_there(algorithm):
    still = games.solve(CYCLE, algorithm=algorithm, eta=1, initial=NASH, iterations=5)
    np.testing.assert_allclose(still.last, NASH, atol=1e-10)
    moving = games.solve(CYCLE, algorithm=algorithm, eta=1, initial=REFERENCE, iterations=300)
    assert moving.gaps[100:].min() > 0.2
    assert moving.average_gaps[-1] < 0.07


# --- online and iterated preference optimisation


def test_online_ipo_finds_the_regularised_nash_policy():
    solution = games.solve(CYCLE, algorithm="online_ipo", tau=0.1, reference=REFERENCE, iterations=3000)
    exact = games.regularised_nash(CYCLE, reference=REFERENCE, tau=0.1)
    np.testing.assert_allclose(solution.last, exact, atol=1e-12)
    still = games.solve(CYCLE, algorithm="online_ipo", tau=0.1, initial=exact, reference=REFERENCE, iterations=5)
    np.testing.assert_allclose(still.last, exact, atol=1e-12)


def test_online_dpo_with_a_fixed_reference_does_not():
    beta = 1.0
    options = {"eta": beta, "reference": REFERENCE, "step_size": 0.5, "iterations": 5000}
    last = games.solve(CYCLE, algorithm="online_dpo", **options)
    assert np.abs(last.policies[-1] - last.policies[-2]).max() < 1e-14
    # Neither with tau = beta nor with the tau = beta / 4 that matches it for weak preferences.
    assert tv(last.last, games.regularised_nash(CYCLE, reference=REFERENCE, tau=beta)) > 0.05
    assert tv(last.last, games.regularised_nash(CYCLE, reference=REFERENCE, tau=beta / 4)) > 1e-3
    # Iterated to the end of each regression it has the same fixed point.
    iterated = games.solve(CYCLE, algorithm="iterative_dpo_fixed", eta=beta, reference=REFERENCE, iterations=300)
    np.testing.assert_allclose(iterated.last, last.last, atol=1e-10)


def test_online_dpo_with_two_responses_by_hand():
    """sigma(beta h) = p, while the regularised Nash policy has h = (p - 1/2) / tau (arXiv 2403.08635, theorem F.6)."""
    p, beta = 0.8, 1.5
    P = np.array([[0.5, p], [1 - p, 0.5]])
    reference = np.array([0.3, 0.7])
    last = games.solve(P, algorithm="online_dpo", eta=beta, reference=reference, step_size=1.0, iterations=2000).last
    np.testing.assert_allclose(np.log(last / reference) @ [1, -1], np.log(p / (1 - p)) / beta, atol=1e-10)
    regularised = games.regularised_nash(P, reference=reference, tau=beta)
    np.testing.assert_allclose(np.log(regularised / reference) @ [1, -1], (p - 0.5) / beta, atol=1e-12)


def test_dpo_in_a_bradley_terry_game_solves_the_reward_problem():
    """Eq. 2's solution pi_ref exp(r / beta), by online DPO, iterated DPO with fixed reference, and learned rewards."""
    rewards, beta = np.array([0.3, 1.0, -0.5, 0.1]), 0.5
    P = games.bradley_terry(rewards)
    reference = random_policy(4, 3, floor=0.1)
    solution = softmax(np.log(reference) + rewards / beta)
    for algorithm, iterations in [("online_dpo", 5000), ("iterative_dpo_fixed", 1)]:
        options = {"algorithm": algorithm, "eta": beta, "initial": reference, "iterations": iterations}
        np.testing.assert_allclose(games.solve(P, step_size=2.0, **options).last, solution, atol=1e-10)
    ten = games.solve(P, algorithm="reward_maximisation", eta=10 * beta, initial=reference, iterations=10).last
    np.testing.assert_allclose(ten, solution, atol=1e-12)
    fit = games.bradley_terry_rewards(P, sampling=reference)
    np.testing.assert_allclose(fit, rewards - reference @ rewards, atol=1e-12)


@pytest.mark.parametrize("initial", [None, REFERENCE], ids=["uniform", "off"])
def test_bradley_terry_rewards_cannot_lead_to_the_cyclic_equilibrium(initial):
    solution = games.solve(CYCLE, algorithm="reward_maximisation", eta=5, initial=initial, iterations=500)
    # Policy t solves Eq. 2 with beta = 5/t: from no step at all to the best response to the rewards, none comes near.
    assert solution.gaps.min() > 0.06
    assert solution.gaps[-1] > 0.59
    assert min(tv(policy, NASH) for policy in solution.policies) > 0.05


@pytest.mark.parametrize(("scale", "error"), [(0.01, 1e-8), (0.05, 9e-7), (1.0, 0.04)])
def test_iterated_dpo_with_moving_reference_is_dno_with_a_quarter_of_beta(scale, error):
    weak = 0.5 + scale * (CYCLE - 0.5)
    for P in (weak, games.random_game(3, seed=3, scale=scale)):
        dpo = games.solve(P, algorithm="iterative_dpo", eta=1.0, initial=REFERENCE, iterations=1).last
        dno = games.solve(P, algorithm="dno", eta=0.25, initial=REFERENCE, iterations=1).last
        assert tv(dpo, dno) < error
        assert tv(dpo, dno) < 0.1 * tv(dno, REFERENCE)


# --- the interface


@pytest.mark.parametrize("algorithm", games.ALGORITHMS)
def test_every_algorithm_of_the_registry_runs_and_stays_on_the_simplex(algorithm):
    tau = 0.1 if games.ALGORITHMS[algorithm].takes_tau else 0.0
    for P in RANDOM:
        solution = games.solve(P, algorithm=algorithm, tau=tau, iterations=30)
        assert solution.algorithm == algorithm
        assert solution.policies.shape == (31, len(P))
        assert solution.gaps.shape == (31,)
        assert solution.average_gaps.shape == (30,)
        np.testing.assert_allclose(solution.policies.sum(-1), 1.0, atol=1e-12)
        assert solution.gaps[-1] == pytest.approx(games.duality_gap(P, solution.last), abs=1e-12)
        assert games.ALGORITHMS[algorithm].step.__doc__
        with pytest.raises(AttributeError):
            solution.gaps = None


@pytest.mark.parametrize("algorithm", UNREGULARISED)
def test_long_runs_with_violent_steps_stay_finite(algorithm):
    solution = games.solve(CYCLE, algorithm=algorithm, eta=0.01, step_size=0.05, initial=REFERENCE, iterations=300)
    assert np.all(np.isfinite(solution.policies))


@pytest.mark.parametrize(
    ("P", "message"),
    [
        ([[0.5, 0.7], [0.4, 0.5]], "must be 1"),
        ([[0.5, 1.2], [-0.2, 0.5]], r"lie in \[0, 1\]"),
        ([[0.5, float("nan")], [0.5, 0.5]], r"lie in \[0, 1\]"),
        ([[0.5, 0.5]], "shape"),
        ([[0.5]], "at least two"),
        (np.full((2, 2, 2, 2), 0.5), "shape"),
        (np.stack([CYCLE, CYCLE + 0.01]), "prompt 1: .*must be 1"),
    ],
)
def test_what_is_no_game_is_refused(P, message):
    for call in (games.nash, games.solve, lambda P: games.duality_gap(P, [0.5, 0.5])):
        with pytest.raises(ValueError, match=message):
            call(P)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([0.5, 0.5], "shape"),
        ([0.5, 0.5, 0.5], "sum to 1"),
        ([1.5, -0.5, 0.0], "probabilities"),
        ([[0.5, 0.3, 0.2]], "shape"),
        ([float("nan")] * 3, "probabilities"),
    ],
)
def test_what_is_no_policy_of_the_game_is_refused(policy, message):
    for call in (
        lambda: games.duality_gap(CYCLE, policy),
        lambda: games.win_rates(CYCLE, policy),
        lambda: games.solve(CYCLE, initial=policy),
        lambda: games.solve(CYCLE, reference=policy),
        lambda: games.regularised_nash(CYCLE, reference=policy, tau=0.1),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "dpo"}, "unknown algorithm 'dpo'; there are dno, "),
        ({"algorithm": "dno_option_1", "tau": 0.5, "eta": 0.4}, "at most eta"),
        ({"algorithm": "comal", "tau": 0.5, "eta": lambda t: 1.0 / (t + 1)}, "eta=0.333.* at t=2"),
        ({"algorithm": "dno", "tau": 0.1}, "dno has no tau"),
        ({"algorithm": "inpo"}, "needs tau > 0"),
        ({"algorithm": "dno_option_1", "tau": -0.1}, "tau must be"),
        ({"eta": 0.0}, "eta must be a positive"),
        ({"eta": float("nan")}, "eta must be a positive"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"algorithm": "comal", "tau": 0.1, "refresh": 0}, "refresh must be at least 1"),
        ({"step_size": -1.0}, "step_size"),
        ({"initial": [1.0, 0.0, 0.0]}, "initial must give every response a positive"),
        ({"reference": [1.0, 0.0, 0.0]}, "reference must give every response a positive"),
        ({"prompt_weights": [1.0]}, "prompt_weights must have shape"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        games.solve(CYCLE, **options)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="tau must be a positive"):
        games.regularised_nash(CYCLE, reference=REFERENCE, tau=0)
    with pytest.raises(ValueError, match="one size"):
        games.contextual([CYCLE, RANDOM[1]])
    with pytest.raises(ValueError, match="one size"):
        games.contextual([])
    with pytest.raises(ValueError, match="strength"):
        games.rock_paper_scissors(1.5)
    with pytest.raises(ValueError, match="at least two"):
        games.random_game(1, seed=0)
    with pytest.raises(ValueError, match="scale"):
        games.random_game(3, seed=0, scale=2)
    with pytest.raises(ValueError, match="finite"):
        games.bradley_terry([0.0, np.inf])
    with pytest.raises(ValueError, match="sum to 1"):
        games.duality_gap(games.contextual([CYCLE, CYCLE]), [NASH, NASH], prompt_weights=[0.5, 0.6])
    with pytest.raises(ValueError, match="always win"):
        games.bradley_terry_rewards([[0.5, 1.0], [0.0, 0.5]], sampling=[0.5, 0.5])
    with pytest.raises(ValueError, match="one shape"):
        games.kl([0.5, 0.5], NASH)


def test_random_games_are_reproducible_and_follow_their_seed():
    np.testing.assert_array_equal(games.random_game(5, seed=3), games.random_game(5, seed=3))
    assert not np.array_equal(games.random_game(5, seed=3), games.random_game(5, seed=4))
    assert np.abs(games.random_game(40, seed=0, scale=0.1) - 0.5).max() <= 0.05


def test_games_need_no_jax():
    code = "from dno_jax import games; import sys; games.solve(games.cyclic_game()); print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
