"""Sampled games against the exact ones: the losses that train models, run where the answer is known.

Tolerances are sampling noise: with N pairs a step's log-ratios err by about 1 / (eta sqrt(N)) (measured in
`test_the_error_of_a_step_falls_with_the_root_of_the_pairs`); seeds are fixed.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest

from dno_jax import games
from dno_jax.games import sampled as sampled_games
from dno_jax.games.sampled import ALGORITHMS, solve_sampled

CYCLE = games.cyclic_game()
OFF_CENTRE = np.array([0.5, 0.3, 0.2])
POLICY_GRADIENT = ("spo", "nash_md")
REGRESSIONS = [name for name in ALGORITHMS if name not in POLICY_GRADIENT]


def copies(values, count):
    """The same game or policy at `count` prompts: independent repetitions in one program."""
    return np.broadcast_to(values, (count, *np.shape(values)))


def tv(one, other):
    return 0.5 * np.abs(one - other).sum(axis=-1)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# --- one step


def knobs(name):
    """Knobs at which three steps go far; tau where the algorithm has one."""
    entry = games.ALGORITHMS[ALGORITHMS[name].exact]
    # DNO and SPPO are the same to first order in 1 / eta: at .2 they differ by .08, as no two others here by below .03.
    eta = 0.2 if ALGORITHMS[name].exact in ("dno", "sppo") else 4.0 if "iterative" in name else 1.0
    found = {"eta": eta, "tau": 0.3 if entry.takes_tau else 0.0, "refresh": 2}
    return found | ({"step_size": 0.2 if name == "online_ipo" else 1.0} if name.startswith("online") else {})


FIRST = ("dno",)  # some four seconds each, most of them compilation: the others are for the soak


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.soak) for name in REGRESSIONS]
)
def test_three_steps_of_many_pairs_are_three_exact_steps(name):
    P = games.contextual([CYCLE, games.random_game(3, seed=1)])
    initial = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    settings = {"iterations": 3, "initial": initial, "reference": initial[:, ::-1], **knobs(name)}
    exact = games.solve(P, algorithm=ALGORITHMS[name].exact, **settings)
    sampled = solve_sampled(P, algorithm=name, num_pairs=65536, num_samples=16, **settings)
    assert sampled.policies.shape == exact.policies.shape
    np.testing.assert_allclose(sampled.policies.sum(-1), 1.0, atol=1e-12)
    assert tv(exact.last, initial).max() > 0.1  # far enough to tell algorithms apart
    assert tv(sampled.policies, exact.policies).max() < 0.015
    assert np.abs(sampled.gaps - exact.gaps).max() < 0.015


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_policy_gradients_ascend_the_expected_advantage(name):
    tau, eta, size, logits = (0.3 if name == "nash_md" else 0.0), 1.0, 1.0, np.log(OFF_CENTRE)
    reference = np.array([0.2, 0.3, 0.5])
    for _ in range(3):
        policy = softmax(logits)
        mixture = softmax((1 - tau / eta) * np.log(policy) + tau / eta * np.log(reference))
        advantage = CYCLE @ mixture - 0.5 - tau * np.log(policy / reference)
        logits = logits + size * policy * (advantage - policy @ advantage)
    sampled = solve_sampled(
        CYCLE,
        algorithm=name,
        iterations=3,
        eta=eta,
        tau=tau,
        step_size=size,
        initial=OFF_CENTRE,
        reference=reference,
        num_pairs=65536,
    )
    assert tv(softmax(logits), OFF_CENTRE) > 0.03
    assert tv(sampled.last, softmax(logits)) < 0.004


@pytest.mark.soak
def test_the_error_of_a_step_falls_with_the_root_of_the_pairs():
    target = games.solve(CYCLE, algorithm="dno", eta=1.0, iterations=1, initial=OFF_CENTRE).last
    errors = {}
    for num_pairs in (512, 8192):
        step = solve_sampled(
            copies(CYCLE, 32),
            algorithm="dno",
            iterations=1,
            initial=copies(OFF_CENTRE, 32),
            num_pairs=num_pairs,
            num_samples=16,
        )
        errors[num_pairs] = tv(step.last, target).mean()
    assert errors[512] < 1 / np.sqrt(512)
    assert 3.0 < errors[512] / errors[8192] < 5.3  # 4, by the root of 16


@pytest.mark.soak
def test_unseen_responses_keep_their_log_ratio_and_separable_labels_a_finite_minimum():
    rare = np.array([0.6, 0.4 - 1e-9, 1e-9])
    step = solve_sampled(CYCLE, algorithm="dno", iterations=1, initial=rare).last
    scores = CYCLE @ rare
    expected = rare[:2] * np.exp(scores[:2] - rare[:2] @ scores[:2] / rare[:2].sum())
    # u is 0 for the rare one and, since pairs only say differences, has mean 0 over the others.
    assert np.log(step[2] / rare[2]) - np.log(step[:2] / rare[:2]).mean() == pytest.approx(0.0, abs=1e-3)
    assert np.log(step[0] / step[1]) == pytest.approx(np.log(expected[0] / expected[1]), abs=0.05)
    few = solve_sampled(
        games.rock_paper_scissors(), algorithm="iterative_dpo", iterations=3, num_pairs=2, initial=OFF_CENTRE
    )
    assert np.all(np.isfinite(np.log(few.policies)))
    assert few.policies.min() > 1e-4


# --- whole runs


SETTINGS = {"onpo": (1.0, 0.0), "comal": (0.5, 0.1), "dno_option_1": (1.0, 0.1), "dno": (5.0, 0.0)}


@pytest.fixture(scope="module")
def runs():
    """Of an algorithm: two repetitions of 300 steps of 4,096 pairs, and the exact run."""

    @functools.cache
    def play(name):
        eta, tau = SETTINGS[name]
        common = {"algorithm": name, "eta": eta, "tau": tau, "iterations": 300}
        sampled = solve_sampled(copies(CYCLE, 2), initial=copies(OFF_CENTRE, 2), **common)
        return sampled, games.solve(CYCLE, initial=OFF_CENTRE, **common)

    return play


@pytest.mark.soak
def test_sampling_keeps_the_order_of_the_last_iterates(runs):
    """The exact gaps are .0002, .0012, .078, .29: within the noise of 4,096 pairs, the regularised one, and a cycle."""
    for name in ("onpo", "comal"):
        assert runs(name)[1].gaps[-1] < 0.002
        assert runs(name)[0].gaps[-1] < 0.04
    assert runs("dno_option_1")[0].gaps[-1] == pytest.approx(runs("dno_option_1")[1].gaps[-1], abs=0.015)
    assert runs("dno")[0].gaps[-1] > 2 * runs("dno_option_1")[0].gaps[-1]


def test_the_average_of_dno_is_far_better_than_its_last_iterate(runs):
    sampled, exact = runs("dno")
    assert exact.average_gaps[-1] < 0.02 < 0.2 < exact.gaps[-1]
    assert sampled.average_gaps[-1] < 0.02 < 0.2 < sampled.gaps[-1]


@pytest.mark.soak
def test_option_1_comes_near_the_regularised_nash_policy(runs):
    sampled, _ = runs("dno_option_1")
    aim = games.regularised_nash(CYCLE, reference=OFF_CENTRE, tau=0.1)
    assert tv(sampled.policies[-150:].mean(axis=0), aim).max() < 0.006


def test_iterated_dpo_is_nearly_dno_with_a_quarter_of_beta(runs):
    dpo = solve_sampled(
        copies(CYCLE, 2), algorithm="iterative_dpo", eta=20.0, iterations=60, initial=copies(OFF_CENTRE, 2)
    )
    assert tv(dpo.last, runs("dno")[0].policies[60]).max() < 0.05
    other = games.solve(CYCLE, algorithm="dno", eta=10.0, iterations=60, initial=OFF_CENTRE)
    assert tv(dpo.last, other.last).min() > 0.1


@pytest.mark.slow
@pytest.mark.soak
def test_two_thousand_sampled_steps_of_dno_show_the_figures_of_the_exact_ones():
    """Exact: gap .57 of the last iterate, .0049 of the average (docs/theory.md); so does rebel's squared loss."""
    for name in ("dno", "rebel"):
        sampled = solve_sampled(
            copies(CYCLE, 2), algorithm=name, eta=5.0, iterations=2000, initial=copies(OFF_CENTRE, 2)
        )
        exact = games.solve(CYCLE, algorithm="dno", eta=5.0, iterations=2000, initial=OFF_CENTRE)
        assert sampled.gaps[-500:].mean() == pytest.approx(exact.gaps[-500:].mean(), abs=0.05)
        assert sampled.average_gaps[-1] < 0.01


