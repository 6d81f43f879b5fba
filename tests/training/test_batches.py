import numpy as np
import pytest

from dno_jax.training.batches import TrainingRow, batch_order, make_batch, num_steps
from tests.batches import response_tokens


def test_a_batch_holds_every_token_once_and_masks_the_prompt():
    rows = [
        TrainingRow(((1, 2, 3), (1, 2, 3)), ((4, 5), (6,)), previous_logprob=(-1.5, -2.5), target=0.7),
        TrainingRow(((7,), (7,)), ((8, 9, 10), (11, 12)), previous_logprob=(-3.0, -4.0)),
    ]
    batch = make_batch(rows, batch_size=4, max_length=64)
    assert batch.token.shape == (1, 8, 8)
    assert batch.token[0, 0, :5].tolist() == [1, 2, 3, 4, 5]
    assert batch.places.position[0, 0, :6].tolist() == [0, 1, 2, 3, 4, -1]
    assert batch.places.segment is None
    assert [[response_tokens(batch, p, c).tolist() for c in range(2)] for p in range(2)] == [
        [[4, 5], [6]],
        [[8, 9, 10], [11, 12]],
    ]
    assert batch.source[0, 0, :2].tolist() == [2, 3]  # the hidden state before a token predicts it
    assert batch.num_tokens[0].tolist() == [[2, 1], [3, 2], [0, 0], [0, 0]]
    assert batch.weight[0].tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(batch.target[0], [0.7, 1, 0, 0], rtol=1e-6)
    assert batch.previous_logprob[0, :2].tolist() == [[-1.5, -2.5], [-3.0, -4.0]]
    assert np.all(batch.places.position[0, 4:] == -1)


def test_refuses_what_does_not_fit():
    row = TrainingRow(((1,) * 30, (1,)), ((2,) * 10, (2,)))
    with pytest.raises(ValueError, match="a text of 40 tokens exceeds max_length 39"):
        make_batch([row], batch_size=1, max_length=39)
    with pytest.raises(ValueError, match="2 rows for a batch of 1"):
        make_batch([row, row], batch_size=1, max_length=64)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 4), (8, 4), (3, 8)])
def test_every_epoch_uses_every_row_once(num_rows, batch_size):
    order = list(batch_order(num_rows, batch_size=batch_size, num_epochs=2, seed=1, iteration=0))
    assert len(order) == num_steps(num_rows, batch_size=batch_size, num_epochs=2)
    half = len(order) // 2
    for epoch in (order[:half], order[half:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(num_rows))
    if num_rows > 4:
        assert np.any(np.concatenate(order[:half]) != np.concatenate(order[half:]))


def test_like_lengths_are_put_together_and_every_row_still_comes_once():
    lengths = np.random.default_rng(0).integers(1, 1000, 640)
    made = list(batch_order(640, batch_size=8, num_epochs=1, seed=1, iteration=0, lengths=lengths))
    assert sorted(np.concatenate(made).tolist()) == list(range(640))
    spread = np.mean([np.ptp(lengths[batch]) for batch in made])
    assert (
        spread
        < 200
        < np.mean([np.ptp(lengths[b]) for b in batch_order(640, batch_size=8, num_epochs=1, seed=1, iteration=0)])
    )
    means = np.asarray([lengths[batch].mean() for batch in made])
    assert abs(np.corrcoef(means, np.arange(len(made)))[0, 1]) < 0.4  # and no order in which they come
