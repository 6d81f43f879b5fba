"""Arena-Hard's arithmetic beside the way its own script takes: a logistic regression on battles counted by weight."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from dno_jax.evaluation.arena_hard import score

VERDICTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def by_bradley_terry(games):
    """The maximum likelihood rating of the model over the baseline, ties being half of each, as a win rate."""
    wins = losses = 0.0
    for verdict in (verdict for own in games for verdict in own):
        weight = 3.0 if verdict in (0.0, 1.0) else 1.0
        wins += weight * (0.5 if verdict == 0.5 else verdict > 0.5)
        losses += weight * (0.5 if verdict == 0.5 else verdict < 0.5)
    found = minimize_scalar(lambda x: wins * np.logaddexp(0, -x) + losses * np.logaddexp(0, x), bounds=(-20, 20),
                            method="bounded", options={"xatol": 1e-10})  # fmt: skip
    return 100.0 / (1.0 + np.exp(-found.x))


@pytest.mark.parametrize("seed", range(4))
def test_the_win_rate_is_bradley_terrys(seed):
    rng = np.random.default_rng(seed)
    games = [tuple(rng.choice(VERDICTS, size=2, p=(0.1, 0.2, 0.2, 0.3, 0.2))) for _ in range(200)]
    found = score(games)
    assert found.win_rate == pytest.approx(by_bradley_terry(games), abs=1e-4)
    assert found.low < found.win_rate < found.high
    assert found.n_total == 200
    assert found.battles == sum(3 if one in (0.0, 1.0) else 1 for own in games for one in own)


def test_counted_by_hand():
    """Much better, better, a tie, much worse: 3 + 1 + 1/2 of 3 + 1 + 1 + 3 battles."""
    assert score([(1.0, 0.75), (0.5, 0.0)]).win_rate == pytest.approx(100 * 4.5 / 8)


def test_both_games_of_a_question_are_one_witness():
    rng = np.random.default_rng(0)
    first = rng.choice((0.25, 0.75), size=400)
    alike, apart = (
        score([(v, v) for v in first]),
        score([(v, w) for v, w in zip(first, rng.permutation(first), strict=True)]),
    )
    assert alike.standard_error > 1.3 * apart.standard_error
    assert alike.high - alike.low == pytest.approx(apart.high - apart.low, rel=0.2)  # the official one does not see it


def test_what_is_no_verdict_is_refused():
    with pytest.raises(ValueError, match=r"got 0\.6"):
        score([(0.6, 0.5)])
    with pytest.raises(ValueError, match="no game"):
        score([(), ()])
    assert score([(0.75,)]).standard_error is None
