"""Beyond the paper, on exact games: optimism by one regression, Nash mirror prox, payoff transforms, noise."""

import numpy as np
import pytest

from dno_jax import games
from dno_jax.preferences import TRANSFORMS, transformed

CYCLE = games.cyclic_game()
REFERENCE = np.array([0.5, 0.3, 0.2])
UNIFORM = np.full(3, 1 / 3)


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def two_passes(P, log_auxiliary, log_policy, *, eta, steps, meet=lambda policy: policy):
    """Optimistic mirror descent as published: pi' moves by r_t, and pi_{t+1} is a second such step from it."""
    played = [np.exp(log_policy)]
    for _ in range(steps):
        rewards = P @ meet(played[-1])
        log_auxiliary = log_softmax(log_auxiliary + rewards / eta)
        played.append(np.exp(log_softmax(log_auxiliary + rewards / eta)))
    return np.stack(played)


def one_regression(P, log_policy, *, eta, steps, first):
    """pi_{t+1} ∝ pi_t exp((2 r_t - r_{t-1}) / eta), with r_{-1} = first(r_0)."""
    played, before = [np.exp(log_policy)], first(P @ np.exp(log_policy))
    for _ in range(steps):
        rewards = P @ played[-1]
        log_policy = log_softmax(log_policy + (2 * rewards - before) / eta)
        before = rewards
        played.append(np.exp(log_policy))
    return np.stack(played)


RANDOM = [games.random_game(size, seed=size) for size in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 22, 24,
                                                          26, 28, 29)]  # fmt: skip


@pytest.mark.parametrize("eta", [1.0, 8.0])
def test_one_regression_plays_what_two_passes_play(eta):
    for P, steps in [(CYCLE, 1000), *((P, 200) for P in RANDOM)]:
        start = np.log(np.random.default_rng(len(P)).dirichlet(np.full(len(P), 5.0)))
        found = games.solve(P, algorithm="onpo", eta=eta, initial=np.exp(start), iterations=steps)
        expected = two_passes(P, start, start, eta=eta, steps=steps)
        np.testing.assert_allclose(found.policies, expected, rtol=0, atol=1e-12)


def test_a_run_that_begins_with_its_own_first_reward_is_two_passes_from_a_step_behind():
    """As language models begin, r_{-1} = r_0: pi'_0 is then pi_0 without its first step, and all else is the same."""
    for P in (CYCLE, *RANDOM):
        start = np.log(np.full(len(P), 1 / len(P)))
        behind = log_softmax(start - P @ np.exp(start) / 2.0)
        found = one_regression(P, start, eta=2.0, steps=100, first=lambda reward: reward)
        np.testing.assert_allclose(found, two_passes(P, behind, start, eta=2.0, steps=100), rtol=0, atol=1e-12)
    assert games.duality_gap(CYCLE, one_regression(CYCLE, np.log(REFERENCE), eta=1, steps=1000,
                                                   first=lambda reward: reward)[-1]) < 1e-9  # fmt: skip


def test_given_the_same_estimates_both_are_still_the_same():
    rng, start = np.random.default_rng(7), np.log(REFERENCE)
    found = games.solve(CYCLE, algorithm="onpo", eta=2, initial=REFERENCE, iterations=300, num_opponents=8, seed=7)
    expected = two_passes(
        CYCLE, start, start, eta=2, steps=300, meet=lambda policy: rng.multinomial(8, policy / policy.sum()) / 8
    )
    np.testing.assert_allclose(found.policies, expected, rtol=0, atol=1e-11)


# --- Nash mirror prox


def contraction(P, reference, start, *, tau, steps):
    """KL(pi* || pi_k) over (1 + 2 tau)^-k KL(pi* || pi_0) of each game, the largest of all k until rounding."""
    nash = games.regularised_nash(P, reference=reference, tau=tau)
    played = games.solve(
        P, algorithm="nash_mirror_prox", tau=tau, initial=start, reference=reference, iterations=steps
    ).policies
    distance = games.kl(np.broadcast_to(nash, played.shape), played).reshape(steps + 1, -1)
    bound = distance[0] * (1 + 2 * tau) ** -np.arange(steps + 1.0)[:, None]
    return np.where(bound > 1e-13, distance / bound, 0.0)[1:].max()


