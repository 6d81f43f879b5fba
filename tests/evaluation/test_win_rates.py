import numpy as np
import pytest

from dno_jax.evaluation.win_rates import best_policy, win_rate


def test_independent_comparisons_give_wilsons_interval():
    # 70 of 100, one a prompt; Wilson 95 %: [0.6042, 0.7811] (textbook formula).
    found = win_rate([1.0] * 70 + [0.0] * 30, [str(i) for i in range(100)])
    assert found.rate == pytest.approx(0.7)
    assert (found.low, found.high) == (pytest.approx(0.6042, abs=1.5e-3), pytest.approx(0.7811, abs=1.5e-3))
    assert (found.comparisons, found.prompts) == (100, 100)


def test_repeating_each_prompt_adds_no_evidence():
    values, ids = [1.0] * 7 + [0.0] * 3, [str(i) for i in range(10)]
    once, often = win_rate(values, ids), win_rate(values * 20, ids * 20)
    assert often.low == pytest.approx(once.low, abs=1e-9)
    assert often.high == pytest.approx(once.high, abs=1e-9)


def test_a_clean_sweep_is_as_sure_as_its_prompts():
    sweep = win_rate([1.0] * 40, [str(i % 4) for i in range(40)])
    assert sweep.rate == 1.0
    assert sweep.low == pytest.approx(1 / (1 + 1.96**2 / 4), abs=1e-3)
    assert sweep.high == 1.0


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        # Prompts differ in how good the policy is at them; 4 samples each.
        chance = np.repeat(rng.beta(3.0, 2.0, size=60), 4)
        found = win_rate(
            (rng.random(240) < chance).astype(float).tolist(), np.repeat(np.arange(60), 4).astype(str).tolist()
        )
        covered += found.low <= 0.6 <= found.high
    assert 0.91 <= covered / 400 <= 0.99


@pytest.mark.parametrize("values", [[], [1.5], [-0.1]])
def test_refuses_what_is_no_preference(values):
    with pytest.raises(ValueError, match="preferences"):
        win_rate(values, ["p"] * len(values))


def test_the_best_policy_is_not_simply_the_last():
    # A cycle with policy 1 the strongest over all: 2 beats 1, yet loses to 0.
    wins = np.asarray([[0.5, 0.1, 0.8], [0.9, 0.5, 0.45], [0.2, 0.55, 0.5]])
    assert best_policy(wins) == 1
    assert best_policy(np.full((3, 3), 0.5)) == 2
    assert best_policy(np.full((1, 1), 0.5)) == 0
