"""A language model in the cyclic game, by the ordinary stages, follows the exact algorithm."""

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "cyclic_game.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE), run_name="cyclic_game")


@pytest.fixture(scope="module")
def folder(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cyclic")
    example["make_policy"](folder)
    return folder


def assert_follows(one, *, moved):
    np.testing.assert_allclose(one.policies[0], [0.5, 0.3, 0.2], atol=0.01)
    assert one.other < 0.005
    # 4,096 samples of K = 8 leave a noise of about .01 a step; the policy itself has moved by far more.
    assert 0.5 * np.abs(one.policies - one.exact).sum(axis=1).max() < 0.05
    assert 0.5 * np.abs(one.exact[-1] - one.exact[0]).sum() > moved


@pytest.mark.soak
def test_a_language_model_takes_a_step_of_the_exact_algorithm(example, folder):
    assert_follows(example["play"](folder, "soft_dno", "iterations=1"), moved=0.05)


@pytest.mark.soak
def test_a_language_model_follows_the_exact_algorithm(example, folder, tmp_path):
    played = {name: example["play"](folder, name, "iterations=3") for name in ("soft_dno", "proximal")}
    for one in played.values():
        assert_follows(one, moved=0.1)
    figure = tmp_path / "figure.png"
    example["draw"](played, figure)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["dno_prct", "iterative_dpo"])
def test_hard_labels_are_played_too(example, folder, name):
    one = example["play"](folder, name, "iterations=1")
    # Rock is beaten by paper, which few scissors beat: paper gains.
    assert one.policies[1, 1] > one.policies[0, 1] + 0.01


def test_schemes_are_compared_at_one_cost(example, tmp_path):
    """Some 91 pairs of samples of a prompt per iteration, whichever scheme; a text of its own each."""
    costs = {}
    for name, count in example["SCHEMES"].items():
        config = example["variant_config"](tmp_path, name, "iterations=20", f"sampling.num_samples={count}")
        costs[name] = example["comparisons"](config) / 20
    assert costs["soft_dno"] == costs["proximal"] == 91  # all pairs of 14
    # Of the policy before, whose pairs are known: 8 x 8 across and 28 of one's own; the first iteration has the latter.
    assert costs["optimistic"] == pytest.approx((28 + 19 * 92) / 20)
    assert costs["extragradient"] == (45 + 45 + 100) / 2  # two iterations a step
    assert max(costs.values()) / min(costs.values()) < 1.1


@pytest.mark.soak
def test_a_pull_to_a_centre_leaves_soft_dno_behind_at_one_cost(example, folder):
    """What docs/theory.md shows with three seeds, with one and fewer iterations."""
    late = {}
    for name in ("soft_dno", "proximal"):
        late[name] = example["play"](folder, name, "iterations=12", run=f"{name}-late").late
    assert late["proximal"] < 0.5 * late["soft_dno"]