@pytest.mark.parametrize("tau", [0.02, 0.1, 0.5])
def test_nash_mirror_prox_contracts_at_its_rate(tau):
    """With eta = 1/2, its default: on the cycle and on 100 random games of each strength."""
    assert contraction(CYCLE, REFERENCE, UNIFORM, tau=tau, steps=400) <= 1.0
    worst, rng = [], np.random.default_rng(0)
    for size in range(2, 12):
        P = games.contextual([games.random_game(size, seed=100 * size + seed) for seed in range(10)])
        reference, start = rng.dirichlet(np.full(size, 3.0), (2, 10))
        worst.append(contraction(P, reference, start, tau=tau, steps=60))
    assert 0.5 < max(worst) <= 1.0


def test_nash_mirror_prox_ends_at_the_regularised_nash_policy():
    last = games.solve(CYCLE, algorithm="nash_mirror_prox", tau=0.1, reference=REFERENCE, iterations=1000).last
    np.testing.assert_allclose(last, [0.3366, 0.3496, 0.3138], atol=5e-5)
    assert games.kl(games.regularised_nash(CYCLE, reference=REFERENCE, tau=0.1), last) < 1e-14


def test_the_steps_of_nash_mirror_prox_by_their_formulas():
    eta, beta, policy = 0.7, 0.2, np.array([0.2, 0.3, 0.5])
    share = eta / (eta + beta)

    def step(rewards):
        logits = share * np.log(policy) + (1 - share) * np.log(REFERENCE) + rewards / (eta + beta)
        return np.exp(log_softmax(logits))

    expected = step(CYCLE @ step(CYCLE @ policy))
    found = games.solve(
        CYCLE, algorithm="nash_mirror_prox", eta=eta, tau=beta, initial=policy, reference=REFERENCE, iterations=1
    )
    np.testing.assert_allclose(found.last, expected, atol=1e-14)


# --- payoff transforms


def top_cycle(P):
    """The smallest set whose members all beat everybody outside: those from whom a chain of wins leads to everybody."""
    reach = (P >= 0.5).astype(int)
    for _ in P:
        reach = np.minimum(reach @ reach, 1)
    return reach.all(axis=1)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_nash_policy_of_a_transformed_game_answers_outside_of_the_top_cycle(transform):
    proper, supports = 0, []
    for seed in range(150):
        P = games.random_game(7, seed=seed)
        P = P * 0.98 + 0.01  # no preference is certain
        inside = top_cycle(P)
        found = games.nash(P, transform=transform)
        assert found[~inside].max(initial=0.0) < 1e-9
        proper += not inside.all()
        supports.append(frozenset(np.flatnonzero(found > 1e-9)))
    assert proper > 30
    assert max(map(len, supports)) > 2


def test_transforms_are_what_they_are_called():
    P = games.bradley_terry([0.3, -1.0, 0.3, 2.0])
    np.testing.assert_allclose(
        transformed(P, "logit"), 0.5 + np.subtract.outer([0.3, -1.0, 0.3, 2.0], [0.3, -1.0, 0.3, 2.0]), atol=1e-12
    )
    assert transformed(P, "sign").tolist() == [[0.5, 1, 0.5, 0], [0, 0.5, 0, 0], [0.5, 1, 0.5, 0], [1, 1, 1, 0.5]]
    assert transformed(P, "identity") is P
    for name in TRANSFORMS:
        payoffs = transformed(CYCLE, name)
        np.testing.assert_allclose(payoffs + payoffs.T, 1.0, atol=1e-12)
    np.testing.assert_allclose(games.nash(CYCLE, transform="sign"), UNIFORM, atol=1e-12)
    odds = np.log(np.array([[1, 1 / 9, 4], [9, 1, 1 / 9], [1 / 4, 9, 1]]))  # of .9 and of .8
    assert abs(odds @ games.nash(CYCLE, transform="logit")).max() < 1e-9  # every answer is worth the same
    # Hard verdicts have no strength to lose: sign changes nothing in them, and log-odds say no more.
    hard = games.rock_paper_scissors()
    np.testing.assert_array_equal(transformed(hard, "sign"), hard)
    kept = transformed(hard, "logit", least=0.01)
    np.testing.assert_allclose(kept, 0.5 + np.log(99) * (2 * hard - 1), atol=1e-12)


