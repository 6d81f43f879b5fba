"""Win rates corrected by labelled pairs: planted judges that err, and what people would have said."""

from __future__ import annotations

import numpy as np
import pytest

from dno_jax.evaluation.comparisons import Row
from dno_jax.evaluation.judge_errors import JudgeErrors
from dno_jax.statistics import Tally, wilson

CASES = [  # true rate, sensitivity, specificity, prompts, labels of either kind, samples of a prompt, share of ties
    (0.5, 0.9, 0.7, 100, 60, 1, 0.0),
    (0.7, 0.8, 0.8, 200, 40, 1, 0.0),
    (0.3, 0.75, 0.9, 400, 150, 1, 0.2),
    (0.85, 0.95, 0.85, 50, 100, 1, 0.0),
    (0.6, 0.8, 0.7, 100, 80, 4, 0.0),
]


def tally(values):
    return Tally.of(values, range(len(values)))


def planted(rng, theta, sensitivity, specificity, prompts, labels, samples, ties):
    """Rows that a judge with these errors gives of two players, one of whom people prefer with this rate; its errors.

    A share of its verdicts is left undecided; several samples of a prompt have one truth.
    """

    def judged(truth):
        said = np.where(rng.random(truth.shape) < np.where(truth, sensitivity, 1.0 - specificity), 1.0, 0.0)
        return np.where(rng.random(truth.shape) < ties, 0.5, said)

    truth = np.repeat(rng.random((prompts, 1)) < theta, samples, axis=1)
    rows = [Row(str(x), "1", "0", float(value)) for x, own in enumerate(judged(truth)) for value in own]
    told = [(f"first {x}", float(value), 1.0) for x, value in enumerate(judged(np.ones(labels, bool)))]
    told += [(f"second {x}", float(value), 0.0) for x, value in enumerate(judged(np.zeros(labels, bool)))]
    return rows, JudgeErrors.of(told)


@pytest.mark.parametrize(
    ("case", "runs"),
    [(case, 100) for case in CASES[1::2]] + [pytest.param(case, 2000, marks=pytest.mark.soak) for case in CASES],
    ids=str,
)
def test_corrected_intervals_cover_what_people_prefer(case, runs):
    """The judge's own interval does not, so that this can fail; 3 standard errors of 100 runs are 7 points."""
    rng, theta = np.random.default_rng(1), case[0]
    covered, naive, values = [], [], []
    for _ in range(runs):
        rows, errors = planted(rng, *case)
        found = errors.correct(rows, "1", "0")
        values.append(found.value)
        covered.append(found.low <= theta <= found.high)
        rate = Tally.of([row.preference for row in rows], [row.prompt_id for row in rows])
        low, high = wilson(rate.mean, rate.effective)
        naive.append(low <= theta <= high)
    slack = 3 * np.sqrt(0.05 * 0.95 / runs)
    assert 0.93 - slack <= np.mean(covered) <= min(0.97 + slack, 1.0)
    assert np.mean(values) == pytest.approx(theta, abs=0.02 + 3 * np.std(values) / np.sqrt(runs))
    if abs(theta * case[1] + (1 - theta) * (1 - case[2]) - theta) > 0.05:
        assert np.mean(naive) < 0.8


def test_the_estimate_is_rogan_and_gladens():
    """Counted by hand: 60 of 100 by the judge, 18 of 20 and 14 of 20 labels: (.6 + .7 - 1) / (.9 + .7 - 1) = 1/2."""
    rows = [Row(str(x), "1", "0", float(x < 60)) for x in range(100)]
    errors = JudgeErrors(tally([1.0] * 18 + [0.0] * 2), tally([1.0] * 14 + [0.0] * 6))
    found = errors.correct(rows, "1", "0")
    assert found.value == pytest.approx(0.5)
    assert (found.count, found.prompts) == (100, 100)
    assert found.low < 0.4 < 0.6 < found.high  # wider than the judge's own +-.1


