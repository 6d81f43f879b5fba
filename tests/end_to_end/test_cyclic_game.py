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