@pytest.mark.parametrize(("transform", "eta"), [("identity", 1.0), ("sign", 1.0), ("logit", 4.0)])
def test_last_iterates_reach_the_nash_policy_of_the_transformed_game(transform, eta):
    options = {"transform": transform, "eta": eta, "initial": REFERENCE, "iterations": 1000}
    solution = games.solve(CYCLE, algorithm="onpo", **options)
    np.testing.assert_allclose(solution.last, games.nash(CYCLE, transform=transform), atol=1e-6)
    assert solution.gaps[-1] < 1e-6


def test_transformed_games_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="unknown transform 'square'; there are identity, sign, logit"):
        games.nash(CYCLE, transform="square")
    with pytest.raises(ValueError, match="strictly between 0 and 1; some are certain: take sign"):
        games.solve(games.rock_paper_scissors(), transform="logit")
    with pytest.raises(
        ValueError, match="iterative_dpo learns from verdicts of pairs, which transform=sign says nothing of"
    ):
        games.solve(CYCLE, algorithm="iterative_dpo", transform="sign")


# --- noise


def late_gap(algorithm, *, eta, num_opponents, **options):
    """Mean gap of iterates 301 to 400 over 8 seeds, each with draws of its own."""
    P, start = (np.broadcast_to(one, (8, *one.shape)) for one in (CYCLE, REFERENCE))
    solution = games.solve(
        P, algorithm=algorithm, eta=eta, initial=start, iterations=400, num_opponents=num_opponents, **options
    )
    return solution.gaps[300:400].mean()


def proximal(tau, **options):
    return late_gap("comal", tau=tau, refresh=50, **options)


def test_the_proximal_scheme_bears_sampled_opponents_better_than_the_optimistic_one():
    noisy = {"eta": 2.0, "num_opponents": 8}
    assert proximal(0.1, **noisy) == pytest.approx(0.09, abs=0.03)
    assert late_gap("onpo", **noisy) == pytest.approx(0.22, abs=0.06)
    assert proximal(0.1, **noisy) < 0.6 * min(late_gap("onpo", **noisy), proximal(0.02, **noisy))


@pytest.mark.soak
@pytest.mark.parametrize("eta", [2.0, 5.0])
def test_so_it_does_for_every_number_of_opponents(eta):
    for count in (None, 64, 8, 5):
        found = {tau: proximal(tau, eta=eta, num_opponents=count) for tau in (0.1, 0.02)}
        optimistic = late_gap("onpo", eta=eta, num_opponents=count)
        assert found[0.1] < 0.7 * optimistic
        assert found[0.1] < 0.8 * found[0.02]
    assert proximal(0.1, eta=2.0, num_opponents=64) == pytest.approx(0.030, abs=0.01)
    assert late_gap("onpo", eta=2.0, num_opponents=64) == pytest.approx(0.073, abs=0.02)


def test_sampled_opponents_are_those_of_the_policy_that_is_met():
    step = {"algorithm": "dno", "eta": 1.0, "iterations": 1}
    P, start = (np.broadcast_to(one, (2000, *one.shape)) for one in (CYCLE, REFERENCE))
    logs = np.log(games.solve(P, initial=start, num_opponents=4, seed=3, **step).last / REFERENCE)
    moved = logs - logs[:, :1]
    rewards = CYCLE @ REFERENCE
    np.testing.assert_allclose(moved.mean(axis=0), rewards - rewards[0], atol=0.02)
    frequencies = np.random.default_rng(3).multinomial(4, start) / 4
    expected = frequencies @ CYCLE.T
    np.testing.assert_allclose(moved, expected - expected[:, :1], atol=1e-12)
    with pytest.raises(ValueError, match="num_opponents must be at least 1, got 0"):
        games.solve(CYCLE, num_opponents=0)
    with pytest.raises(ValueError, match="online_ipo learns from verdicts of pairs, which num_opponents=3"):
        games.solve(CYCLE, algorithm="online_ipo", tau=0.1, num_opponents=3)