def test_a_judge_without_errors_is_not_corrected_and_more_labels_narrow_the_interval():
    rows = [Row(str(x), "1", "0", float(x < 70)) for x in range(100)]
    few, many = (JudgeErrors(tally([1.0] * n), tally([1.0] * n)).correct(rows, "1", "0") for n in (20, 2000))
    assert few.value == many.value == pytest.approx(0.7)
    own = wilson(0.7, 100.0)
    assert (many.low, many.high) == (pytest.approx(own[0], abs=0.01), pytest.approx(own[1], abs=0.01))
    assert few.high - few.low > many.high - many.low


def test_the_first_of_a_labelled_pair_is_the_player():
    """A judge that likes the player's manner errs for it: sensitivity is not specificity, and the sides matter."""
    told = [(str(x), 1.0, 1.0) for x in range(40)] + [(f"b{x}", float(x % 2), 0.0) for x in range(40)]
    errors = JudgeErrors.of(told)
    assert (errors.sensitivity.mean, errors.specificity.mean) == (1.0, 0.5)
    rows = [Row(str(x), "0", "1", float(x >= 75)) for x in range(100)]  # player 1 wins 75 of 100
    assert errors.correct(rows, "1", "0").value == pytest.approx(0.5)
    assert errors.correct(rows, "2", "0") is None


def test_several_labels_on_one_prompt_are_one_witness():
    labels = [(x, float(x % 2)) for x in range(200)]  # the judge is wrong on every fifth ten of them
    told = [(x, label if x // 10 % 5 else 1.0 - label, label) for x, label in labels]
    apart, together = (JudgeErrors.of([(name(x), *own) for x, *own in told]) for name in (str, lambda x: str(x // 10)))
    assert apart.sensitivity.mean == together.sensitivity.mean == 0.8
    rows = [Row(str(x), "1", "0", float(x % 3 > 0)) for x in range(600)]
    narrow, wide = (own.correct(rows, "1", "0") for own in (apart, together))
    assert narrow.value == wide.value
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


@pytest.mark.parametrize(
    ("labelled", "message"),
    [
        ([("a", 1.0, 1.0)], "1 labels with a verdict prefer the first response and 0 the second; some of both"),
        ([("a", 1.0, 0.5)], "0 labels with a verdict prefer the first response and 0 the second"),
        ([(str(x), float(x % 2), float(x % 4 > 1)) for x in range(80)], "of 80 labels the judge's verdicts cannot be"),
        ([(str(x), float(x % 2), 1.0 - x % 2) for x in range(80)], "the judge sides against 80 labels more often"),
    ],
)
def test_where_labels_say_too_little_nothing_is_corrected(labelled, message):
    errors = JudgeErrors.of(labelled)
    assert message in errors.why
    assert errors.correct([Row("x", "1", "0", 1.0)], "1", "0") is None
    assert errors.as_dict()["why"] == errors.why


@pytest.mark.parametrize("won", [0, 100])
def test_a_rate_beyond_what_such_a_judge_can_give_is_not_called_certain(won):
    labels = [
        (f"{side} {x}", float(x < 160) if side else float(x >= 160), side) for side in (0.0, 1.0) for x in range(200)
    ]
    errors = JudgeErrors.of(labels)
    assert errors.why == ""
    found = errors.correct([Row(str(x), "1", "0", float(x < won)) for x in range(100)], "1", "0")
    assert found.value == won / 100
    assert found.high - found.low > 0.03
    near = errors.correct([Row(str(x), "1", "0", float(x < 18)) for x in range(100)], "1", "0")
    assert (near.value, near.low) == (0.0, 0.0)
    assert near.high > 0.05


def test_what_is_no_share_is_refused():
    for row in (("x", 1.5, 1.0), ("x", float("nan"), 1.0), ("x", 1.0, -1.0)):
        with pytest.raises(ValueError, match="shares in"):
            JudgeErrors.of([row])