# --- the program around it


def test_a_run_is_one_program(monkeypatch):
    """However many iterations, and again for other seeds, games of the same size, and starts."""
    traces = []
    original = ALGORITHMS["dno"]

    def counting(*arguments):
        traces.append(1)
        return original.step(*arguments)

    monkeypatch.setitem(sampled_games.ALGORITHMS, "dno", replace(original, step=counting))
    common = {"algorithm": "dno", "iterations": 50, "num_pairs": 64}
    first = solve_sampled(CYCLE, **common)
    assert len(traces) == 1
    assert np.array_equal(solve_sampled(CYCLE, **common).policies, first.policies)
    assert not np.array_equal(solve_sampled(CYCLE, seed=1, **common).policies, first.policies)
    solve_sampled(games.rock_paper_scissors(), initial=OFF_CENTRE, **common)
    assert len(traces) == 1


def test_every_algorithm_names_an_exact_one():
    assert {entry.exact for entry in ALGORITHMS.values()} == set(games.ALGORITHMS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"algorithm": "ppo"}, "unknown algorithm 'ppo'; sampled are dno"),
        ({"algorithm": "dno_option_1", "eta": 0.1, "tau": 0.2}, "tau must be at most eta"),
        ({"algorithm": "dno", "tau": 0.2}, "dno has no tau"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"num_pairs": 0}, "num_pairs must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"initial": [0.5, 0.5]}, "initial must have shape"),
        ({"initial": [1.0, 0.0, 0.0]}, "initial must give every response"),
        ({"prompt_weights": [1.0]}, "prompt_weights must have shape"),
    ],
)
def test_bad_input_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        solve_sampled(CYCLE, **wrong)
