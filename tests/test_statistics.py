import numpy as np
import pytest

from dno_jax.statistics import Tally, counted_means


def test_a_tally_is_the_mean_over_clusters():
    values = [[1.0, 0.0, 1.0], [0.0], [1.0, 1.0], [0.5, 0.0]]
    tally = Tally()
    for cluster in values:
        tally.add(sum(cluster), len(cluster))
    tally.add(0.0, 0)
    mean = 4.5 / 8
    sums = [sum(cluster) - mean * len(cluster) for cluster in values]
    assert tally.mean == mean
    assert tally.clusters == 4
    assert tally.variance == pytest.approx(4 / 3 * sum(s**2 for s in sums) / 8**2)


def test_intervals_know_that_one_prompt_is_one_witness():
    """Each prompt's 15 comparisons have one coin: only clusters cover the truth 95 times in 100."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        tally = Tally()
        for won in rng.random(80) < 0.6:
            tally.add(15.0 * won, 15)
        found = tally.share()
        covered += found.low <= 0.6 <= found.high
    assert 0.91 <= covered / 300 <= 0.99


def test_values_with_their_prompts_make_the_same_tally():
    values, ids = [1.0, 0.0, 0.5, 1.0, 0.0], ["b", "a", "b", "c", "a"]
    tally = Tally()
    for total, count in ((1.5, 2), (0.0, 2), (1.0, 1)):
        tally.add(total, count)
    assert Tally.of(values, ids).share() == tally.share()


def test_points_have_no_interval_where_one_prompt_gave_them_all():
    tally = Tally()
    tally.add(12.0, 3)
    assert tally.points().as_dict() == {"value": 4.0, "low": None, "high": None, "n": 3, "prompts": 1}
    tally.add(6.0, 1)
    found = tally.points()
    # Two clusters: sums off the mean 4.5 are -1.5 and 1.5, the variance 2 * (1.5^2 + 1.5^2) / 4^2.
    assert found.high - found.value == pytest.approx(1.959964 * (2 * 4.5 / 16) ** 0.5, rel=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_counted_means_are_those_of_the_values_written_out():
    values, counts = np.asarray([[1.0, 0.0, 0.5], [0.2, 0.9, 0.4]]), np.asarray([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    mean, error = counted_means(values, counts)
    written_out = np.asarray([1.0, 1.0, 0.0])
    assert mean.tolist() == pytest.approx([written_out.mean(), 0.9])
    assert error[0] == pytest.approx(written_out.std(ddof=1) / 3**0.5)
    assert np.isnan(error[1])
